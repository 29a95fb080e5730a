"""Turns the Sphinx roles of the docstrings into links of the site; mkdocs.yml names this file."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod):`(?:(?P<title>[^`<]+?)\s*<)?(?P<short>~?)(?P<target>[\w.]+)>?`")
ALIASES = {"inq_lightning.INQCallback": "inq_lightning.frontends.lightning.callback.INQCallback"}


class SphinxRoles(griffe.Extension):
    """``:class:`~package.module.Name``` becomes a link; a name that the site does not document stays code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda match: link(match, obj), obj.docstring.value)


def link(match: re.Match[str], obj: griffe.Object) -> str:
    """The HTML for one role found in the docstring of ``obj``."""
    target = match["target"]
    text = match["title"] or (target.rpartition(".")[2] if match["short"] else target)
    if not target.startswith("inq_lightning."):  # a name of the same class or module
        first = target.partition(".")[0]
        scope = next((s for s in (obj, obj.parent, obj.module) if s is not None and first in s.members), None)
        if scope is None:
            return f"`{text}`"
        target = f"{scope.path}.{target}"
    return f'<autoref identifier="{ALIASES.get(target, target)}" optional><code>{text}</code></autoref>'
