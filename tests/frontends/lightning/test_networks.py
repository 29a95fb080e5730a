from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from support import SCHEDULE, TinyModule, Witness, assert_quantized, loader, same_bits, trainer, weights
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from inq_lightning import INQCallback, PowerOfTwoGrid, Schedule

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
Y = (X[:, :4] + X[:, 4:]).argmax(1)


class Module(LightningModule):
    """Fits any network that maps eight numbers to four logits; three batches an epoch."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Iterable[Any]], optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.net = net
        self.make = optimizer or (lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(X, Y), batch_size=8)

    val_dataloader = train_dataloader


class Reshape(nn.Module):
    def __init__(self, *shape: int, channels_last: bool = False) -> None:
        super().__init__()
        self.shape, self.channels_last = shape, channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), *self.shape)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def fit(module: LightningModule, *others: Callback, ckpt_path: Any = None, **options: Any) -> INQCallback:
    """Fits, and checks frozen weights after every batch and everything at the end."""
    names = ("schedule", "keep_zeros", "exclude", "embeddings", "layer_bits", "bits")
    own = {"schedule": SCHEDULE} | {name: options.pop(name) for name in names if name in options}
    callback = INQCallback(**own)
    witness = Witness(callback)
    trainer(callback, *others, witness, **options).fit(module, ckpt_path=ckpt_path)
    assert witness.checks > 0
    assert_quantized(module, callback)
    return callback


def names(callback: INQCallback) -> list[str]:
    return [layer.name for layer in callback.layers]


def saver(folder: Path, every: int = 3) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


# ---- compiled --------------------------------------------------------------------------------------------------------


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4))


PLAIN = ["net.0.weight", "net.2.weight"]


def compiled_module() -> tuple[Any, Module]:
    module = Module(plain_net())
    return torch.compile(module, backend="eager"), module


def compiled_in_place() -> tuple[Any, Module]:
    module = Module(plain_net())
    module.net.compile(backend="eager")
    return module, module


def compiled_submodule() -> tuple[Any, Module]:
    module = Module(torch.compile(plain_net(), backend="eager"))
    return module, module


def uncompiled() -> tuple[Any, Module]:
    module = Module(plain_net())
    return module, module


@pytest.mark.parametrize("make", [compiled_module, compiled_in_place, compiled_submodule])
def test_compiled_modules_end_as_uncompiled_ones_under_the_same_names(make: Callable[[], tuple[Any, Module]]) -> None:
    fitted, module = make()
    callback = INQCallback(schedule=SCHEDULE)
    witness = Witness(callback)
    trainer(callback, witness).fit(fitted)
    assert_quantized(module, callback)
    assert names(callback) == PLAIN
    plain = uncompiled()[1]
    reference = fit(plain)
    for name, w in weights(plain, reference).items():
        assert same_bits(w, weights(module, callback)[name]), name


@pytest.mark.parametrize("writer", [compiled_module, compiled_in_place, uncompiled])
@pytest.mark.parametrize("reader", [compiled_module, compiled_in_place, uncompiled])
def test_checkpoints_of_compiled_and_uncompiled_runs_resume_in_each_other(
    writer: Callable[[], tuple[Any, Module]], reader: Callable[[], tuple[Any, Module]], tmp_path: Path
) -> None:
    fitted, whole = writer()
    trainer(INQCallback(schedule=SCHEDULE), saver(tmp_path), enable_checkpointing=True).fit(fitted)
    resumed, module = reader()
    callback = INQCallback(schedule=SCHEDULE)
    trainer(callback, Witness(callback)).fit(resumed, ckpt_path=tmp_path / "step=6.ckpt")
    assert_quantized(module, callback)
    assert_same_state(whole, module)


def test_the_state_of_a_compiled_submodule_is_kept_under_plain_names_and_resumes(tmp_path: Path) -> None:
    whole = compiled_submodule()[0]
    fit(whole, saver(tmp_path), enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert list(checkpoint["callbacks"]["INQCallback"]["layers"]) == PLAIN
    resumed = compiled_submodule()[0]
    fit(resumed, ckpt_path=tmp_path / "step=6.ckpt")
    assert_same_state(whole, resumed)


def test_the_state_of_a_compiled_submodule_fits_the_uncompiled_one_once_the_weights_are_renamed(tmp_path: Path) -> None:
    whole = compiled_submodule()[0]
    fit(whole, saver(tmp_path), enable_checkpointing=True)
    path = tmp_path / "step=6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    with pytest.raises(RuntimeError, match="Missing key"):  # Lightning's: it knows the weights under other names
        fit(uncompiled()[0], ckpt_path=path)
    checkpoint["state_dict"] = {k.replace("_orig_mod.", ""): v for k, v in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)
    resumed = uncompiled()[0]
    fit(resumed, ckpt_path=path)
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---- kinds of layers -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(2, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 4, 2))[0][:, -1])


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x))


class Words(nn.Module):
    """Two linear layers behind an embedding, the last one tied to it."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 4)
        self.inner = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 12, bias=False)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        words = (x * 3).long().abs() % 12
        return self.decoder(torch.relu(self.inner(self.embedding(words).mean(1))))


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(Reshape(2, 4), encoder, nn.Flatten(), nn.Linear(8, 4))


def images(channels_last: bool) -> nn.Module:
    net = nn.Sequential(
        Reshape(2, 2, 2, channels_last=channels_last),
        nn.Conv2d(2, 6, 2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(100, 4),
    )
    return net.to(memory_format=torch.channels_last) if channels_last else net


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "transformer": (transformer, 9),  # per layer: in_proj, out_proj and two linear ones
    "lstm": (lambda: Recurrent(nn.LSTM), 9),
    "gru": (lambda: Recurrent(nn.GRU), 9),
    "cell": (Cell, 3),
    "images": (lambda: images(False), 3),
    "channels-last": (lambda: images(True), 3),
    "conv1d": (
        lambda: nn.Sequential(
            Reshape(1, 8), nn.Conv1d(1, 4, 3), nn.ConvTranspose1d(4, 2, 3), nn.Flatten(), nn.Linear(16, 4)
        ),
        3,
    ),
    "tied-linears": (Twins, 2),
}


@pytest.mark.parametrize("kind", NETS)
def test_every_kind_of_layer_is_quantized_and_resumes_bit_identically(kind: str, tmp_path: Path) -> None:
    make, count = NETS[kind]

    def module() -> Module:
        torch.manual_seed(0)
        return Module(make())

    whole = module()
    callback = fit(whole, saver(tmp_path), enable_checkpointing=True, limit_val_batches=1)
    assert len(callback.layers) == count
    resumed = module()
    fit(resumed, ckpt_path=tmp_path / "step=6.ckpt", limit_val_batches=1)
    assert_same_state(whole, resumed)


def test_channels_last_weights_keep_their_memory_format_and_end_as_contiguous_ones_do() -> None:
    ends = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        module = Module(images(channels_last), lambda p: optim.SGD(p, lr=0.0))  # at rate 0, rounding alone decides
        fit(module)
        ends.append(module.net)
    assert ends[1][1].weight.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_tied_to_its_embedding_is_quantized_once_and_stays_tied(
    tied: bool, embeddings: bool, tmp_path: Path
) -> None:
    def module() -> Module:
        torch.manual_seed(0)
        return Module(Words(tied))

    whole, resumed = module(), module()
    callback = fit(whole, saver(tmp_path), enable_checkpointing=True, embeddings=embeddings)
    expected = ["net.embedding.weight", "net.inner.weight"] if tied else ["net.inner.weight", "net.decoder.weight"]
    if embeddings:
        expected = ["net.embedding.weight", "net.inner.weight"] + ([] if tied else ["net.decoder.weight"])
    assert names(callback) == expected
    assert (whole.net.decoder.weight is whole.net.embedding.weight) == tied
    fit(resumed, ckpt_path=tmp_path / "step=6.ckpt", embeddings=embeddings)
    assert_same_state(whole, resumed)


@pytest.mark.parametrize(
    "computed",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_computed_weights_are_refused_by_name_and_accepted_when_left_out(computed: Callable[..., nn.Module]) -> None:
    net = plain_net()
    computed(net[0])
    with pytest.raises(ValueError, match=r"net\.0\.weight is computed from other parameters.*exclude it"):
        fit(Module(net))
    assert names(fit(Module(net), exclude=["net.0"])) == ["net.2.weight"]


def test_lazy_layers_are_refused_by_name_until_a_batch_has_run() -> None:
    net = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(4))
    module = Module(net)
    with pytest.raises(ValueError, match=r"net\.0.* lazy layer.* no shape yet; run one batch"):
        fit(module)
    net(X[:2])
    assert names(fit(module)) == PLAIN


def test_layers_made_in_configure_model_are_quantized(tmp_path: Path) -> None:
    class Late(Module):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.net = None  # type: ignore[assignment]

        def configure_model(self) -> None:
            if self.net is None:
                self.net = plain_net()

    whole, resumed = Late(), Late()
    assert names(fit(whole, saver(tmp_path), enable_checkpointing=True)) == PLAIN
    fit(resumed, ckpt_path=tmp_path / "step=6.ckpt")
    assert_same_state(whole, resumed)


def test_layers_that_began_on_the_meta_device_are_quantized() -> None:
    class Meta(Module):
        def __init__(self) -> None:
            with torch.device("meta"):
                super().__init__(plain_net())

        def configure_model(self) -> None:
            if self.net[0].weight.is_meta:
                self.net.to_empty(device="cpu")
                for layer in (self.net[0], self.net[2]):
                    layer.reset_parameters()

    module = Meta()
    assert module.net[0].weight.is_meta
    assert names(fit(module)) == PLAIN


def test_a_layer_of_zeros_alone_is_frozen_at_zero() -> None:
    net = plain_net()
    nn.init.zeros_(net[2].weight)
    module = Module(net)
    callback = fit(module, schedule={0: 1.0})
    assert not net[2].weight.any()
    assert callback.layers[1].n1 is None
    trained = Module(plain_net())
    nn.init.zeros_(trained.net[2].weight)
    fit(trained)  # half of the zeros are frozen first; the others train before they are rounded
    assert 0 < int(trained.net[2].weight.count_nonzero()) <= 20


# ---- finetuning ------------------------------------------------------------------------------------------------------


class Transfer(TinyModule):
    """A backbone that only a finetuning callback hands to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:3], self.net[3]

    def configure_optimizers(self) -> Any:
        return optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


class Unfreeze(BaseFinetuning):
    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: optim.Optimizer) -> None:
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


def backbone_finetuning(epoch: int) -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=epoch, lambda_func=lambda _: 1.0, backbone_initial_lr=0.01)


@pytest.mark.parametrize("first", [False, True], ids=["finetuning-last", "finetuning-first"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("finetuning", [Unfreeze, backbone_finetuning])
def test_a_backbone_unfrozen_during_the_run_is_adopted_and_fully_quantized(
    finetuning: Callable[[int], Callback], epoch: int, first: bool
) -> None:
    module, callback = Transfer(), INQCallback(schedule=SCHEDULE)
    before = module.backbone[0].weight.detach().clone()

    class Look(Callback):
        def __init__(self) -> None:
            self.layers: list[int] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.layers.append(len(callback.layers))
            if trainer.current_epoch < epoch:
                assert torch.equal(module.backbone[0].weight, before)

    look, other, witness = Look(), finetuning(epoch), Witness(callback)
    witness.on_train_end = lambda *args: None  # type: ignore[method-assign]  # the share falls when a layer comes in
    trainer(*([other, callback] if first else [callback, other]), look, witness).fit(module)
    assert look.layers == [1] * 4 * epoch + [2] * 4 * (4 - epoch)
    assert_quantized(module, callback)
    assert not torch.equal(module.backbone[0].weight, before)


@pytest.mark.parametrize("step", [4, 6, 8, 10, 12, 14])  # the backbone is unfrozen at step 8
@pytest.mark.parametrize("finetuning", [Unfreeze, backbone_finetuning])
def test_finetuning_resumes_before_and_after_the_unfreezing(
    finetuning: Callable[[int], Callback], step: int, tmp_path: Path
) -> None:
    # From a checkpoint that every_n_train_steps writes at an epoch's last batch, Lightning resumes without beginning
    # the next epoch, so its finetuning callbacks would not unfreeze; what every_n_epochs writes is fine.
    when = {"every_n_epochs": 1} if step % 4 == 0 else {"every_n_train_steps": 2}
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    whole = Transfer()
    trainer(finetuning(2), INQCallback(schedule=SCHEDULE), keep, enable_checkpointing=True).fit(whole)
    module, callback = Transfer(), INQCallback(schedule=SCHEDULE)
    trainer(finetuning(2), callback).fit(module, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert len(callback.layers) == 2
    assert_quantized(module, callback)
    if step <= 8:  # Lightning's callbacks leave the backbone without gradients when they resume after the unfreezing
        assert_same_state(whole, module)


def test_a_compiled_backbone_resumes_after_its_unfreezing(tmp_path: Path) -> None:
    class Compiled(Module):
        def __init__(self) -> None:
            backbone = torch.compile(nn.Sequential(nn.Linear(8, 10), nn.ReLU()), backend="eager")
            super().__init__(nn.Sequential(backbone, nn.Linear(10, 4)))
            self.backbone = backbone

        def configure_optimizers(self) -> Any:
            return self.make(p for p in self.parameters() if p.requires_grad)

    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    trainer(Unfreeze(1), INQCallback(schedule=SCHEDULE), keep, enable_checkpointing=True).fit(Compiled())
    module, callback = Compiled(), INQCallback(schedule=SCHEDULE)
    trainer(Unfreeze(1), callback).fit(module, ckpt_path=tmp_path / "step=9.ckpt")
    assert names(callback) == ["net.1.weight", "net.0.0.weight"]  # in the order in which they became trainable
    assert_quantized(module, callback)


# ---- pruned networks -------------------------------------------------------------------------------------------------


def pruned(live: bool) -> Module:
    net = plain_net()
    for layer, share in ((net[0], 0.6), (net[2], 0.5)):
        prune.l1_unstructured(layer, "weight", share)
        if not live:
            prune.remove(layer, "weight")
    return Module(net)


@pytest.mark.parametrize("live", [False, True], ids=["removed", "live"])
def test_pruned_weights_stay_zero_and_portions_count_the_others(live: bool, tmp_path: Path) -> None:
    whole = pruned(live)
    zeros = [layer.weight == 0 for layer in (whole.net[0], whole.net[2])]
    assert [int(z.sum()) for z in zeros] == [48, 20]

    class Look(Callback):
        def __init__(self) -> None:
            self.frozen: list[list[int]] = []

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            callback = next(c for c in trainer.callbacks if isinstance(c, INQCallback))
            self.frozen.append([layer.frozen for layer in callback.layers])
            pl_module.net(X[:1])  # a live pruned layer computes its weight in the forward pass
            for layer, z in zip((pl_module.net[0], pl_module.net[2]), zeros, strict=True):
                assert not layer.weight[z].any()

    look = Look()
    callback = fit(whole, saver(tmp_path), look, enable_checkpointing=True, keep_zeros=True)
    assert look.frozen == [[48 + round(p * 32), 20 + round(p * 20)] for p in SCHEDULE.values()]
    assert names(callback) == [f"{name}_orig" if live else name for name in PLAIN]
    whole.net(X[:1])
    for layer, info, z in zip((whole.net[0], whole.net[2]), callback.layers, zeros, strict=True):
        assert not layer.weight[z].any()
        magnitudes = layer.weight[layer.weight != 0].abs().log2()
        assert torch.equal(magnitudes, magnitudes.round())
        assert bool(((magnitudes >= info.n2) & (magnitudes <= info.n1)).all())
    for step in (3, 6, 9):
        resumed = pruned(live)
        fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt", keep_zeros=True)
        assert_same_state(whole, resumed)


def test_sparsity_of_a_pruned_network_grows_only_by_rounding() -> None:
    module = pruned(live=False)
    module.make = lambda p: optim.SGD(p, lr=0.0)
    fit(module, keep_zeros=True)
    reference = pruned(live=False)
    for ours, theirs in ((module.net[0], reference.net[0]), (module.net[2], reference.net[2])):
        w = theirs.weight.detach()
        assert same_bits(ours.weight.detach(), PowerOfTwoGrid.from_weights(w).quantize(w))


def test_without_keep_zeros_removed_pruning_grows_back() -> None:
    module = pruned(live=False)
    fit(module, schedule={0: 0.1, 3: 1.0})
    assert int((module.net[0].weight == 0).sum()) < 48


def test_without_keep_zeros_live_pruned_weights_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"net\.0\.weight is computed.*prune\.remove.*keep_zeros=True"):
        fit(pruned(live=True))


def test_a_layer_that_is_pruned_completely_stays_zero() -> None:
    net = plain_net()
    prune.l1_unstructured(net[0], "weight", 1.0)
    callback = fit(Module(net), keep_zeros=True)
    assert (callback.layers[0].name, callback.layers[0].n1) == ("net.0.weight_orig", None)
    net(X[:1])
    assert not net[0].weight.any()


# ---- other callbacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2), r"begins at epoch 1 .*swa_epoch_start=5"),
        (lambda: StochasticWeightAveraging(0.01, swa_epoch_start=0.5), "all weights are quantized only from"),
        (lambda: WeightAveraging(), "average the full-precision network first"),
        (lambda: EMAWeightAveraging(), "EMAWeightAveraging saves .* average the full-precision network first"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), r"prune first, make it permanent.*keep_zeros=True"),
    ],
)
def test_callbacks_that_undo_the_quantization_are_refused_with_a_remedy(
    other: Callable[[], Callback], message: str
) -> None:
    for module, place in ((TinyModule(), 0), (Module(plain_net()), 1)):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        callbacks = [INQCallback(schedule=SCHEDULE)]
        callbacks.insert(place, other())
        with pytest.raises(ValueError, match=message):
            trainer(*callbacks).fit(module)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_second_inq_callback_is_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `INQCallback`"):  # Lightning's
        trainer(INQCallback(schedule=SCHEDULE), INQCallback(bits=3))
    run = trainer(INQCallback(schedule=SCHEDULE))
    run.callbacks.append(INQCallback(bits=3))
    with pytest.raises(ValueError, match=r"a Trainer takes one INQCallback.*layer_bits"):
        run.fit(TinyModule())


def averaged(normalized: bool, first: bool, start: int) -> tuple[LightningModule, INQCallback]:
    module = TinyModule() if normalized else Module(plain_net())
    callback, swa = INQCallback(schedule=SCHEDULE), StochasticWeightAveraging(0.01, swa_epoch_start=start)
    trainer(*([swa, callback] if first else [callback, swa]), max_epochs=8).fit(module)
    return module, callback


@pytest.mark.parametrize(("first", "start"), [(False, 5), (True, 5)])
@pytest.mark.parametrize("normalized", [False, True])
def test_weight_averaging_after_the_last_phase_leaves_everything_on_the_grid(
    normalized: bool, first: bool, start: int
) -> None:
    module, callback = averaged(normalized, first, start)
    assert_quantized(module, callback)


@pytest.mark.parametrize("first", [False, True])
def test_weight_averaging_in_the_epoch_of_the_last_phase_is_refused(first: bool) -> None:
    with pytest.raises(ValueError, match=r"begins at epoch 3 .*swa_epoch_start=5"):
        averaged(normalized=False, first=first, start=4)


class Hopeless(TinyModule):
    """Its validation loss gets worse in every epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule([0.5, 0.75, 1.0], [0, 7, 18], "step"), None])
def test_early_stopping_waits_until_everything_is_quantized(schedule: Any) -> None:
    stop, callback = EarlyStopping("val_loss", patience=1), INQCallback(schedule=schedule)
    run = trainer(stop, callback, max_epochs=12, limit_val_batches=1)
    module = Hopeless()
    run.fit(module)
    assert_quantized(module, callback)
    assert run.current_epoch < 12  # it did stop
    assert stop.stopped_epoch > 0


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("resume", [None, 6, 13])
def test_the_best_checkpoint_of_a_run_is_a_fully_quantized_one(top: int, resume: int | None, tmp_path: Path) -> None:
    def best() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=top, filename="{epoch}")

    if resume:
        trainer(
            INQCallback(schedule=SCHEDULE), best(), saver(tmp_path, 1), max_epochs=4, limit_val_batches=1,
            enable_checkpointing=True,
        ).fit(Hopeless())  # fmt: skip
    keep, callback = best(), INQCallback(schedule=SCHEDULE)
    run = trainer(callback, keep, max_epochs=6, limit_val_batches=1, enable_checkpointing=True)
    run.fit(Hopeless(), ckpt_path=tmp_path / f"step={resume}.ckpt" if resume else None)
    paths = [keep.best_model_path, *keep.best_k_models]
    assert len(keep.best_k_models) == top
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["inq"]["quantized_fraction"] == checkpoint["inq"]["network_fraction"] == 1.0
        assert checkpoint["inq"]["fully_quantized"]
        assert checkpoint["epoch"] >= 3


def test_checkpoints_before_completion_say_that_they_are_not_fully_quantized(tmp_path: Path) -> None:
    fit(TinyModule(), saver(tmp_path, 4), enable_checkpointing=True)
    said = [torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["inq"] for step in (4, 8, 12, 16)]
    assert [s["quantized_fraction"] for s in said] == list(SCHEDULE.values())
    assert [s["fully_quantized"] for s in said] == [False, False, False, True]


class Tuned(TinyModule):
    """Has the attributes that the tuners set."""

    def __init__(self, scheduled: bool = False) -> None:
        super().__init__()
        self.lr, self.batch_size, self.scheduled = 1e-4, 2, scheduled

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return ([optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.5)]) if self.scheduled else optimizer

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(loader(64).dataset, batch_size=self.batch_size)


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("first", [False, True], ids=["finder-last", "finder-first"])
def test_the_learning_rate_finder_leaves_inq_alone_and_phases_restart_at_its_rate(first: bool, tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    callback, rates, module = INQCallback(schedule=SCHEDULE), Rates(), Tuned()
    others = [finder, callback] if first else [callback, finder]
    trainer(*others, Witness(callback), rates, default_root_dir=tmp_path).fit(module)
    assert module.lr != 1e-4
    assert finder.optimal_lr.suggestion() == module.lr
    assert rates.rates == [module.lr] * 4
    assert_quantized(module, callback)


@pytest.mark.parametrize("first", [False, True], ids=["finder-last", "finder-first"])
def test_the_batch_size_finder_leaves_inq_alone(first: bool, tmp_path: Path) -> None:
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=2)
    callback, module = INQCallback(schedule=SCHEDULE), Tuned()
    witness = Witness(callback)
    others = [finder, callback] if first else [callback, finder]
    trainer(*others, witness, default_root_dir=tmp_path).fit(module)
    assert module.batch_size == 4
    assert_quantized(module, callback)
    assert witness.fractions[:-1] == [f for f in SCHEDULE.values() for _ in range(16)]


def test_a_changing_accumulation_leaves_the_phases_where_they_are() -> None:
    module, callback = TinyModule(), INQCallback(schedule=SCHEDULE)
    witness = Witness(callback)
    trainer(GradientAccumulationScheduler({0: 2, 2: 4}), callback, witness).fit(module)
    assert witness.fractions[::4] == [*SCHEDULE.values(), 1.0]
    assert_quantized(module, callback)
