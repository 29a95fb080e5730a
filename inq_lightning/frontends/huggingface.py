"""INQ in the Trainer of Hugging Face's transformers: its events onto the loop's front end."""

from __future__ import annotations

import base64
import io
import math
import zlib
from typing import Any

import torch
from torch import nn

from inq_lightning._common import import_extra
from inq_lightning.core import sharding
from inq_lightning.core.options import Options
from inq_lightning.core.quantizer import Quantizer
from inq_lightning.core.schedule import Unit
from inq_lightning.frontends.loop import INQ

transformers: Any = import_extra("transformers", "huggingface")


class INQTrainerCallback(
    transformers.TrainerCallback,  # type: ignore[misc]
    transformers.trainer_callback.ExportableState,  # type: ignore[misc]
):
    """Turns the weights that a ``transformers.Trainer`` trains into powers of two, phase by phase.

    Its state is in every checkpoint's ``trainer_state.json``, so ``trainer.train(resume_from_checkpoint=True)`` ends
    with the same bits as a run that was not interrupted. Logs get ``inq/quantized_fraction`` and ``inq/phase``.

    Args:
        options: Arguments of :class:`~inq_lightning.Options` by name, such as ``bits=4``.

    Attributes:
        inq: The :class:`~inq_lightning.INQ` of the run; None before it begins.

    Raises:
        ValueError: An option is none of the allowed values; the message names it.
    """

    def __init__(self, **options: Any) -> None:
        Options(**options)
        self._options = options
        self.inq: INQ | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        """Put activations in place, if they are to be rounded, before a checkpoint is loaded."""
        Quantizer(Options(**self._options)).prepare(model)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        train_dataloader: Any,
        **others: Any,
    ) -> None:
        """Refuse what cannot work, take up a checkpoint's state, and hold the optimizer."""
        if args.deepspeed or args.fsdp or any(sharding.is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "INQTrainerCallback needs the whole weights in every process, which FSDP, DeepSpeed and tensor "
                "parallelism split; use one device or DDP, or FSDP2 with Lightning's ModelParallelStrategy"
            )
        saved = state.stateful_callbacks.setdefault(type(self).__name__)  # missing from a checkpoint without INQ
        if isinstance(saved, list):
            raise ValueError("a Trainer takes one INQTrainerCallback; give layers different widths with layer_bits")
        if self.inq is not None:
            self.inq.release()
        steps_per_epoch = math.inf
        if transformers.trainer_utils.has_length(train_dataloader):
            steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self.inq = INQ(
            model,
            getattr(optimizer, "optimizer", optimizer),  # within Accelerate's
            schedulers=[lr_scheduler],
            epochs=math.inf if args.max_steps > 0 else args.num_train_epochs,
            steps=state.max_steps,
            steps_per_epoch=steps_per_epoch,
            **self._options,
        )
        if saved and state.global_step:  # of a run that begins, it is this callback's own
            self.inq.load_state_dict(_decoded(saved["attributes"]["saved"]))
        self.inq.begin(lambda unit: _position(state, unit))

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin the phase whose time has come; once everything is quantized, the best checkpoint is sought anew."""
        assert self.inq is not None
        if self.inq.advance(_position(state, self.inq.quantizer.timetable.unit)) and self.inq.quantizer.complete:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **others: Any) -> None:
        """Add the quantization to what is logged, for the history and for the callbacks further down the list."""
        if self.inq is not None:
            logs |= self.inq.quantizer.metrics()
            state.log_history[-1] |= self.inq.quantizer.metrics()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Let go of the optimizer, and verify that every frozen weight is where it was frozen."""
        assert self.inq is not None
        self.inq.finish()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint: one text, since it writes JSON."""
        saved = None if self.inq is None else _encoded(self.inq.state_dict())
        return {"args": {}, "attributes": {"saved": saved}}


def _position(state: Any, unit: Unit) -> int:
    return int(state.epoch) if unit == "epoch" else int(state.global_step)


def _encoded(state: dict[str, Any]) -> str:
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


def _decoded(text: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), weights_only=True)
    return state
