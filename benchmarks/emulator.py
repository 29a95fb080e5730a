"""Builds what `export_c` writes for a RISC-V without multiplication, and runs it in QEMU's user-mode emulation."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "firmware"
COMPILER, EMULATOR = "riscv64-unknown-elf-gcc", "qemu-riscv32"
PACKAGES = "gcc-riscv64-unknown-elf qemu-user"  # Debian's and Ubuntu's names
FLAGS = ("-std=c99", "-ffreestanding", "-nostdlib", "-Wl,--no-warn-rwx-segments", "-fno-tree-loop-distribute-patterns")


@dataclass(frozen=True)
class Machine:
    """An instruction set: what the compiler calls it, and what the emulator's processor has."""

    march: str
    mabi: str
    cpu: str


RV32I = Machine("rv32i", "ilp32", "rv32,m=false")
RV32E = Machine("rv32e", "ilp32e", "rv32,m=false")  # half the registers, which the assembler sees to
RV32EC = Machine("rv32ec", "ilp32e", "rv32,m=false")
RV32IM = Machine("rv32im", "ilp32", "rv32")


def missing() -> str:
    """The Debian packages to install, empty where the tools are there."""
    return "" if shutil.which(COMPILER) and shutil.which(EMULATOR) else PACKAGES


def build(folder: Path, machine: Machine = RV32I, level: str = "-O3", *more: str, rounds: int = 1) -> Path:
    """Compile and link a folder's network with its test vectors; returns the program."""
    program = folder / f"{machine.march}{level}-{rounds}.elf"
    sources = [str(folder / "inq_network.c"), str(SOURCES / "bare.c")]
    machine_flags = [f"-march={machine.march}", f"-mabi={machine.mabi}", level, f"-DROUNDS={rounds}", f"-I{folder}"]
    run([COMPILER, *FLAGS, *machine_flags, *sources, *more, "-o", str(program)])
    return program


def emulate(program: Path, machine: Machine = RV32I, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a program; its exit status is 0 where all logits are equal."""
    command = [EMULATOR, "-cpu", machine.cpu, *options, str(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def stack(program: Path, machine: Machine = RV32I) -> int:
    """Bytes of stack of one prediction."""
    return int(run([EMULATOR, "-cpu", machine.cpu, str(program)]))


def instructions(folder: Path, machine: Machine, level: str, *more: str) -> int:
    """Instructions of one prediction: what a second round over the test vectors adds, by their number."""
    vectors = int(re.search(r"INQ_VECTORS (\d+)", (folder / "inq_vectors.h").read_text())[1])  # type: ignore[index]
    plugin = folder / "count.so"
    run(["gcc", "-shared", "-fPIC", "-O2", str(SOURCES / "count.c"), "-o", str(plugin)])
    counts = []
    for rounds in (1, 2):
        done = emulate(build(folder, machine, level, *more, rounds=rounds), machine, "-plugin", str(plugin))
        if done.returncode:
            raise RuntimeError(f"{folder}: predicts other logits than the network, or ends with {done.returncode}")
        counts.append(int(done.stderr))
    return (counts[1] - counts[0]) // vectors


def flash(folder: Path, machine: Machine, level: str, *more: str) -> int:
    """Bytes of a program that only predicts: code and tables, with some thirty bytes of its start."""
    program = folder / "flash.elf"
    flags = [f"-march={machine.march}", f"-mabi={machine.mabi}", level, f"-I{folder}"]
    sources = [str(folder / "inq_network.c"), str(SOURCES / "use.c")]
    run([COMPILER, *FLAGS, *flags, *sources, *more, "-o", str(program)])
    sizes = re.findall(r"^(\.\S+)\s+(\d+)", run(["riscv64-unknown-elf-size", "-A", str(program)]), re.MULTILINE)
    return sum(int(size) for name, size in sizes if re.match(r"\.(text|s?rodata|s?data)", name))


def run(command: list[str]) -> str:
    """Run a tool; its output.

    Raises:
        RuntimeError: It failed; says how.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
