"""Makes docs/images/tensorboard.png from a run of inq-train: ``python docs/screenshot.py``; needs Chromium."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

IMAGE = Path(__file__).parent / "images" / "tensorboard.png"


def main() -> None:
    """Run the demo into a temporary folder, show it in TensorBoard, photograph that."""
    chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        sys.exit("this script needs chromium or google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        scripts = Path(sys.executable).parent
        subprocess.run([scripts / "inq-train", f"hydra.run.dir={folder}/demo"], check=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [scripts / "tensorboard", "--logdir", "demo", "--port", str(port), "--load_fast=false"]
        board = subprocess.Popen(command, cwd=folder)
        try:
            wait_for(f"http://localhost:{port}/data/runs")
            page = f"http://localhost:{port}/?darkMode=false#scalars&tagFilter=inq%2F&regexInput=quantize&_smoothingWeight=0"
            subprocess.run(
                [
                    chromium,
                    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1500,480"),
                    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                    *("--no-first-run", "--disable-quic", f"--user-data-dir={folder}/browser"),
                    *("--virtual-time-budget=40000", f"--screenshot={IMAGE}", page),
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
