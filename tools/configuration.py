"""Makes docs/reference/configuration.md, the tables of every key of inq-train: ``python tools/configuration.py``.

Keys, types and defaults are those of the structured configs and of `conf/`; meanings are those of the docstrings of
what the keys configure: nothing is written twice.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hydra import compose, initialize_config_module
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import inq_lightning.conf
from inq_lightning.recipes.config import TrainConfig, register_training

register_training()

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "configuration.md"
CONF = Path(next(iter(inq_lightning.conf.__path__)))
TYPED = {  # groups whose keys are known, and where they are in the config
    "inq": "inq",
    "inq/schedule": "inq.schedule",
    "model": "model",
    "data": "data",
    "trainer": "trainer",
    "pretrain": "pretrain",
}
FREE = ("logger", "callbacks", "experiment")  # groups whose entries have any name

INTRODUCTION = """\
# Configuration

<!-- Written by tools/configuration.py from the structured configs and docstrings: change those, then run it. -->

The keys of `inq-train` and `inq-plan`, set on the command line: `inq-train inq.bits=4 trainer.max_epochs=20`. A key
of another name or a value of another type is refused. `GROUP=OPTION`, such as `model=resnet20`, sets several keys at
once; where options differ in a default, the others' names stand beside theirs. `null` is no value, `${key}` the value
of another key, `???` one that has to be given.
"""


class Key(NamedTuple):
    """One row of a table."""

    name: str
    type: str
    default: str
    allowed: str
    meaning: str


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The whole page, as Markdown.

    Raises:
        ValueError: A key has no meaning; the message names it.
    """
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        cfg = compose("train")
        parts = [INTRODUCTION, "## The run\n", table(keys("", {"": cfg}, leave_out={*TYPED, *FREE}))]
        chosen = {group: option for entry in defaults() for group, option in entry.items()}
        said = meanings(TrainConfig)
        for group in (*TYPED, *FREE):
            parts += [f"## {group}\n", f"{said[group]}\n" if group in said else ""]
            parts.append(option_list(group, chosen.get(group, "default")))
            if group in TYPED:
                place = TYPED[group]
                nodes = {o: OmegaConf.select(compose("train", [f"{group}={o}"]), place) for o in options(group)}
                parts += tables(place, nodes)
    return "\n".join(part for part in parts if part)


def tables(place: str, nodes: Mapping[str, DictConfig]) -> Iterator[str]:
    """The tables of one place in the config: one for each kind of thing that its options configure."""
    kinds: dict[Any, dict[str, DictConfig]] = {}
    for option, node in nodes.items():
        kinds.setdefault(node.get("_target_"), {})[option] = node
    for target, same in kinds.items():
        nested = {name for name, value in raw(next(iter(same.values()))).items() if is_configured(value)}
        rows = keys(f"{place}.", same, leave_out=nested)
        if rows:
            if len(kinds) > 1:
                yield f"With {', '.join(f'`{option}`' for option in same)} (`{target}`):\n"
            yield table(rows)
        for name in sorted(nested):
            if f"{place}.{name}" not in TYPED.values():
                yield from tables(f"{place}.{name}", {option: node[name] for option, node in same.items()})


def raw(node: DictConfig) -> dict[str, Any]:
    """A node as it is written, references to other keys included."""
    container: dict[str, Any] = OmegaConf.to_container(node, resolve=False)  # type: ignore[assignment]
    return container


def is_configured(value: Any) -> bool:
    """Whether a value stands for an object with keys of its own."""
    return isinstance(value, dict) and "_target_" in value


def keys(prefix: str, nodes: Mapping[str, DictConfig], leave_out: set[str]) -> list[Key]:
    """One row for each key of a config node, given as each option of its group sets it.

    Raises:
        ValueError: A key has no meaning.
    """
    node = next(iter(nodes.values()))
    config, source = OmegaConf.get_type(node), documentation(node)
    typed = dataclasses.is_dataclass(config)
    said = meanings(source) if source else {}
    allowed_types = hints(source) if source else {}
    rows = []
    for name in raw(node):
        if name in leave_out or name.startswith("_"):
            continue
        if not said.get(name):
            raise ValueError(f"{prefix}{name} has no meaning: describe it in the docstring of {source}")
        metadata = config.__dataclass_fields__[name].metadata if typed else {}
        rows.append(
            Key(
                name=prefix + name,
                type=type_name(hints(config)[name] if typed else allowed_types[name]),
                default=default({option: raw(n)[name] for option, n in nodes.items()}),
                allowed=metadata.get("allowed") or allowed(allowed_types.get(name)),
                meaning=said[name],
            )
        )
    return rows


def documentation(node: DictConfig) -> Any:
    """What documents a node's keys: its structured config or what that is derived from, or else what it configures."""
    config = OmegaConf.get_type(node)
    if hasattr(config, "configured"):
        return config.configured
    if dataclasses.is_dataclass(config):
        return config
    target = node.get("_target_")
    return None if target is None else get_object(target)


def meanings(documented: Callable[..., Any]) -> dict[str, str]:
    """What a docstring's section of arguments or attributes says of each, without markup for other tools."""
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n|\n)+)", inspect.getdoc(documented) + "\n", re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", section[1], flags=re.MULTILINE)[1:] if section else []
    found = {}
    for entry in entries:
        name, meaning = entry.split(":", 1)
        meaning = re.sub(r":\w+:`~(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(meaning.split()))
        meaning = re.sub(r":\w+:(`[\w.]+`)", r"\1", meaning).replace("``", "`")
        found[name] = re.sub(r"\bNone\b", "null", meaning)
    return found


def hints(documented: Callable[..., Any]) -> dict[str, Any]:
    """Types of a structured config's fields, or of a constructor's or function's arguments."""
    of = documented.__init__ if inspect.isclass(documented) and not dataclasses.is_dataclass(documented) else documented
    return typing.get_type_hints(of)


def type_name(hint: Any) -> str:
    """A type as users write its values."""
    if hint is Any:
        return "any"
    if hint is type(None):
        return "null"
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(map(type_name, typing.get_args(hint)))
    inner = typing.get_args(hint)
    name = typing.get_origin(hint).__name__ if inner else hint.__name__
    return f"{name}[{', '.join(map(type_name, inner))}]" if inner else name


def allowed(hint: Any) -> str:
    """The values that a type lists; nothing where it lists none."""
    if hint is bool:
        return "`true`, `false`"
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    return ""


def default(values: Mapping[str, Any]) -> str:
    """The default that most options agree on, then those that differ."""
    texts = {option: value_text(value) for option, value in values.items()}
    common = texts.get("default") or Counter(texts.values()).most_common(1)[0][0]
    others = [f"{option}: {text}" for option, text in texts.items() if text != common]
    return "; ".join([common, *others])


def value_text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return f"`{json.dumps(value)}`"
    return "`" + str(value).replace("'", "") + "`"


def table(rows: list[Key]) -> str:
    """Rows as a Markdown table."""
    lines = ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    lines += [f"| `{k.name}` | {k.type} | {k.default} | {k.allowed} | {k.meaning} |".replace("  ", " ") for k in rows]
    return "\n".join(lines) + "\n"


def option_list(group: str, chosen: str | None) -> str:
    """The files of a group, each with the comment that it begins with."""
    lines = []
    for option in options(group):
        first = (CONF / group / f"{option}.yaml").read_text().splitlines()[0:2]
        comments = [line.removeprefix("# ") for line in first if line.startswith("# ") and "@package" not in line]
        comment = f": {comments[0].replace('<', '&lt;')}" if comments else ""
        lines.append(f"- `{group}={option}`{' (default)' if option == chosen else ''}{comment}")
    return "\n".join(lines) + "\n"


def options(group: str) -> list[str]:
    """Names of a group's files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def defaults() -> list[dict[str, str | None]]:
    """The groups and options that train.yaml names."""
    entries = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml"))["defaults"]  # type: ignore[index, call-overload]
    return [entry for entry in entries if isinstance(entry, dict)]


if __name__ == "__main__":
    main()
