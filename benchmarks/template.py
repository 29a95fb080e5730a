"""Pages of the docs whose figures are measured: texts are Markdown, with names in ``{{ }}`` where figures go."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined


def fill(template: Path, **figures: object) -> str:
    """The text of a template with its names filled in; a name that is not among the figures is an error."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template.read_text()).render(figures)
