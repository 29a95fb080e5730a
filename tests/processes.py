"""Processes that tests start: forked from one that has imported what takes ten seconds to import."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

METHODS = multiprocessing.get_all_start_methods()
CONTEXT: Any = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
# Of other packages only: ours is imported anew in each process. What is not installed is passed over.
CONTEXT.set_forkserver_preload(
    [
        "pytorch_lightning.cli",
        "lightning.pytorch.cli",
        "torch.distributed.tensor.debug",
        "torch.distributed.tensor.parallel",
        "hydra",
        "matplotlib.figure",
        "onnxruntime",
        "onnxscript",
        "rich.console",
        "sklearn.datasets",
        "tensorboard.summary",
        "torch.utils.tensorboard",
        "transformers.trainer",
    ]
)


def process(target: Callable[..., None], *args: Any) -> BaseProcess:
    """A process that will call ``target(*args)``."""
    new: BaseProcess = CONTEXT.Process(target=target, args=args)
    return new


# ---- programs --------------------------------------------------------------------------------------------------------


class Program:
    """A program in a process of its own, with the environment of this one: ``inq-train``, or as Python starts it.

    Args:
        program: Name of a console script, path of a file, or ``-m``, before the name of a module, or ``-c``, before
            the code itself.
        arguments: Its arguments.
        cwd: Where it works.
    """

    def __init__(self, program: str | Path, *arguments: str | Path, cwd: Path) -> None:
        self._command = [str(program), *map(str, arguments)]
        self._output = TemporaryDirectory()
        self.process = process(_become, self._command, cwd, dict(os.environ), Path(self._output.name))
        self.process.start()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGINT)

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait until it ends."""
        try:
            self.process.join(300)
        finally:
            self.process.kill()
            self.process.join()
        said = [Path(self._output.name, name).read_text() for name in ("stdout", "stderr")]
        self._output.cleanup()
        code = self.process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(self._command, code, *said)


def run_program(program: str | Path, *arguments: str | Path, cwd: Path) -> str:
    """What a program prints, which has to end well."""
    done = Program(program, *arguments, cwd=cwd).finish()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _become(command: list[str], cwd: Path, environment: dict[str, str], output: Path) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        with (output / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # A shell that starts the tests in the background makes them, and their children, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program, *sys.argv[1:] = command
    if program in ("-m", "-c"):
        sys.argv[:2] = [program]
        sys.path.insert(0, str(cwd))
    if program == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif program == "-c":
        exec(compile(command[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif Path(program).suffix == ".py":
        sys.argv[0] = program
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        sys.argv[0] = program
        sys.exit(script(program)())


def script(name: str) -> Callable[[], None]:
    """The function of a console script."""
    module, function = _entry_point(name)
    found: Callable[[], None] = getattr(import_module(module), function)
    return found


def write_script(name: str, folder: Path) -> Path:
    """A console script as a file, as an installation writes it."""
    module, function = _entry_point(name)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n")
    path.chmod(0o755)
    return path


def _entry_point(name: str) -> tuple[str, str]:
    """Module and function of a console script, as the checkout has them: what is installed may be older."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    found = re.search(rf'^{name} = "([\w.]+):(\w+)"$', text, re.MULTILINE)
    assert found, name
    return found[1], found[2]


# ---- several at once -------------------------------------------------------------------------------------------------


def launch(processes: int, jobs: Callable[..., None], *args: Any) -> None:
    """Call ``jobs(*args)`` in so many processes at once, with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = CONTEXT.SimpleQueue()
    started = [process(_as_rank, rank, processes, port, errors, jobs, *args) for rank in range(processes)]
    for one in started:
        one.start()
    deadline = time.monotonic() + 240
    while any(p.is_alive() for p in started) and not any(p.exitcode for p in started) and time.monotonic() < deadline:
        connection.wait([p.sentinel for p in started if p.is_alive()], 1)
    failed = [p for p in started if p.exitcode != 0]
    for one in started:
        if failed and one.is_alive():
            one.kill()  # it would wait for the one that failed
        one.join()
    assert not failed, errors.get() if not errors.empty() else "processes failed or did not end in time"


def _as_rank(rank: int, processes: int, port: int, errors: Any, jobs: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",
        }
    try:
        jobs(*args)
    except BaseException:
        errors.put(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
