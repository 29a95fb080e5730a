"""`inq-inspect`: which weights of a file lie on which grid, how they spread over it, and what that saves.

Reads Lightning checkpoints, state_dicts, and all that `inq-export` writes::

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

from inq_lightning._common import atomic, import_extra
from inq_lightning.cli.parser import command_parser
from inq_lightning.formats.registry import FORMATS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DESCRIPTION = """\
Shows which weights of a file lie on which grid, how they spread over it, and
what that saves. Nothing that the file holds is run.
"""
_EXAMPLES = (
    "inq-inspect quantized.ckpt",
    "inq-inspect quantized.ckpt --reference trained.ckpt --plot exponents.png",
    "inq-inspect net.onnx --json",
)
_WIDE = 10_000  # columns of what is no terminal: nothing is folded


def main(arguments: Sequence[str] | None = None) -> None:
    """Inspect the file that the command line names.

    Args:
        arguments: The command line without the program's name; None for the process's own.
    """
    parser = command_parser(
        "inq-inspect",
        _DESCRIPTION,
        _EXAMPLES,
        ("files, told by their content", FORMATS.values()),
        "docs/how-to/export.md",
    )
    parser.add_argument("file", help="a checkpoint, a state_dict, or a file of inq-export")
    parser.add_argument("--reference", metavar="FILE", help="the full-precision checkpoint, for the SNR of each layer")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--plot", metavar="PNG", help="draw the layers' exponents into this file, too")
    options = parser.parse_args(arguments)
    try:
        _inspect(options)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"inq-inspect: {error}\n")


def _inspect(options: argparse.Namespace) -> None:
    from inq_lightning.report.inspection import inspect_file  # not for --help
    from inq_lightning.report.tables import inspection_table

    inspection = inspect_file(options.file, options.reference)
    if options.plot is not None:
        save(inspection.figure(), Path(options.plot))
    if options.json:
        print(json.dumps(inspection.as_dict(), allow_nan=False))
        return
    console = import_extra("rich.console", "train").Console(width=None if sys.stdout.isatty() else _WIDE)
    console.print(inspection_table(inspection))


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name ends in; ``path`` appears only once it is complete."""
    with atomic(path) as partial:
        figure.savefig(partial, format=path.suffix[1:] or "png")


if __name__ == "__main__":
    main()
