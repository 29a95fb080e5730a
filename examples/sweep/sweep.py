"""Optuna looks for the smallest network whose accuracy is at least FLOOR.

python sweep.py -m ckpt=trained.ckpt
"""

import json
from pathlib import Path

import hydra
from omegaconf import DictConfig

from inq_lightning.recipes import train

FLOOR = 0.97  # lowest test accuracy that will do


def objective(report: dict) -> float:
    """Size in KiB; below FLOOR larger than the full-precision network, the more so the lower the accuracy."""
    missing = FLOOR - report["after"]["test/acc"]
    return (report["bytes_after"] if missing <= 0 else report["bytes_before"] * (1 + missing)) / 1024


@hydra.main(version_base="1.3", config_path=".", config_name="sweep")
def main(cfg: DictConfig) -> float:
    """One trial: what `inq-train` does, and its report in one number."""
    train.main(cfg)
    return objective(json.loads((Path(cfg.output_dir) / "report.json").read_text()))


if __name__ == "__main__":
    main()
