"""Makes docs/images/tensorboard-*.png from runs of inq-train: ``python tools/screenshot.py``; needs Chromium."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PAGES = {  # by image: folder of runs, page, size of the window
    "scalars": ("demo", "scalars&tagFilter=inq%2F|acc|loss&regexInput=quantize&_smoothingWeight=0", "1500,1000"),
    "figures": ("demo", "images&regexInput=quantize", "1500,720"),
    "histograms": ("demo", "histograms&regexInput=quantize", "1500,1000"),
    "layout": ("demo", "custom_scalars&regexInput=quantize&_smoothingWeight=0", "1500,1180"),
    "hparams": ("sweep", "hparams", "2300,440"),
}


def main() -> None:
    """Run the demo and a sweep over bits into a temporary folder, show them in TensorBoard, photograph that."""
    chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        sys.exit("this script needs chromium or google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        demo = f"{folder}/demo"
        train(f"hydra.run.dir={demo}")
        sweep = ("-m", "inq.bits=2,3,4,5", f"ckpt={demo}/pretrain/last.ckpt", "inq.schedule.epochs_per_phase=2")
        train(*sweep, f"hydra.sweep.dir={folder}/sweep", "hydra.sweep.subdir=bits${inq.bits}")
        for image, (runs, page, size) in PAGES.items():
            photograph(chromium, Path(folder), runs, page, size, IMAGES / f"tensorboard-{image}.png")


def train(*arguments: str) -> None:
    """Run inq-train."""
    subprocess.run([Path(sys.executable).parent / "inq-train", *arguments], check=True)


def photograph(chromium: str, folder: Path, runs: str, page: str, size: str, image: Path) -> None:
    """Show a folder of runs in TensorBoard and photograph one of its pages."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tensorboard = Path(sys.executable).parent / "tensorboard"
    command = [tensorboard, "--logdir", runs, "--port", str(port), "--load_fast=false"]
    board = subprocess.Popen(command, cwd=folder)
    try:
        wait_for(f"http://localhost:{port}/data/runs")
        subprocess.run(
            [
                chromium,
                *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                *("--no-first-run", "--disable-quic", f"--user-data-dir={folder}/browser"),
                *("--virtual-time-budget=40000", f"--screenshot={image}"),
                f"http://localhost:{port}/?darkMode=false#{page}",
            ],
            check=True,
        )
    finally:
        board.terminate()
        board.wait()


def wait_for(url: str) -> None:
    """Until TensorBoard has read the run."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(url) as reply:
                if b"quantize" in reply.read():
                    return
        except OSError:
            pass
        time.sleep(0.3)
    sys.exit("TensorBoard did not start")


if __name__ == "__main__":
    main()
