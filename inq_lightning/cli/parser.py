"""The command line of both tools: what they are for, their options, examples, formats, and where the docs are."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from inq_lightning._version import __version__
from inq_lightning.formats.registry import Format


def command_parser(
    program: str, description: str, examples: Sequence[str], formats: tuple[str, Iterable[Format]], docs: str
) -> argparse.ArgumentParser:
    """A parser without options of its own but ``--version``.

    Args:
        program: Name of the command.
        description: What it is for.
        examples: Lines of a shell.
        formats: A title, and the formats to list under it.
        docs: The page about it, a path in the repository.
    """
    title, listed = formats
    parts = [
        "examples:",
        *(f"  {line}" for line in examples),
        f"\n{title}:",
        *(f"  {x.name:<11}{x.about} ({', '.join(x.suffixes)})" for x in listed),
        f"\ndocumentation: {docs} in the repository",
    ]
    parser = argparse.ArgumentParser(
        program,
        description=description,
        epilog="\n".join(parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    return parser
