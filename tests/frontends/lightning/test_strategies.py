"""Several processes, real ones: on the same data they must train what a single process trains, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from strategies_worker import (
    count_collectives,
    fit,
    fit_all,
    fit_in_children,
    resume_with_a_used_callback,
    sgd,
)
from support import SCHEDULE, TESTS, TinyModule, same_bits, trainer
from torch.optim import lr_scheduler

from inq_lightning import INQCallback, PowerOfTwoGrid

NUMELS = {"net.0.weight": 120, "net.3.weight": 15, "net.5.weight": 4}
FRACTIONS = [sum(round(p * n) for n in NUMELS.values()) / sum(NUMELS.values()) for p in SCHEDULE.values()]
MAGNITUDE: dict[str, Any] = {}
RANDOM = {"inq": {"partition": "random", "seed": 4}}


def one_process(folder: Path, **job: Any) -> dict[str, Any]:
    fit(str(folder), **job)
    return results(folder, 1)[0]


def results(folder: Path, processes: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def assert_quantized(result: dict[str, Any]) -> None:
    """Everything is frozen and on its grid, and was looked at after every batch."""
    assert result["fraction"] == result["logged"] == 1.0
    assert {name: numel for name, _, _, _, _, numel, _ in result["layers"]} == NUMELS
    for name, _, bits, n1, _, numel, frozen in result["layers"]:
        assert frozen == numel
        assert set(result["weights"][name].unique().tolist()) <= set(PowerOfTwoGrid(n1, bits).levels.tolist())
    assert result["checks"] == 3 * (len(result["losses"]) - 1)


def assert_same(a: dict[str, Any], b: dict[str, Any], *, losses: bool = True) -> None:
    """Weights, buffers, masks of every epoch, losses of every step: all the same, bit for bit."""
    for kind in ("weights", "buffers"):
        assert a[kind].keys() == b[kind].keys()
        different = [name for name in a[kind] if not same_bits(a[kind][name].float(), b[kind][name].float())]
        assert not different
    assert a["layers"] == b["layers"]
    epochs = min(len(a["masks"]), len(b["masks"]))  # a resumed run saw only the last ones
    assert epochs
    for ours, theirs in zip(a["masks"][-epochs:], b["masks"][-epochs:], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert a["fractions"][-epochs:] == b["fractions"][-epochs:]
    if losses:
        steps = min(len(a["losses"]), len(b["losses"]))
        assert same_bits(a["losses"][-steps:], b["losses"][-steps:])
        assert a["validation"][-epochs:] == b["validation"][-epochs:]


def assert_ranks_train_what_one_process_does(folder: Path, alone: dict[str, Any], processes: int) -> None:
    ranks = results(folder, processes)
    for rank in ranks:
        assert rank["world"] == processes
        assert_quantized(rank)
        assert_same(rank, alone)


def logged(folder: Path) -> list[float]:
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().split()]
    column = header.index("inq/quantized_fraction")
    return [float(row[column]) for row in rows if row[column]]


# ---- DDP -------------------------------------------------------------------------------------------------------------


def test_ddp_trains_what_one_process_does(tmp_path: Path) -> None:
    runs = {
        "magnitude": MAGNITUDE,
        "random": RANDOM | {"gradient_clip_val": 0.1},
    }
    ddp = {"strategy": "ddp", "devices": 2}
    launch(2, fit_all, [{"out": str(tmp_path / name), **ddp, **options} for name, options in runs.items()])
    for name, options in runs.items():
        alone = one_process(tmp_path / f"{name}-alone", **options)
        assert alone["fractions"] == FRACTIONS
        assert_ranks_train_what_one_process_does(tmp_path / name, alone, 2)
        assert logged(tmp_path / name) == pytest.approx(FRACTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [MAGNITUDE, RANDOM], ids=["magnitude", "random"])
def test_three_ddp_processes_train_what_one_does(tmp_path: Path, options: dict[str, Any]) -> None:
    alone = one_process(tmp_path / "alone", net={"copies": 3, "divide_first": True}, **options)
    launch(3, fit_all, [{"out": str(tmp_path / "ddp"), "strategy": "ddp", "devices": 3, **options}])
    assert_ranks_train_what_one_process_does(tmp_path / "ddp", alone, 3)
    assert logged(tmp_path / "ddp") == pytest.approx(FRACTIONS)


def script(*jobs: dict[str, Any]) -> None:
    """Run as users do: Lightning starts the other processes by running the script again."""
    worker = TESTS / "strategies_worker.py"
    subprocess.run([sys.executable, worker, json.dumps(jobs)], check=True, timeout=240, env=os.environ)


@pytest.mark.slow  # each imports Lightning anew; the tests around this one start the same processes as torchrun does
def test_a_script_that_lightning_runs_once_more_for_each_process_trains_the_same(tmp_path: Path) -> None:
    alone = one_process(tmp_path / "alone")
    script({"out": str(tmp_path / "ddp"), "strategy": "ddp", "devices": 2}, {"out": str(tmp_path / "fsdp"), "fsdp": 2})
    assert_ranks_train_what_one_process_does(tmp_path / "ddp", alone, 2)
    assert_ranks_train_what_one_process_does(tmp_path / "fsdp", alone, 2)


def test_processes_with_data_of_their_own_freeze_the_same_weights(tmp_path: Path) -> None:
    strategies = {"ddp": {"strategy": "ddp", "devices": 2}, "fsdp": {"fsdp": 2}}
    jobs = [{"out": str(tmp_path / name), "net": {"own_data": True}, **job} for name, job in strategies.items()]
    launch(2, fit_all, jobs)
    for name in strategies:
        first, second = results(tmp_path / name, 2)
        assert not torch.equal(first["losses"], second["losses"])
        for rank in (first, second):
            assert_quantized(rank)
            assert rank["fractions"] == FRACTIONS
            rank["buffers"] = {}  # running statistics belong to the process
        assert_same(first, second, losses=False)


def test_processes_with_data_of_their_own_agree_on_every_scale_of_activations_and_resume_with_them(
    tmp_path: Path,
) -> None:
    job = {"net": {"own_data": True, "relu": True}, "inq": {"bits": 4, "activation_bits": 4}}
    strategies = {"ddp": {"strategy": "ddp", "devices": 2}, "fsdp": {"fsdp": 2, "whole_file": False}}
    jobs = []
    for name, strategy in strategies.items():
        path = tmp_path / name / ("step=6.ckpt")
        jobs.append({"out": str(tmp_path / name), "save": 6, **job, **strategy})
        jobs.append({"out": str(tmp_path / f"{name}-resumed"), "ckpt_path": str(path), **job, **strategy})
    launch(2, fit_all, jobs)
    for name in strategies:
        first, second = results(tmp_path / name, 2)
        grids = {n: g for n, g in first["buffers"].items() if n.endswith(".grid")}
        assert list(grids) == ["net.0.inq_input.grid", "net.2.inq_activation.grid", "net.4.inq_activation.grid"]
        assert all(-20 < int(grid[0]) < 8 for grid in grids.values())
        resumed = results(tmp_path / f"{name}-resumed", 2)
        for other in (second, *resumed):
            assert all(torch.equal(other["buffers"][n], grid) for n, grid in grids.items())
        for rank, again in zip((first, second), resumed, strict=True):
            assert all(same_bits(again["weights"][n], w) for n, w in rank["weights"].items())


@pytest.mark.parametrize(
    "strategies",
    [
        ["ddp_fork"],
        pytest.param(["ddp_fork", "ddp_spawn"], marks=pytest.mark.slow),  # each that is spawned imports Lightning anew
    ],
)
def test_processes_forked_and_spawned_one_after_the_other_take_the_same_callback(
    tmp_path: Path, strategies: list[str]
) -> None:
    alone = one_process(tmp_path / "alone")
    launch(1, fit_in_children, str(tmp_path), strategies)
    for strategy in strategies:
        assert_ranks_train_what_one_process_does(tmp_path / strategy, alone, 2)
        # Back in the main process: Lightning brings weights and metrics there, but no callback.
        main = torch.load(tmp_path / strategy / "main.pt")
        assert all(same_bits(main["weights"][name], w) for name, w in alone["weights"].items())
        assert main["logged"] == 1.0
        assert main["fraction"] == 0.0
        assert main["layers"] == []


class LocalScheduler(TinyModule):
    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        return [optimizer], [lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]


def test_a_callback_that_has_trained_with_a_local_scheduler_can_be_sent_to_new_processes() -> None:
    callback = INQCallback(schedule=SCHEDULE)
    trainer(callback).fit(LocalScheduler(sgd))
    again = pickle.loads(pickle.dumps(callback))
    assert again.quantized_fraction == 1.0


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def test_fsdp2_trains_what_one_process_does(tmp_path: Path) -> None:
    clipping = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    runs = {"magnitude": MAGNITUDE, "random": RANDOM | clipping}
    launch(2, fit_all, [{"out": str(tmp_path / name), "fsdp": 2, **options} for name, options in runs.items()])
    for name, options in runs.items():
        alone = one_process(tmp_path / f"{name}-alone", **options)
        assert_ranks_train_what_one_process_does(tmp_path / name, alone, 2)
        assert logged(tmp_path / name) == pytest.approx(FRACTIONS)
        shards = [rank["shards"] for rank in results(tmp_path / name, 2)]
        assert [s["net.0.weight"] for s in shards] == [(8, 8), (7, 8)]
        assert [s["net.3.weight"] for s in shards] == [(1, 15), (0, 15)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [MAGNITUDE, RANDOM], ids=["magnitude", "random"])
def test_three_fsdp2_processes_train_what_one_does(tmp_path: Path, options: dict[str, Any]) -> None:
    alone = one_process(tmp_path / "alone", net={"copies": 3}, **options)
    launch(3, fit_all, [{"out": str(tmp_path / "fsdp"), "fsdp": 3, **options}])
    assert_ranks_train_what_one_process_does(tmp_path / "fsdp", alone, 3)
    shards = [rank["shards"] for rank in results(tmp_path / "fsdp", 3)]
    assert [s["net.3.weight"] for s in shards] == [(1, 15), (0, 15), (0, 15)]
    assert [s["net.5.weight"] for s in shards] == [(2, 1), (2, 1), (0, 1)]


def test_clipping_the_norm_under_fsdp2_leaves_frozen_weights_alone(tmp_path: Path) -> None:
    alone = one_process(tmp_path / "alone", gradient_clip_val=0.1)
    launch(2, fit_all, [{"out": str(tmp_path / "fsdp"), "fsdp": 2, "gradient_clip_val": 0.1}])
    first, second = results(tmp_path / "fsdp", 2)
    assert_quantized(first)
    assert_same(first, second)
    # The norm of a sharded gradient is added up in another order.
    assert torch.allclose(first["losses"], alone["losses"], rtol=1e-5)
    assert first["layers"] == alone["layers"]


def test_mixed_precision_trains_what_one_process_does(tmp_path: Path) -> None:
    alone = one_process(tmp_path / "alone", precision="bf16-mixed")
    assert not torch.equal(alone["losses"], one_process(tmp_path / "full")["losses"])
    ddp = {"out": str(tmp_path / "ddp"), "strategy": "ddp", "devices": 2, "precision": "bf16-mixed"}
    launch(2, fit_all, [ddp, {"out": str(tmp_path / "fsdp"), "fsdp": 2, "precision": "bf16-mixed"}])
    for name in ("ddp", "fsdp"):
        assert_ranks_train_what_one_process_does(tmp_path / name, alone, 2)


@pytest.mark.slow
def test_fsdp2_within_tensor_parallelism_freezes_what_one_process_does(tmp_path: Path) -> None:
    runs = {"magnitude": MAGNITUDE, "random": RANDOM}
    square = {"fsdp": 2, "tensor_parallel": 2}
    launch(4, fit_all, [{"out": str(tmp_path / name), **square, **options} for name, options in runs.items()])
    for name, options in runs.items():
        alone = one_process(tmp_path / f"{name}-alone", tensor_parallel=1, **options)
        for rank in results(tmp_path / name, 4):
            assert rank["shards"]["net.0.weight"] == (4, 8)
            assert rank["fraction"] == rank["logged"] == 1.0
            assert rank["fractions"] == alone["fractions"]
            # Partial products are added up in another order, so free weights may differ by a rounding.
            for weight in ("net.0.weight", "net.3.weight"):
                assert torch.equal(rank["masks"][0][weight], alone["masks"][0][weight])
                assert same_bits(rank["weights"][weight], alone["weights"][weight])
            assert torch.allclose(rank["losses"], alone["losses"], rtol=1e-5)


def test_freezing_sharded_weights_gathers_none_of_them(tmp_path: Path) -> None:
    launch(2, count_collectives, str(tmp_path))
    for rank in results(tmp_path, 2):
        assert_quantized(rank)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


STEPS = (6, 8)  # amid an epoch and at the end of one


@pytest.mark.parametrize("strategy", [{"strategy": "ddp", "devices": 2}, {"fsdp": 2}], ids=["ddp", "fsdp2"])
def test_checkpoints_in_one_file_resume_on_any_number_of_processes(tmp_path: Path, strategy: dict[str, Any]) -> None:
    alone = one_process(tmp_path / "one", save=2)
    jobs: list[dict[str, Any]] = [{"out": str(tmp_path / "two"), "save": 2, **strategy}]
    resumed = {f"{origin}-two-{step}": (origin, step) for origin in ("one", "two") for step in STEPS}
    for name, (origin, step) in resumed.items():
        path = tmp_path / origin / f"step={step}.ckpt"
        jobs.append({"out": str(tmp_path / name), "ckpt_path": str(path), **strategy})
    launch(2, fit_all, jobs)
    for name, (_, step) in resumed.items():
        assert_ranks_train_what_one_process_does(tmp_path / name, alone, 2)
        assert len(results(tmp_path / name, 1)[0]["losses"]) == 16 - step
    for step in STEPS:
        again = one_process(tmp_path / f"two-one-{step}", ckpt_path=str(tmp_path / f"two/step={step}.ckpt"))
        assert_quantized(again)
        assert_same(again, alone)


def sharded(folder: Path, **job: Any) -> dict[str, Any]:
    return {"out": str(folder), "fsdp": 2, "whole_file": False, **job}


def test_fsdp2_checkpoints_in_shards_resume_on_any_number_of_processes(tmp_path: Path) -> None:
    alone, path = one_process(tmp_path / "alone"), tmp_path / "two/step=6.ckpt"
    launch(2, fit_all, [sharded(tmp_path / "two", save=6), sharded(tmp_path / "two-two", ckpt_path=str(path))])
    assert len(list(path.glob("*.distcp"))) == 2
    launch(1, fit_all, [sharded(tmp_path / "two-one", ckpt_path=str(path), fsdp=1)])
    assert_ranks_train_what_one_process_does(tmp_path / "two-two", alone, 2)
    assert_ranks_train_what_one_process_does(tmp_path / "two-one", alone, 1)


@pytest.mark.slow
def test_fsdp2_checkpoints_of_two_processes_resume_on_three(tmp_path: Path) -> None:
    one_process(tmp_path / "alone", save=6)
    alone = one_process(tmp_path / "three", net={"copies": 3}, ckpt_path=str(tmp_path / "alone/step=6.ckpt"))
    launch(2, fit_all, [sharded(tmp_path / "two", save=6), {"out": str(tmp_path / "whole"), "fsdp": 2, "save": 6}])
    jobs = [
        sharded(tmp_path / "two-three", fsdp=3, ckpt_path=str(tmp_path / "two/step=6.ckpt")),
        {"out": str(tmp_path / "whole-three"), "fsdp": 3, "ckpt_path": str(tmp_path / "whole/step=6.ckpt")},
    ]
    launch(3, fit_all, jobs)
    assert_ranks_train_what_one_process_does(tmp_path / "two-three", alone, 3)
    assert_ranks_train_what_one_process_does(tmp_path / "whole-three", alone, 3)


def test_a_callback_that_has_trained_before_does_not_touch_what_fsdp2_loads(tmp_path: Path) -> None:
    runs = []
    for name, whole_file in (("file", True), ("shards", False)):
        first = {"out": str(tmp_path / name), "fsdp": 2, "whole_file": whole_file, "save": 6}
        path = str(tmp_path / name / "step=6.ckpt")
        second = {"out": str(tmp_path / f"{name}-again"), "fsdp": 2, "whole_file": whole_file, "ckpt_path": path}
        runs.append((first, second))
    launch(2, resume_with_a_used_callback, runs)
    alone = one_process(tmp_path / "alone")
    for name in ("file", "shards"):
        assert_ranks_train_what_one_process_does(tmp_path / f"{name}-again", alone, 2)


# ---- refused ---------------------------------------------------------------------------------------------------------


class PretendCUDA(CUDAAccelerator):
    """Lets FSDPStrategy, which Lightning builds on GPUs only, come as far as the callbacks' setup."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cpu")]

    @staticmethod
    def is_available() -> bool:
        return True


def refuse_fsdp() -> None:
    callback = INQCallback(schedule=SCHEDULE)
    strategy = FSDPStrategy(process_group_backend="gloo")
    run = Trainer(accelerator=PretendCUDA(), devices=1, strategy=strategy, callbacks=[callback], logger=False)
    with pytest.raises(ValueError, match=r"FSDPStrategy flattens .* use FSDP2 through ModelParallelStrategy"):
        run.fit(TinyModule())
    assert not callback.layers


def test_the_first_fsdp_is_refused_in_favour_of_the_second() -> None:
    launch(1, refuse_fsdp)  # a process of its own, as the strategy starts a process group


def test_deepspeed_is_refused_by_its_name_and_that_of_its_heirs() -> None:
    # It cannot be built without the deepspeed package, hence a strategy of its name that can.
    namesake = type(DeepSpeedStrategy.__name__, (SingleDeviceStrategy,), {})
    for kind in (namesake, type("Tuned", (namesake,), {})):
        callback = INQCallback(schedule=SCHEDULE)
        run = Trainer(strategy=kind(torch.device("cpu")), callbacks=[callback], max_epochs=4, logger=False)
        with pytest.raises(ValueError, match=rf"{kind.__name__} overwrites .* use ddp, or FSDP2"):
            run.fit(TinyModule())
        assert not callback.layers
