"""A Trainer of transformers for test_huggingface.py, and what its processes run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from support import SCHEDULE, TinyModule, same_bits, weights
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from inq_lightning import INQTrainerCallback


class Classifier(nn.Module):
    """TinyModule's network as the Trainer wants it; dropout, so that random numbers have to resume too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = TinyModule(seed=seed).net
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(self.dropout(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


SAMPLES = [
    {"x": x, "labels": y} for batch in TinyModule(samples=64).batches for x, y in zip(batch[0], batch[1], strict=True)
]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(SAMPLES)


class Witness(transformers.TrainerCallback):  # type: ignore[misc]
    """Sees after every step that frozen weights have not moved and that clipping has not seen their gradients."""

    def __init__(self, callback: INQTrainerCallback) -> None:
        self.callback = callback
        self.rates: list[float] = []
        self.logged: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        inq = self.callback.inq
        assert inq is not None
        self.held = {layer.name: inq.frozen_mask(layer.name) for layer in inq.layers}
        self.before = weights(model, inq)  # type: ignore[arg-type]
        for name, mask in self.held.items():
            assert not model.get_parameter(name).grad[mask].any()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **others: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        after = weights(model, self.callback.inq)  # type: ignore[arg-type]
        assert all(same_bits(self.before[name][mask], after[name][mask]) for name, mask in self.held.items())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **others: Any) -> None:
        self.logged.append(logs)


class Killed(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def make(
    folder: Path, *others: Any, inq: dict[str, Any] | None = None, seed: int = 0, data: Any = SAMPLES, **arguments: Any
) -> tuple[Any, INQTrainerCallback, Witness]:
    """A Trainer of four epochs of eight steps."""
    options = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "save_steps": 1,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    callback = INQTrainerCallback(**{"schedule": SCHEDULE, **(inq or {})})
    witness = Witness(callback)
    trainer = transformers.Trainer(
        Classifier(seed),
        transformers.TrainingArguments(str(folder), **(options | arguments)),
        train_dataset=data,
        eval_dataset=SAMPLES,
        callbacks=[callback, witness, *others],
    )
    return trainer, callback, witness


def train_and_resume(out: str) -> None:
    """Train to the end, be killed in mid-phase and go on; save what this process ends with as ``out/<rank>.pt``."""
    ends = []
    for folder, step in ((f"{out}/whole", None), (f"{out}/part", 7), (f"{out}/part", None)):
        resumes = Path(folder).exists()
        trainer, callback, _ = make(Path(folder), *([Killed(step)] if step else []), seed=5 * resumes)
        try:
            trainer.train(resume_from_checkpoint=resumes)
        except KeyboardInterrupt:
            continue
        assert callback.inq is not None
        ends.append([callback.inq.quantized_fraction, trainer.model.state_dict()])
    torch.save([trainer.args.world_size, *ends], f"{out}/{os.environ['RANK']}.pt")
