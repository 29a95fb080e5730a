"""Optuna looks for the smallest network whose accuracy is at least `floor`.

python sweep.py -m ckpt=trained.ckpt
"""

import json
from pathlib import Path

import hydra
from omegaconf import DictConfig

from inq_lightning.cli import train


def objective(report: dict, floor: float) -> float:
    """Size in KiB; below the floor more than that of the full-precision network, and the more the lower the accuracy."""
    missing = floor - report["after"]["test/acc"]
    return (report["bytes_after"] if missing <= 0 else report["bytes_before"] * (1 + missing)) / 1024


@hydra.main(version_base="1.3", config_path=".", config_name="sweep")
def main(cfg: DictConfig) -> float:
    """One trial: what `inq-train` does, and its report in one number."""
    train.main(cfg)
    return objective(json.loads((Path(cfg.output_dir) / "report.json").read_text()), cfg.floor)


if __name__ == "__main__":
    main()
