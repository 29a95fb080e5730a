"""`inq-inspect`: which weights of a file lie on which grid, how they spread over it, and what that saves.

Reads Lightning checkpoints, state_dicts, packed artifacts and the ONNX files of `inq-export`::

    inq-inspect quantized.ckpt
    inq-inspect quantized.ckpt --reference pretrained.ckpt --plot exponents.png
    inq-inspect network.safetensors --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inq_lightning._common import import_extra
from inq_lightning.report.readers import inspect_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDE = 10_000  # columns of what is no terminal: nothing is folded


def main(arguments: Sequence[str] | None = None) -> None:
    """Inspect the file that the command line names.

    Args:
        arguments: The command line without the program's name; None for the process's own.
    """
    parser = argparse.ArgumentParser("inq-inspect", description="Which weights of a file lie on which grid.")
    parser.add_argument("file", help="a Lightning checkpoint, a state_dict, a packed artifact or an ONNX file")
    parser.add_argument("--reference", metavar="FILE", help="the full-precision checkpoint, for the SNR of each layer")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--plot", metavar="PNG", help="draw the layers' exponents into this file, too")
    options = parser.parse_args(arguments)
    try:
        inspection = inspect_file(options.file, options.reference)
        if options.plot is not None:
            save(inspection.figure(), Path(options.plot))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"inq-inspect: {error}\n")
    if options.json:
        print(json.dumps(inspection.as_dict(), allow_nan=False))
        return
    console = import_extra("rich.console", "train").Console(width=None if sys.stdout.isatty() else _WIDE)
    console.print(inspection.table())


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name ends in; ``path`` appears only once it is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format=path.suffix[1:] or "png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
