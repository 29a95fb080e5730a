"""All formats of files, in one table: what `inq-export` writes and `inq-inspect` opens.

Nothing heavy is imported before a format is used, for the commands' ``--help`` lists them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inq_lightning._common import Lazy
from inq_lightning.core.coverage import group_names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inq_lightning.formats.contents import Contents

accelerator = Lazy("inq_lightning.formats.accelerator")
checkpoint = Lazy("inq_lightning.formats.checkpoint")
onnx = Lazy("inq_lightning.formats.onnx")
packed = Lazy("inq_lightning.formats.packed")
tensors = Lazy("inq_lightning.formats.tensors")


class Format(NamedTuple):
    """One format.

    Attributes:
        name: What ``--format`` calls it.
        about: What it is, in a line.
        suffixes: What names of such files end in.
        recognizes: Whether a file with this head, see :func:`~inq_lightning.formats.tensors.read_head`, is one.
        read: Reads one.
        write: Writes a network, or its state_dict where ``of_tensors`` says so, to a path, with the keywords
            ``layers``, ``allow_partial`` and those of ``options``; returns what is worth telling, in lines. None for
            what is only read.
        of_tensors: Whether a state_dict is enough to write it.
        options: The keywords that it takes besides.
    """

    name: str
    about: str
    suffixes: tuple[str, ...]
    recognizes: Callable[[bytes], bool]
    read: Callable[[Path], Contents]
    write: Callable[..., list[str]] | None = None
    of_tensors: bool = False
    options: tuple[str, ...] = ()


def _write_packed(source: nn.Module | Mapping[str, Tensor], path: Path, **options: Any) -> list[str]:
    saved, narrow = packed.save_packed(source, path, **options), options["float_dtype"]
    lines = [
        f"{saved.weights:,} quantized weights at {saved.bits_per_weight:.2f} bits, exponents and metadata included"
    ]
    if narrow is not None:
        lines.append(f"largest error of other tensors in {tensors.dtype_name(narrow)}: {saved.float_error:.3g}")
    if saved.off_grid:
        lines.append(f"not quantized: {', '.join(group_names(saved.off_grid))}")
    return lines


def _write_onnx(model: nn.Module, path: Path, **options: Any) -> list[str]:
    difference = onnx.export_onnx(model, path, **options)
    return [f"largest difference of an output to torch: {difference:.3g}"]


def _write_accelerator(name: str, model: nn.Module, path: Path, **options: Any) -> list[str]:
    accelerator.save_accelerator(model, path, name, **options)
    return []


#: Accelerators' number formats, and bits a weight.
ACCELERATORS = {"mxfp4": 4.25, "mxfp6": 6.25, "fp8": 8, "int8": 8}

#: Every format by its name; what recognizes a file first reads it.
FORMATS = {
    target.name: target
    for target in (
        Format(
            name="packed",
            about="b bits a weight, for load_packed",
            suffixes=(".safetensors",),
            recognizes=lambda head: packed.recognizes(head),
            read=lambda path: packed.read_packed(path),
            write=_write_packed,
            of_tensors=True,
            options=("entropy_coded", "float_dtype", "schedule"),
        ),
        Format(
            name="onnx",
            about="codes in the smallest type, for ONNX Runtime",
            suffixes=(".onnx",),
            recognizes=lambda head: onnx.recognizes(head),
            read=lambda path: onnx.read_onnx(path),
            write=_write_onnx,
            options=("inputs", "activations", "fixed_batch"),
        ),
        *(
            Format(
                name=name,
                about=f"{bits:g} bits a weight, for hardware that computes in {name}",
                suffixes=(".safetensors",),
                recognizes=lambda head: accelerator.recognizes(head),
                read=lambda path: accelerator.read(path),
                write=partial(_write_accelerator, name),
            )
            for name, bits in ACCELERATORS.items()
        ),
        Format(
            name="checkpoint",
            about="a checkpoint of Lightning, or a state_dict, of torch.save or safetensors",
            suffixes=(".ckpt", ".pt", ".pth", ".safetensors"),
            recognizes=lambda head: checkpoint.recognizes(head),
            read=lambda path: checkpoint.read_checkpoint(path),
        ),
    )
}


def read_file(path: str | os.PathLike[str]) -> Contents:
    """Read a file of any format. What it is, its content tells, not its name; nothing in it is run.

    Raises:
        ValueError: The file is of no known format, or is damaged; the message begins with its path.
        OSError: There is no such file.
        ImportError: Reading it takes an extra that is not installed.
    """
    head = tensors.read_head(path)
    target = next((target for target in FORMATS.values() if target.recognizes(head)), None)
    if target is None:
        written = ", ".join(target.name for target in FORMATS.values() if target.write)
        raise ValueError(f"{path} is neither a checkpoint nor a state_dict, nor a file of inq-export ({written})")
    try:
        return target.read(Path(path))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
