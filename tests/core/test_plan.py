from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from processes import run_program
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from support import SCHEDULE, TinyModule, trainer
from torch import nn
from torch.nn.utils import prune

from inq_lightning import PRESETS, FrozenWeight, INQCallback, Levels, Schedule, select_parameters
from inq_lightning.core.plan import Plan
from inq_lightning.recipes.plan import make_plan
from inq_lightning.report.run import Report
from inq_lightning.report.tables import plan_table


class Recorder(Callback):
    """What the callback has frozen, and in which epoch and step, whenever a phase has begun."""

    def __init__(self, callback: INQCallback) -> None:
        self.callback = callback
        self.epochs: list[int] = []
        self.steps: list[int] = []
        self.frozen: list[list[int]] = []
        self.fractions: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.callback.phase > len(self.frozen):
            self.epochs.append(trainer.current_epoch)
            self.steps.append(trainer.global_step - 1)
            self.frozen.append([layer.frozen for layer in self.callback.layers])
            self.fractions.append(self.callback.quantized_fraction)


def assert_comes_true(plan: Plan, module: LightningModule, callback: INQCallback, **options: Any) -> None:
    """Train; each phase begins when the plan says, and freezes what it says, layer by layer."""
    recorder = Recorder(callback)
    trainer(callback, recorder, **options).fit(module)
    began = recorder.epochs if plan.unit == "epoch" else recorder.steps
    assert [phase.start for phase in plan.phases] == began
    assert [list(counts) for counts in zip(*(layer.counts for layer in plan.layers), strict=True)] == recorder.frozen
    assert [phase.frozen for phase in plan.phases] == [sum(counts) for counts in recorder.frozen]
    assert [phase.fraction for phase in plan.phases] == recorder.fractions
    assert [(x.name, x.shape, x.bits, x.numel) for x in plan.layers] == [
        (x.name, x.shape, x.bits, x.numel) for x in callback.layers
    ]
    report = Report.of(module, callback.layers, {}, {}, 0.0)
    assert (plan.bytes_before, plan.bytes_after) == (report.bytes_before, report.bytes_after)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, 7),
        ({"bits": 3}, 9),
        ({"bits": 2, "layer_bits": {"net.3": 8}}, 10),
        ({"schedule": {1: 0.3, 2: 0.95, 4: 1.0}, "partition": "random"}, 6),
        ({"schedule": "googlenet", "exclude": ["net.0"]}, 5),
    ],
)
def test_training_does_what_the_plan_says(options: dict[str, Any], epochs: int) -> None:
    module, callback = TinyModule(), INQCallback(**options)
    assert_comes_true(callback.plan(module, epochs), module, callback, max_epochs=epochs)


def test_a_schedule_in_steps_comes_true() -> None:
    module, callback = TinyModule(), INQCallback(schedule=Schedule([0.4, 0.7, 1.0], [1, 6, 7], "step"))
    assert_comes_true(callback.plan(module), module, callback, max_epochs=2)


def test_zeros_that_stay_are_counted_as_the_callback_counts_them() -> None:
    module = TinyModule()
    prune.l1_unstructured(module.net[0], "weight", amount=0.37)
    with torch.no_grad():
        module.net[3].weight[0] = 0.0
    callback = INQCallback(4, SCHEDULE, keep_zeros=True)
    plan = callback.plan(module, 4)
    assert [layer.kept for layer in plan.layers] == [round(0.37 * 112), 14]
    assert_comes_true(plan, module, callback)


@given(
    numel=st.integers(1, 200),
    portions=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6, unique=True),
    keep_zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_counts_are_those_of_freezing(numel: int, portions: list[float], keep_zeros: bool, seed: int) -> None:
    module = nn.Linear(numel, 1, bias=False)
    with torch.no_grad():
        module.weight.mul_(torch.rand(1, numel, generator=torch.Generator().manual_seed(seed)) < 0.7)
    schedule = Schedule(sorted({*portions, 1.0}))
    plan = Plan.of(module, select_parameters(module), schedule, keep_zeros)
    weight = FrozenWeight("weight", module.weight.detach().clone())
    if keep_zeros:
        weight.keep_zeros()
    frozen = []
    for portion in schedule.portions:
        weight.freeze(portion)
        frozen.append(weight.frozen)
    assert list(plan.layers[0].counts) == frozen


def test_planning_changes_nothing() -> None:
    module, callback = TinyModule(), INQCallback(keep_zeros=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback.plan(module, 4)
    assert callback.layers == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_without_the_number_of_epochs_the_phases_have_no_start_yet() -> None:
    plan = INQCallback().plan(TinyModule())
    assert [phase.start for phase in plan.phases] == [None] * 4
    assert [phase.portion for phase in plan.phases] == list(PRESETS["resnet18"])


def test_what_stays_in_floating_point_is_listed() -> None:
    plan = INQCallback(exclude=["net.3"]).plan(TinyModule())
    names = ["net.0.bias", "net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"]
    assert [tensor.name for tensor in plan.floating] == names
    assert plan.floating[3].shape == (4, 14)
    assert plan.bytes_before == 4 * (112 + 14 + 14 + 14 + 56 + 4)
    assert plan.bytes_after == 112 * 5 // 8 + 4 * (14 + 14 + 14 + 56 + 4)


def test_a_run_that_is_too_short_is_refused_as_in_training() -> None:
    with pytest.raises(ValueError, match="need at least 4 epochs"):
        INQCallback().plan(TinyModule(), 3)
    with pytest.raises(ValueError, match=r"reaches portion 1\.0 at epoch 8"):
        INQCallback(schedule={0: 0.5, 8: 1.0}).plan(TinyModule(), 8)


def test_a_lazy_layer_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"1\.weight belongs to a lazy layer"):
        INQCallback(exclude=["1"]).plan(module)


def test_the_plan_is_plain_json() -> None:
    plan = INQCallback(schedule=SCHEDULE).plan(TinyModule())
    values = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
    assert values["layers"][0] == {
        "name": "net.0.weight",
        "shape": [14, 8],
        "bits": 5,
        "grid": None,
        "numel": 112,
        "levels": "paper",
        "kept": 0,
        "frozen": [56, 84, 98, 112],
    }
    assert values["phases"][1] == {"portion": 0.75, "start": 1, "frozen": 126, "fraction": 0.75}


def text(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(plan_table(plan))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_table_tells_layers_phases_and_sizes() -> None:
    shown = text(INQCallback(schedule=SCHEDULE, exclude=["net.3"]).plan(TinyModule()))
    for cell in (
        "net.0.weight",
        "14×8",
        "begins at epoch",
        "0.875",
        "net.3.weight",
        "856",
        "478",
        "112 of 168 (66.7%)",
    ):
        assert cell in shown
    assert "zeros that stay" not in shown


def test_the_table_tells_which_levels_each_layer_will_have() -> None:
    own = Levels(True, (0, 2, 3))
    shown = text(INQCallback(3, SCHEDULE, layer_levels={"net.3": own}).plan(TinyModule()))
    assert "levels" in shown
    for name, levels in (("net.0", "dense"), ("net.3", "0, ±1, ±4, ±8")):
        assert any(f"{name}.weight" in line and levels in line for line in shown.splitlines())


# ---- inq-plan --------------------------------------------------------------------------------------------------------


def configured(*overrides: str) -> Plan:
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        return make_plan(compose("train", overrides=["output_dir=.", *overrides]))


def test_the_script_takes_the_keys_of_inq_train_reads_no_data_and_leaves_no_file(tmp_path: Path) -> None:
    overrides = ["model=resnet20", "--json", "data=npz", "inq.bits=4", "inq.schedule.epochs_per_phase=2"]
    plan = json.loads(run_program("inq-plan", *overrides, cwd=tmp_path))
    assert [phase["start"] for phase in plan["phases"]] == [0, 2, 4, 6, 8, 10]
    assert {layer["bits"] for layer in plan["layers"]} == {4}
    assert len(plan["layers"]) == 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "unit", "starts"),
    [
        ([], "epoch", [0, 4, 8, 12]),
        (["trainer.max_epochs=6"], "epoch", [0, 1, 3, 4]),
        (["trainer.max_steps=100"], "step", [0, 25, 50, 75]),
        (["trainer.max_epochs=6", "trainer.max_steps=100"], "epoch", [None] * 4),
        (["trainer.max_epochs=6", "inq.schedule.unit=step"], "step", [None] * 4),
        (["trainer.max_steps=9", "inq.schedule.portions=[0.5,1]", "inq.schedule.starts=[2,5]"], "epoch", [2, 5]),
    ],
)
def test_phases_begin_as_the_length_of_the_run_says(overrides: list[str], unit: str, starts: list[int | None]) -> None:
    plan = configured(*overrides)
    assert (plan.unit, [phase.start for phase in plan.phases]) == (unit, starts)


def test_a_checkpoint_tells_which_zeros_stay(tmp_path: Path) -> None:
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        from hydra.utils import instantiate

        module = instantiate(compose("train", overrides=["output_dir=."]).model, _convert_="all")
    with torch.no_grad():
        module.net.linear.weight[:5] = 0.0
    torch.save(module.state_dict(), tmp_path / "pruned.pt")
    plan = configured(f"ckpt={tmp_path / 'pruned.pt'}", "inq.keep_zeros=true")
    assert plan.layers[-1].kept == module.net.linear.weight.numel() // 2
    assert "zeros that stay" in text(plan)


def test_resuming_is_refused() -> None:
    with pytest.raises(ValueError, match="leave out resume=true"):
        configured("resume=true", "ckpt=x.ckpt")


def test_pretrained_weights_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")  # a download would fail here
    overrides = ["model.net.weights=DEFAULT", "data.num_classes=1000", "data.root=x"]
    plan = configured("model=torchvision", "data=imagefolder", *overrides)
    assert sum(layer.numel for layer in plan.layers) == 11_678_912
