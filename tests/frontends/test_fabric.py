from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from fabric_worker import train, train_all
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger
from lightning_fabric.strategies import DeepSpeedStrategy, FSDPStrategy
from processes import launch
from support import TinyModule, same_bits
from torch.optim import SGD

from inq_lightning import FabricINQ, Options, Quantizer, select_parameters
from inq_lightning.core.layer import named_weights
from inq_lightning.core.schedule import Length


def results(folder: Path, processes: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["layers"] == b["layers"]
    assert a["fraction"] == b["fraction"] == 1.0
    assert a["moved"] == b["moved"] == 0
    assert a["weights"].keys() == b["weights"].keys()
    assert all(same_bits(a["weights"][name], b["weights"][name]) for name in a["weights"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process ends with."""
    folder = tmp_path_factory.mktemp("alone")
    train(str(folder))
    return results(folder, 1)[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes end with, each with a whole copy and with shards, interrupted in mid-epoch and not."""
    folder = tmp_path_factory.mktemp("pair")
    jobs = []
    for name, options in (("ddp", {"strategy": "ddp"}), ("fsdp", {"fsdp": True})):
        whole, resumed = (f"{folder}/{name}/{run}" for run in ("whole", "resumed"))
        jobs.append({"out": whole, "save_at": 8, "devices": 2, **options})
        jobs.append({"out": resumed, "ckpt": f"{whole}/8", "devices": 2, **options})
    launch(2, train_all, jobs)
    return folder


@pytest.mark.parametrize("run", ["whole", "resumed"])
def test_two_ddp_processes_of_fabric_train_what_one_does(run: str, pair: Path, alone: dict[str, Any]) -> None:
    for rank in results(pair / "ddp" / run, 2):
        assert rank["world"] == 2
        assert_same(rank, alone)


@pytest.mark.parametrize("run", ["whole", "resumed"])
def test_two_processes_that_share_the_weights_train_what_one_does(run: str, pair: Path, alone: dict[str, Any]) -> None:
    for rank in results(pair / "fsdp" / run, 2):
        assert rank["sharded"]
        assert_same(rank, alone)


def test_a_checkpoint_of_two_processes_resumes_in_one(tmp_path: Path, pair: Path, alone: dict[str, Any]) -> None:
    train(str(tmp_path), ckpt=f"{pair}/ddp/whole/8")
    assert_same(results(tmp_path, 1)[0], alone)


def test_fabric_loggers_get_the_fraction_at_each_epoch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    train(str(tmp_path), loggers=logger)
    logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["inq/phase"] for row in rows] == ["1.0", "2.0", "3.0", "4.0"]
    assert [float(row["inq/quantized_fraction"]) for row in rows] == [0.5, 0.75, 0.875, 1.0]


@pytest.mark.parametrize(("strategy", "remedy"), [(FSDPStrategy, "use FSDP2"), (DeepSpeedStrategy, "use ddp")])
def test_strategies_of_fabric_that_cannot_be_exact_are_refused(strategy: type, remedy: str) -> None:
    class Refused:  # neither can be set up without a GPU
        pass

    Refused.strategy = strategy.__new__(strategy)  # type: ignore[attr-defined]
    module = TinyModule()
    with pytest.raises(ValueError, match=f"{strategy.__name__}.*{remedy}"):
        FabricINQ(Refused(), module, SGD(module.parameters()), epochs=4)


def test_a_compiled_module_bears_its_own_names_under_fabric() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    module = TinyModule().net
    net, optimizer = fabric.setup(torch.compile(module, backend="eager"), SGD(module.parameters(), lr=0.1))
    inq = FabricINQ(fabric, net, optimizer, epochs=4)
    inq.advance(0)
    assert [layer.name for layer in inq.layers] == ["0.weight", "3.weight"]


@pytest.mark.parametrize("compiled", [False, True])
def test_names_are_those_of_the_network_that_fabric_has_wrapped(compiled: bool) -> None:
    net = TinyModule().net
    fabric = Fabric(accelerator="cpu", devices=1)
    given = torch.compile(net, backend="eager") if compiled else net
    wrapped, optimizer = fabric.setup(given, SGD(net.parameters(), lr=0.1))
    names = ["0.weight", "3.weight"]
    assert [selected.name for selected in select_parameters(wrapped)] == names
    assert [selected.name for selected in select_parameters(wrapped, exclude=["0"])] == names[1:]
    assert dict(named_weights(wrapped)).keys() == dict(net.named_parameters()).keys()
    quantizer = Quantizer(Options(schedule={0: 1.0}))
    quantizer.configure([optimizer])
    quantizer.attach(wrapped)
    assert [layer.name for layer in quantizer.layers] == names
    assert not quantizer.coverage.left_out
    quantizer.begin(wrapped, Length(epochs=1), lambda unit: 0)
    quantizer.advance(wrapped, 0)
    assert quantizer.moved(wrapped.state_dict()) == {}
    assert quantizer.describes(wrapped)
