from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support import ROOT

sys.path.insert(0, str(ROOT / "examples" / "sweep"))
import sweep


def report(accuracy: float) -> dict[str, object]:
    return {"after": {"test/acc": accuracy}, "bytes_before": 102400, "bytes_after": 16384}


def test_the_objective_is_the_size_where_the_accuracy_suffices() -> None:
    assert sweep.objective(report(sweep.FLOOR)) == 16
    assert sweep.objective(report(1.0)) == 16


def test_below_the_floor_every_network_loses_against_full_precision_the_more_the_worse_it_is() -> None:
    slightly, badly = sweep.objective(report(sweep.FLOOR - 0.001)), sweep.objective(report(0.1))
    assert 100 < slightly < badly
    assert badly == pytest.approx(100 * (1 + sweep.FLOOR - 0.1))


@pytest.mark.slow
def test_optuna_finds_the_smallest_network_above_the_floor(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    short = ["pretrain.max_epochs=4", "inq.schedule.epochs_per_phase=1", "hydra.sweeper.n_trials=4"]
    command = [sys.executable, sweep.__file__, "-m", f"hydra.sweep.dir={tmp_path}", *short]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr

    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("*/report.json")]
    assert len(reports) == 4
    assert best.best_value == pytest.approx(min(sweep.objective(r) for r in reports))
    assert best.best_params.keys() == {"inq.bits", "inq/schedule", "model.lr"}
