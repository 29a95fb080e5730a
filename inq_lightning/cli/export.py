"""`inq-export`: a checkpoint's network as a file for inference.

::

    inq-export quantized.ckpt network.safetensors
    inq-export quantized.ckpt network.onnx --format onnx
    inq-export quantized.ckpt network.onnx --format onnx --model my_package.networks:build --input-shape 1,3,32,32
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inq_lightning.formats.accelerator import FORMATS, save_accelerator
from inq_lightning.formats.checkpoint import Checkpoint, LayerRecord, read_checkpoint
from inq_lightning.formats.onnx import export_onnx
from inq_lightning.formats.packed import common_prefix, save_state_dict

_DESCRIPTION = """
Writes the quantized network of a checkpoint as a file for inference.

The packed format needs nothing but the checkpoint. The others need the network itself: inq-train leaves its
configuration beside the checkpoint; for any other checkpoint, say --model and, for ONNX, --input-shape.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the checkpoint that the command line names.

    Args:
        arguments: The command line without the program's name; None for the process's own.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check_options(options)
        checkpoint = read_checkpoint(options.checkpoint)
        print(_export_packed(checkpoint, options) if options.format == "packed" else _export_model(checkpoint, options))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"inq-export: {error}\n")


def _parser() -> argparse.ArgumentParser:
    formats = ["packed", "onnx", *FORMATS]
    parser = argparse.ArgumentParser(
        "inq-export", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a Lightning checkpoint, or a file with a state_dict")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--format", choices=formats, default="packed", help="default: packed, b bits a weight")
    parser.add_argument("--allow-partial", action="store_true", help="keep weights that are on no grid as they are")
    packed = parser.add_argument_group("packed")
    packed.add_argument("--entropy-coded", action="store_true", help="compress the codes to nearly their entropy")
    packed.add_argument(
        "--float-dtype", choices=["float16", "bfloat16"], help="round all other tensors to this type; lossy"
    )
    others = parser.add_argument_group("other formats")
    others.add_argument("--model", metavar="MODULE:FACTORY", help="what returns the network, called without arguments")
    others.add_argument("--input-shape", metavar="N,N,...", help="of an example input, batch first; for onnx")
    others.add_argument("--speed", action="store_true", help="for onnx: faster linear layers, activations in 8 bits")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that the format would ignore."""
    given = {"packed": ("entropy_coded", "float_dtype"), "onnx": ("input_shape", "speed")}
    wrong = [name for kind, names in given.items() if kind != options.format for name in names]
    wrong += ["model"] if options.format == "packed" else []
    for name in wrong:
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --format {options.format}")


def _export_packed(checkpoint: Checkpoint, options: argparse.Namespace) -> str:
    saved = save_state_dict(
        checkpoint.state_dict,
        options.out,
        layers=checkpoint.layers,
        allow_partial=options.allow_partial,
        float_dtype=getattr(torch, options.float_dtype) if options.float_dtype else None,
        entropy_coded=options.entropy_coded,
        schedule=checkpoint.schedule,
    )
    lines = [
        _sizes(saved.bytes_before, options.out),
        f"{saved.weights:,} quantized weights at {saved.bits_per_weight:.2f} bits, exponents and metadata included",
    ]
    if options.float_dtype:
        lines.append(f"largest error of other tensors in {options.float_dtype}: {saved.float_error:.3g}")
    if saved.off_grid:
        lines.append(f"not quantized: {', '.join(saved.off_grid)}")
    return "\n".join(lines)


def _export_model(checkpoint: Checkpoint, options: argparse.Namespace) -> str:
    model, layers, shape = _build(checkpoint, options)
    before = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    partial = options.allow_partial
    if options.format != "onnx":
        save_accelerator(model, options.out, options.format, layers=layers, allow_partial=partial)
        return _sizes(before, options.out)
    if shape is None:
        raise ValueError("ONNX needs an example input: say --input-shape, such as 1,3,32,32")
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    difference = export_onnx(model, options.out, inputs, layers=layers, allow_partial=partial, speed=options.speed)
    return f"{_sizes(before, options.out)}\nlargest difference of an output to torch: {difference:.3g}"


def _build(
    checkpoint: Checkpoint, options: argparse.Namespace
) -> tuple[nn.Module, list[LayerRecord] | None, list[int] | None]:
    """The trained network, the records of its layers under its own names, and the shape of an input if known."""
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
    prefix = common_prefix(checkpoint.state_dict, model.state_dict())
    try:
        model.load_state_dict({name.removeprefix(prefix): value for name, value in checkpoint.state_dict.items()})
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the network: {error}") from error
    layers = checkpoint.layers and [x._replace(name=x.name.removeprefix(prefix)) for x in checkpoint.layers]
    return model.eval(), layers, shape


def _call(name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    try:
        model = getattr(import_module(module), factory)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"--model {name}: {error}; give MODULE:FACTORY, such as my_package.networks:build") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _from_run(checkpoint: Path) -> tuple[nn.Module, list[int] | None]:
    """The untrained network that `inq-train` was configured with, and the shape of its input."""
    from hydra.utils import instantiate  # the packed format needs neither
    from omegaconf import OmegaConf

    folders = list(checkpoint.resolve().parents)[:2]  # inq-train's checkpoints lie in the run's folder or one below
    configs = [folder / ".hydra" / "config.yaml" for folder in folders]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise ValueError("there is no run of inq-train around the checkpoint to take the network from; say --model")
    cfg: Any = OmegaConf.load(config)
    model: nn.Module = instantiate(cfg.model, _convert_="all")
    size = cfg.data.get("image_size")
    return model, None if size is None else [1, cfg.data.in_channels, size, size]


def _sizes(before: int, out: Path) -> str:
    after = out.stat().st_size
    return f"{out}: {after:,} bytes, {before:,} in memory before ({after / max(before, 1):.3f}x)"


if __name__ == "__main__":
    main()
