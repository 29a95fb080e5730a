"""`inq-export`: a checkpoint's network as a file for inference.

::

    inq-export quantized.ckpt network.safetensors
    inq-export quantized.ckpt network.onnx
    inq-export quantized.ckpt network.onnx --model my_package.networks:build --input-shape 1,3,32,32
    inq-export quantized.ckpt network.onnx --model my_package:gpt --input-shape 1,64 --input-dtype int64
    inq-export quantized.ckpt network.safetensors --format mxfp4 --exclude net.conv1 --exclude net.fc
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inq_lightning._common import Lazy
from inq_lightning.cli.parser import command_parser
from inq_lightning.formats.registry import FORMATS, Format

if TYPE_CHECKING:
    import torch
    from torch import nn

    from inq_lightning.core.layer import Layer
    from inq_lightning.formats.contents import Contents
else:
    torch = Lazy("torch")  # not for --help

_DESCRIPTION = """\
Writes the quantized network of a checkpoint as a file for inference. The
file's name tells the format: .onnx is ONNX, .safetensors the packed one
unless --format names an accelerator's.

The packed format needs nothing but the checkpoint. The others need the
network itself: inq-train leaves its configuration beside the checkpoint; for
any other checkpoint, say --model and, for ONNX, --input-shape.
"""
_EXAMPLES = (
    "inq-export quantized.ckpt net.safetensors",
    "inq-export quantized.ckpt net.onnx",
    "inq-export quantized.ckpt net.safetensors --format mxfp4 --exclude net.fc",
    "inq-export quantized.safetensors firmware --format c --layout lists",
)


WHOLE = ("c", "integer-onnx")  # of an artifact that holds a network in whole numbers
_OPTIONS = ("entropy_coded", "float_dtype", "model", "input_shape", "input_dtype", "fixed_batch", "activations")


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the checkpoint that the command line names.

    Args:
        arguments: The command line without the program's name; None for the process's own.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.format in WHOLE:
            print(_export_whole(options))
        else:
            print("\n".join(_export(_format(options.out, options.format), options)))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"inq-export: {error}\n")


def _parser() -> argparse.ArgumentParser:
    written = [target for target in FORMATS.values() if target.write]
    parser = command_parser("inq-export", _DESCRIPTION, _EXAMPLES, ("formats", written), "docs/how-to/export.md")
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a Lightning checkpoint, or a file with a state_dict; for whole numbers, an artifact that holds them",
    )
    parser.add_argument("out", type=Path, help="the file to write; for c, the folder")
    names = [*(x.name for x in written), *WHOLE]
    parser.add_argument("--format", choices=names, help="default: what the file's name ends in")
    parser.add_argument("--allow-partial", action="store_true", help="keep weights that are on no grid as they are")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep layers of this name in floating point, * for any characters; can be repeated",
    )
    packed = parser.add_argument_group("packed")
    packed.add_argument("--entropy-coded", action="store_true", help="compress the codes to nearly their entropy")
    packed.add_argument(
        "--float-dtype", choices=["float16", "bfloat16"], help="round all other tensors to this type; lossy"
    )
    others = parser.add_argument_group("other formats")
    others.add_argument("--model", metavar="MODULE:FACTORY", help="what returns the network, called without arguments")
    others.add_argument("--input-shape", metavar="N,N,...", help="of an example input, batch first; for onnx")
    others.add_argument(
        "--input-dtype",
        choices=["float32", "int64", "int32", "uint8", "bool"],
        help="of the example input, such as int64 for token ids: zeros and ones then; for onnx; default: float32",
    )
    others.add_argument("--fixed-batch", action="store_true", help="for onnx: take batches of the example's size only")
    others.add_argument(
        "--activations",
        choices=["float", "int8"],
        help="for onnx: int8 rounds the inputs of linear layers to 8 bits, which is faster; default: float",
    )
    whole = parser.add_argument_group("whole numbers (c: a folder of C without a multiplier; integer-onnx: .onnx)")
    whole.add_argument("--layout", choices=["packed", "lists"], help="for c: the smallest, or the fastest")
    return parser


def _export_whole(options: argparse.Namespace) -> str:
    """Write the network in whole numbers that an artifact holds; returns what there is to tell."""
    from inq_lightning.integer.c import export_c
    from inq_lightning.integer.load import load_integer
    from inq_lightning.integer.onnx import export_integer_onnx

    meant = [name for name in _OPTIONS if getattr(options, name)] + ["exclude"] * bool(options.exclude)
    meant += ["layout"] * bool(options.layout and options.format != "c")
    if meant:
        raise ValueError(f"--{meant[0].replace('_', '-')} has no meaning for --format {options.format}")
    network = load_integer(options.checkpoint)
    if options.format == "c":
        written = export_c(network, options.out, options.layout or "packed")
        return f"{options.out}: tables of {written.table_bytes:,} bytes, a buffer of {written.buffer_bytes:,} bytes"
    if options.out.suffix != ".onnx":
        raise ValueError(f"{options.out}: the name of a file of --format integer-onnx must end in .onnx")
    export_integer_onnx(network, options.out)
    return f"{options.out}: {options.out.stat().st_size:,} bytes"


def _format(out: Path, name: str | None) -> Format:
    """The format that the file's name and ``--format`` agree on.

    Raises:
        ValueError: They do not.
    """
    written = [target for target in FORMATS.values() if target.write]
    fitting = [target for target in written if out.suffix in target.suffixes and name in (None, target.name)]
    if not fitting:
        allowed = dict.fromkeys(suffix for x in written if name in (None, x.name) for suffix in x.suffixes)
        given = f"a file of --format {name}" if name else "a file without --format"
        raise ValueError(f"{out}: the name of {given} must end in {' or '.join(allowed)}")
    return fitting[0]  # packed before those of accelerators


def _export(target: Format, options: argparse.Namespace) -> list[str]:
    """Write the file; returns what there is to tell."""
    from inq_lightning.formats.checkpoint import read_checkpoint
    from inq_lightning.formats.layers import without
    from inq_lightning.formats.tensors import memory, untie

    _check_options(target, options)
    checkpoint = read_checkpoint(options.checkpoint)
    everything = {**checkpoint.state_dict, **checkpoint.extra_state}
    source, layers, shape = (
        (everything, checkpoint.layers, None) if target.of_tensors else _build(checkpoint, everything, options)
    )
    if options.exclude:
        layers = without(source, layers, options.exclude)
    values = {
        "entropy_coded": options.entropy_coded,
        "float_dtype": options.float_dtype and getattr(torch, options.float_dtype),
        "schedule": checkpoint.schedule,
        "inputs": shape and _example(shape, options.input_dtype),
        "fixed_batch": options.fixed_batch,
        "activations": options.activations or "float",
    }
    if "inputs" in target.options and not shape:
        raise ValueError(f"{target.name} needs an example input: say --input-shape, such as 1,3,32,32")
    taken = {name: values[name] for name in target.options}
    assert target.write is not None  # _parser offers no other formats
    told = target.write(source, options.out, layers=layers, allow_partial=options.allow_partial, **taken)
    before, after = memory(untie(checkpoint.state_dict, {})[0].values()), options.out.stat().st_size
    size = f"{options.out}: {after:,} bytes, {before:,} in memory before ({after / max(before, 1):.3f}x)"
    return [size, *told]


def _example(shape: list[int], dtype: str | None) -> torch.Tensor:
    """Normal numbers; where whole ones are asked for, zeros and ones, which every table of embeddings has."""
    generator = torch.Generator().manual_seed(0)
    if dtype in (None, "float32"):
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 2, shape, generator=generator).to(getattr(torch, dtype))


def _check_options(target: Format, options: argparse.Namespace) -> None:
    """Refuse options that the format would ignore."""
    taken = set(target.options) | ({"input_shape", "input_dtype"} if "inputs" in target.options else set())
    taken |= set() if target.of_tensors else {"model"}
    for name in (*_OPTIONS, "layout"):
        if getattr(options, name) and name not in taken:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --format {target.name}")


def _build(
    checkpoint: Contents, everything: dict[str, Any], options: argparse.Namespace
) -> tuple[nn.Module, list[Layer] | None, list[int] | None]:
    """The trained network, the records of its layers under its own names, and the shape of an input if known."""
    from inq_lightning.core.activations import is_saved_activation, saved_activations
    from inq_lightning.formats.tensors import common_prefix

    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the network may be of a module of the user's own, as under python -m
    shape = None
    if options.model:
        model = _call(options.model)
    else:
        model, shape = _from_run(options.checkpoint)
    if options.input_shape:
        try:
            shape = [int(n) for n in options.input_shape.split(",")]
        except ValueError as error:
            raise ValueError(f"--input-shape takes numbers such as 1,3,32,32, got {options.input_shape}") from error
    trained = (name for name in everything if not is_saved_activation(name))
    prefix = common_prefix(trained, model.state_dict())
    state = {name.removeprefix(prefix): value for name, value in everything.items()}
    try:
        with saved_activations(model, state):
            model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the network: {error}") from error
    layers = checkpoint.layers and [replace(x, name=x.name.removeprefix(prefix)) for x in checkpoint.layers]
    return model.eval(), layers, shape


def _call(name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    try:
        model = getattr(import_module(module), factory)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"--model {name}: {error}; give MODULE:FACTORY, such as my_package.networks:build") from error
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"--model {name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _from_run(checkpoint: Path) -> tuple[nn.Module, list[int] | None]:
    """The untrained network that `inq-train` was configured with, and the shape of its input."""
    from hydra.errors import HydraException
    from hydra.utils import instantiate  # the packed format needs neither
    from omegaconf import OmegaConf

    folders = list(checkpoint.resolve().parents)[:2]  # inq-train's checkpoints lie in the run's folder or one below
    configs = [folder / ".hydra" / "config.yaml" for folder in folders]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise ValueError("there is no run of inq-train around the checkpoint to take the network from; say --model")
    cfg: Any = OmegaConf.load(config)
    try:
        model: nn.Module = instantiate(cfg.model, _convert_="all")
    except HydraException as error:
        raise ValueError(f"the model of {config} cannot be built: {error}\nsay --model") from error
    size = cfg.data.get("image_size")
    return model, None if size is None else [1, cfg.data.in_channels, size, size]


if __name__ == "__main__":
    main()
