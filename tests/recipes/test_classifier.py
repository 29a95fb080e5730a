from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from inq_lightning import INQCallback
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import SmallCNN


class RateRecorder(Callback):
    """Keeps the learning rate that each optimizer step used."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def make_trainer(tmp_path: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


def fitted_rates(tmp_path: Path, trainer_options: dict[str, Any], **options: Any) -> list[float]:
    recorder = RateRecorder()
    trainer = make_trainer(tmp_path, callbacks=[recorder], limit_val_batches=0, **trainer_options)
    trainer.fit(Classifier(SmallCNN(), 10, lr=1.0, **options), DigitsDataModule(batch_size=256))
    return recorder.rates


def test_small_cnn_learns_the_digits(tmp_path: Path) -> None:
    seed_everything(0)
    data = DigitsDataModule()
    classifier = Classifier(SmallCNN(), 10)
    trainer = make_trainer(tmp_path, max_epochs=10)
    trainer.fit(classifier, data)
    assert {"train/loss", "val/loss", "val/acc"} <= trainer.callback_metrics.keys()
    (metrics,) = trainer.test(classifier, data, verbose=False)
    assert set(metrics) == {"test/loss", "test/acc"}
    assert metrics["test/acc"] >= 0.97


def test_logged_metrics_are_those_of_the_whole_test_set(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=100)
    classifier = Classifier(SmallCNN(), 10, label_smoothing=0.5)
    (metrics,) = make_trainer(tmp_path).test(classifier, data, verbose=False)
    images, labels = (torch.cat(tensors) for tensors in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        logits = classifier.eval()(images)
    assert metrics["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["test/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), rel=1e-5)


# 1078 training images make 5 batches of at most 256.
def test_cosine_decays_over_the_whole_run(tmp_path: Path) -> None:
    rates = fitted_rates(tmp_path, {"max_epochs": 2})
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)])


def test_lr_epochs_is_the_length_of_one_decay_and_its_end_holds(tmp_path: Path) -> None:
    rates = fitted_rates(tmp_path, {"max_epochs": 3}, lr_epochs=1)
    assert rates == pytest.approx([(1 + math.cos(math.pi * min(step, 5) / 5)) / 2 for step in range(15)])


def test_lr_epochs_counts_optimizer_steps(tmp_path: Path) -> None:
    rates = fitted_rates(tmp_path, {"max_epochs": 2, "accumulate_grad_batches": 2}, lr_epochs=1)
    assert rates[4] == pytest.approx((1 + math.cos(math.pi * 2 / 3)) / 2)
    assert rates[5:] == pytest.approx([0.0] * 5)


def test_lr_epochs_serves_a_run_without_end(tmp_path: Path) -> None:
    rates = fitted_rates(tmp_path, {"max_epochs": -1, "max_steps": 7}, lr_epochs=1)
    assert rates[5:] == pytest.approx([0.0, 0.0])


def test_onecycle_is_torchs_and_its_end_holds(tmp_path: Path) -> None:
    rates = fitted_rates(tmp_path, {"max_epochs": 5}, lr_schedule="onecycle", lr_epochs=4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch's cycle ends on its last step, ours one step later, so that it lasts as many steps as the cosine.
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=21, pct_start=7 / 21)
    expected = []
    for _ in range(21):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if len(expected) < 21:
                reference.step()
    assert rates[:20] == pytest.approx(expected[:20])
    assert rates[20:] == pytest.approx([expected[20]] * 5)


def test_constant_stays(tmp_path: Path) -> None:
    assert fitted_rates(tmp_path, {"max_epochs": 1}, lr_schedule="constant") == [1.0] * 5


def test_a_decay_of_unknown_length_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'cosine' with lr_epochs=None.*max_epochs.*constant"):
        fitted_rates(tmp_path, {"max_epochs": -1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_schedule": "linear"}, "constant, cosine, onecycle, got 'linear'"),
        ({"lr": 0.0}, "lr must be above 0; got 0.0"),
        ({"lr_epochs": 0}, "lr_epochs must be at least 1.*got 0"),
        ({"label_smoothing": 1.0}, "label_smoothing.*got 1.0"),
        ({"distillation": 1.5}, "distillation must be in .*got 1.5"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(SmallCNN(), 10, **options)


def test_all_parameters_share_one_weight_decay(tmp_path: Path) -> None:
    classifier = Classifier(SmallCNN(), 10, weight_decay=0.5, nesterov=True, lr_schedule="constant")
    optimizer = classifier.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.5
    assert group["nesterov"]
    assert len(group["params"]) == len(list(classifier.net.parameters()))


class FormatProbe(nn.Module):
    """Asserts that what reaches the network is in channels-last format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        self.seen += 1
        return self.conv(images).mean((2, 3))


def test_channels_last_holds_in_training_and_test(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader([(torch.randn(3, 8, 8), 1)] * 4, batch_size=2)
    classifier = Classifier(FormatProbe(), 4, channels_last=True)
    make_trainer(tmp_path, max_epochs=1).fit(classifier, loader)
    make_trainer(tmp_path).test(classifier, loader, verbose=False)
    assert classifier.net.seen == 4


def test_the_net_is_no_hyperparameter_and_a_checkpoint_restores_it(tmp_path: Path) -> None:
    classifier = Classifier(SmallCNN(), 10, lr=0.3)
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    trainer.fit(classifier, DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert "net" not in classifier.hparams
    restored = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", net=SmallCNN())
    assert restored.lr == 0.3
    assert torch.equal(restored.net.linear.weight, classifier.net.linear.weight)


def test_with_distillation_the_network_agrees_with_what_it_was_whatever_the_labels_say(tmp_path: Path) -> None:
    seed_everything(0)
    data = DigitsDataModule()
    teacher = Classifier(SmallCNN(), 10)
    make_trainer(tmp_path, max_epochs=3).fit(teacher, data)
    pupil = Classifier(copy.deepcopy(teacher.net), 10, distillation=1.0, lr=0.05)
    data.setup("fit")
    wrong = DataLoader([(images, (labels + 1) % 10) for images, labels in data.train_dataloader()], batch_size=None)
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[INQCallback(bits=5)])
    trainer.fit(pupil, wrong)
    images = torch.cat([images for images, _ in data.test_dataloader()])
    assert (pupil.eval()(images).argmax(1) == teacher.eval()(images).argmax(1)).float().mean() > 0.9
    assert set(pupil.state_dict()) == set(teacher.state_dict()), "the teacher is in the module"


def test_a_run_that_is_resumed_keeps_its_teacher_and_a_new_one_takes_another(tmp_path: Path) -> None:
    def teacher_of(classifier: Classifier) -> dict[str, torch.Tensor]:
        assert classifier.teacher.teacher is not None
        return {name: value.clone() for name, value in classifier.teacher.teacher.state_dict().items()}

    classifier = Classifier(SmallCNN(), 10, distillation=0.5)
    before = {name: value.clone() for name, value in classifier.net.state_dict().items()}
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    trainer.fit(classifier, DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.testing.assert_close(teacher_of(classifier), before, rtol=0, atol=0)
    resumed = Classifier(SmallCNN(), 10, distillation=0.5)
    make_trainer(tmp_path, max_epochs=2, limit_train_batches=2).fit(
        resumed, DigitsDataModule(), ckpt_path=tmp_path / "last.ckpt"
    )
    torch.testing.assert_close(teacher_of(resumed), before, rtol=0, atol=0)
    trained = {name: value.clone() for name, value in classifier.net.state_dict().items()}
    make_trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(classifier, DigitsDataModule())
    torch.testing.assert_close(teacher_of(classifier), trained, rtol=0, atol=0)


def test_the_distillation_loss_is_hintons(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pupil = Classifier(SmallCNN(), 10, distillation=0.3)
    teacher = copy.deepcopy(pupil.net).eval()
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    trainer.fit(pupil, DigitsDataModule())
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    pupil.eval()  # batch norm gives the same twice
    logits, target = pupil(images).double(), teacher(images).double()
    soft = (target / 4).softmax(1)
    divergence = (soft * (soft.log() - (logits / 4).log_softmax(1))).sum(1).mean() * 16
    expected = 0.7 * nn.functional.cross_entropy(logits, labels) + 0.3 * divergence
    pupil.log = lambda *args, **options: None  # type: ignore[method-assign]  # outside of the Trainer's loop
    torch.testing.assert_close(pupil.training_step((images, labels), 0).double(), expected, rtol=1e-5, atol=1e-6)
