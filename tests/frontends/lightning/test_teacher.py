from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as unified
import pytest
import torch
from processes import launch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from strategies_worker import fit, fit_all, refuse_a_teacher_of_shards
from support import SCHEDULE, TinyModule, loader, same_bits, trainer
from torch import Tensor, nn

from inq_lightning import INQCallback, Teacher, distill


class Pupil(TinyModule):
    """A module of somebody's own that asks a teacher where there is one; its forward is the network."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        output = self(x)
        return distill(self.trainer, nn.functional.cross_entropy(output, y), output, x)


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(module.state_dict()))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(same_bits(a[name].float(), b[name].float()) for name in a)


def test_the_full_precision_network_teaches_and_is_no_part_of_the_module() -> None:
    module, teacher = Pupil(), Teacher(1.0)
    before, x = state(module), torch.randn(64, 8)
    expected = module.eval()(x)
    trainer(INQCallback(schedule=SCHEDULE), teacher).fit(module)
    assert teacher.teacher is not None
    assert_same(state(teacher.teacher), before)
    assert torch.equal(teacher.teacher(x), expected)
    assert module.state_dict().keys() == before.keys()
    labels = Pupil()
    trainer(INQCallback(schedule=SCHEDULE)).fit(labels)
    taught, alone = ((net.eval()(x) - expected).square().mean() for net in (module, labels))
    assert taught < alone / 2  # it stays near the teacher, whose word was all that counted


def test_without_a_teacher_a_module_that_asks_trains_as_one_that_does_not() -> None:
    pupil, plain = Pupil(), TinyModule()
    for module in (pupil, plain):
        trainer(INQCallback(schedule=SCHEDULE)).fit(module)
    assert_same(state(pupil), state(plain))


def test_a_resumed_run_goes_on_with_its_teacher_to_the_same_bits(tmp_path: Path) -> None:
    whole = Pupil()
    middle = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    first = trainer(INQCallback(schedule=SCHEDULE), Teacher(0.5), middle, enable_checkpointing=True)
    first.fit(whole)
    resumed, teacher = Pupil(seed=1), Teacher(0.5)
    trainer(INQCallback(schedule=SCHEDULE), teacher).fit(resumed, ckpt_path=tmp_path / "step=6.ckpt")
    assert_same(state(resumed), state(whole))
    assert teacher.teacher is not None
    assert_same(state(teacher.teacher), state(Pupil()))

    first.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "teacher" not in torch.load(tmp_path / "weights.ckpt")


def test_another_fit_takes_the_network_as_it_is_then() -> None:
    module, teacher = Pupil(), Teacher(0.5)
    for _ in range(2):
        before = state(module)
        trainer(teacher, max_epochs=1).fit(module)
        assert teacher.teacher is not None
        assert_same(state(teacher.teacher), before)


def test_a_named_network_teaches_by_a_loss_of_ones_own() -> None:
    class Regression(TinyModule):
        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            output = self.net(batch[0])
            return distill(self.trainer, output.square().mean() * 0, output, input=batch[0])

    module = Regression()
    x = torch.randn(64, 8)
    expected = module.net.eval()(x)
    teacher = Teacher(1.0, network="net", divergence=nn.functional.mse_loss)
    trainer(INQCallback(schedule=SCHEDULE), teacher).fit(module)
    assert (module.net.eval()(x) - expected).square().mean() < expected.square().mean() / 10


def test_modules_of_the_unified_package_have_teachers_too() -> None:
    class Net(unified.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            output = self(batch[0])
            return distill(self.trainer, output.sum() * 0, output, batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)

    net, teacher = Net(), Teacher(1.0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    unified.Trainer(max_epochs=1, callbacks=[teacher], **quiet).fit(net, loader(32))
    assert teacher.teacher is not None
    assert not torch.equal(net.net.weight, teacher.teacher.net.weight)  # type: ignore[union-attr, arg-type]


def test_two_ddp_processes_have_the_same_teacher_as_one_and_resume_with_it(tmp_path: Path) -> None:
    job = {"teacher": 0.5, "save": 6}
    fit(str(tmp_path / "alone"), **job)
    ddp = {**job, "strategy": "ddp", "devices": 2}
    checkpoint = str(tmp_path / "alone" / "step=6.ckpt")
    jobs = [{"out": str(tmp_path / "ddp"), **ddp}, {"out": str(tmp_path / "more"), "ckpt_path": checkpoint, **ddp}]
    launch(2, fit_all, jobs)
    alone = torch.load(tmp_path / "alone" / "0.pt")
    for folder in ("ddp", "more"):
        for rank in (0, 1):
            result = torch.load(tmp_path / folder / f"{rank}.pt")
            assert result["world"] == 2
            assert result["fraction"] == 1
            assert_same(result["weights"], alone["weights"])


def test_a_sharded_network_is_refused_since_no_process_has_a_copy(tmp_path: Path) -> None:
    launch(2, refuse_a_teacher_of_shards, str(tmp_path))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight is the teacher's share of the loss, in \[0, 1\]; got 1.5"):
        Teacher(1.5)
    run: Trainer = trainer(Teacher(network="nett"))
    with pytest.raises(ValueError, match=r"Teacher\(network='nett'\) names no submodule of Pupil, which has net"):
        run.fit(Pupil())
