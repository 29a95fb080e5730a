"""Networks of which a part could be left out: it is said at the start, and in what a run leaves behind."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from support import SCHEDULE, TinyModule, assert_quantized, assert_same_state, same_bits, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inq_lightning import INQCallback


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose matrix is the other way round."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class TransformersConv1D(Conv1D):
    __module__ = "transformers.pytorch_utils"


TransformersConv1D.__name__ = "Conv1D"


class Blocks(TinyModule):
    """Five blocks of an own layer or, in its place, of transformers' one, between TinyModule's layers."""

    def __init__(self, layer: type[Conv1D] = Conv1D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList(nn.ModuleDict({"mlp": layer(8, 8)}) for _ in range(5))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        for block in self.h:
            x = x + block["mlp"](x)
        return super().loss((x, y))


class OwnWeight(TinyModule):
    """Multiplies by a parameter of the module itself, by two in a list and by three experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.listed = nn.ParameterList([torch.randn(8, 8) * 0.3, torch.randn(8, 8) * 0.3])
        self.experts = nn.Parameter(torch.randn(3, 8, 8) * 0.3)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        x = nn.functional.linear(x, self.weight) + x @ self.listed[0] @ self.listed[1]
        x = x + torch.einsum("bi,eij->bj", x, self.experts)
        return super().loss((x, y))


class Averaged(TinyModule):
    """Keeps an average of its network beside it, which no optimizer holds, of the same kind of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net.parameters())

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)


def message(module: LightningModule, callback: INQCallback, **options: Any) -> str:
    """Train, and return what is said of the network's coverage: once, as a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, **options).fit(module)
    said = [str(w.message) for w in caught if "matrix weights" in str(w.message)]
    assert len(said) == 1
    return said[0]


def test_a_network_that_is_quantized_whole_says_so_and_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*(many workers|GPU|recommended).*")
        trainer(INQCallback(schedule=SCHEDULE)).fit(TinyModule())
    assert caplog.text.count("INQ quantizes all 168 matrix weights of the network.") == 1


def test_layers_of_ones_own_are_named_and_include_takes_them() -> None:
    said = message(Blocks(), INQCallback(schedule=SCHEDULE))
    assert "quantizes 168 of the network's 488 matrix weights (34.4%)" in said
    assert "Conv1D" in said
    assert "h.*.mlp.weight (5)" in said
    assert 'include=["*"]' in said
    module, callback = Blocks(), INQCallback(schedule=SCHEDULE, include=["*"])
    trainer(callback).fit(module)
    assert callback.coverage.share == 1
    assert len(callback.layers) == 7
    assert_quantized(module, callback)


def test_the_conv1d_of_transformers_is_quantized_by_default() -> None:
    module, callback = Blocks(TransformersConv1D), INQCallback(schedule=SCHEDULE)
    trainer(callback).fit(module)
    assert callback.coverage.share == 1
    assert {layer.name for layer in callback.layers} >= {f"h.{i}.mlp.weight" for i in range(5)}
    assert_quantized(module, callback)


@pytest.mark.parametrize("include", [["*"], ["net.*", "weight", "listed", "experts"]], ids=str)
def test_parameters_of_the_module_itself_are_named_and_include_takes_them(include: list[str], tmp_path: Path) -> None:
    said = message(OwnWeight(), INQCallback(schedule=SCHEDULE))
    assert "168 of the network's 552 matrix weights" in said
    for name in ("weight", "listed.0", "listed.1", "experts", "OwnWeight", "ParameterList"):
        assert name in said
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, callback = OwnWeight(), INQCallback(schedule=SCHEDULE, include=include)
    trainer(callback, keep, enable_checkpointing=True).fit(whole)
    assert len(callback.layers) == 6
    assert_quantized(whole, callback)
    resumed, callback = OwnWeight(), INQCallback(schedule=SCHEDULE, include=include)
    trainer(callback).fit(resumed, ckpt_path=tmp_path / "step=6.ckpt")
    assert_quantized(resumed, callback)
    assert_same_state(whole, resumed)


def test_a_copy_that_no_optimizer_holds_is_named_and_stays_an_average(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, callback = Averaged(), INQCallback(schedule=SCHEDULE)
    said = message(module, callback, max_epochs=4)
    assert "168 held by no optimizer" in said
    assert "average.0.weight, average.3.weight" in said
    assert [layer.name for layer in callback.layers] == ["net.0.weight", "net.3.weight"]
    assert_quantized(module, callback)
    assert module.average[0].weight.unique().numel() > 100, "no grid has so many values"

    whole = Averaged()
    trainer(INQCallback(schedule=SCHEDULE), keep, enable_checkpointing=True).fit(whole)
    for step in (6, 16):  # in the middle, and with nothing left to train
        resumed, callback = Averaged(), INQCallback(schedule=SCHEDULE)
        trainer(callback).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_quantized(resumed, callback)
        assert_same_state(whole.net, resumed.net)


def test_a_frozen_backbone_is_named() -> None:
    module = TinyModule()
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.detach().clone()
    callback = INQCallback(schedule=SCHEDULE)
    said = message(module, callback)
    assert "quantizes 56 of the network's 168 matrix weights (33.3%)" in said
    assert "112 frozen: net.0.weight" in said
    assert same_bits(module.net[0].weight.detach(), before)


def test_what_is_excluded_on_purpose_is_told_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    module = Blocks()
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*matrix weights.*")
        trainer(INQCallback(schedule=SCHEDULE, exclude=["h.*", "net.0"])).fit(module)
    assert "432 left out by exclude: net.0.weight, h.*.mlp.weight (5)" in caplog.text


class LanguageModel(TinyModule):
    """A table of tokens that the head shares."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token_embed = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.token_embed.weight

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens = batch[1]
        return super().loss(batch) + nn.functional.cross_entropy(self.head(self.token_embed(tokens)), tokens)


@pytest.mark.parametrize("pattern", ["*embed*", "token_embed*", "token_embed", "head", "head.weight"])
def test_patterns_find_a_tied_table_by_each_of_its_names(pattern: str) -> None:
    module, callback = LanguageModel(), INQCallback(schedule=SCHEDULE, layer_bits={pattern: 8})
    trainer(callback).fit(module)
    assert {layer.name: layer.bits for layer in callback.layers}["token_embed.weight"] == 8
    module, callback = LanguageModel(), INQCallback(schedule=SCHEDULE, exclude=[pattern])
    trainer(callback).fit(module)
    assert [layer.name for layer in callback.layers] == ["net.0.weight", "net.3.weight"]


def said_by(checkpoint: Path) -> dict[str, Any]:
    said: dict[str, Any] = torch.load(checkpoint, weights_only=True)["inq"]
    return said


@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_says_of_what_it_is_quantized(resume: bool, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer(INQCallback(schedule=SCHEDULE), keep, enable_checkpointing=True).fit(OwnWeight())
    if resume:
        keep = ModelCheckpoint(tmp_path / "resumed", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        run = trainer(INQCallback(schedule=SCHEDULE), keep, enable_checkpointing=True)
        run.fit(OwnWeight(), ckpt_path=tmp_path / "step=6.ckpt")
    said = said_by(Path(keep.dirpath or "") / "step=16.ckpt")
    assert said["quantized_fraction"] == 1.0
    assert said["network_fraction"] == 168 / 552
    assert said["fully_quantized"] is False
    assert said["left_out"] == dict.fromkeys(["weight", "experts", "listed.0", "listed.1"], "own layer type")


def test_the_plan_tells_it_before_any_training() -> None:
    coverage = INQCallback().plan(OwnWeight()).coverage
    assert (coverage.selected, coverage.total) == (168, 552)
    assert [one.name for one in coverage.left_out] == ["weight", "experts", "listed.0", "listed.1"]
    assert INQCallback(include=["*"]).plan(OwnWeight()).coverage.share == 1


def test_a_module_without_an_optimizer_of_lightnings_is_quantized_as_before() -> None:
    class Raw(TinyModule):
        """Steps an optimizer that it keeps to itself."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.own = torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            self.own.zero_grad()
            self.loss(batch).backward()
            self.own.step()

        def configure_optimizers(self) -> None:
            return None

        def train_dataloader(self) -> DataLoader[Any]:
            return super().train_dataloader()

    module, callback = Raw(), INQCallback(schedule=SCHEDULE)
    trainer(callback).fit(module)
    assert len(callback.layers) == 2
    assert_quantized(module, callback)
