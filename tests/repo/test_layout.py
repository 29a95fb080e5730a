"""Which file of the package imports which, read from the sources: nothing here imports the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from support import ROOT

PACKAGE = ROOT / "inq_lightning"
# From the ground up: a file imports from its own folder and from the tiers below it. Folders of one tier stay apart.
TIERS = (
    ("_version.py", "_common.py"),
    ("kernels", "grid"),
    ("core",),
    ("formats",),
    ("runtime", "report", "closed_form", "integer"),
    ("frontends",),
    ("recipes", "cli"),
    ("__init__.py",),  # the public face, which nothing imports
)
RANKS = {part: rank for rank, tier in enumerate(TIERS) for part in tier}


def modules(node: ast.AST) -> Iterator[str]:
    """The modules that a statement imports, one that is called by its name (`import_module`) included."""
    match node:
        case ast.Import(names=names):
            yield from (name.name for name in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            for name in names:
                child = f"{module}.{name.name}"
                yield child if file_of(child) else module
        case ast.ImportFrom():
            raise AssertionError(f"line {node.lineno}: import by the full name")
        case ast.Call(func=ast.Name(id=function), args=[ast.Constant(value=str(name)), *_]):
            if function in ("import_module", "import_extra", "Lazy", "LazyExtra"):
                yield name


def file_of(module: str) -> str | None:
    """The file of one of our modules, relative to the package."""
    top, *parts = module.split(".")
    if top != PACKAGE.name:
        return None
    path = PACKAGE.joinpath(*parts)
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return found.relative_to(PACKAGE).as_posix() if found.is_file() else None


def imports(path: Path) -> set[str]:
    return {module for node in ast.walk(ast.parse(path.read_text())) for module in modules(node)}


def graph() -> dict[str, set[str]]:
    """For each file of the package, the files that it imports; the face imports all, where they are used."""
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    del files["__init__.py"]
    return {name: {found for m in imports(path) if (found := file_of(m))} for name, path in files.items()}


def points_down(source: str, target: str) -> bool:
    above, below = (Path(name).parts[0] for name in (source, target))
    return above == below or RANKS[above] > RANKS[below]


def wrong_arrows() -> set[str]:
    arrows = {(source, target) for source, targets in graph().items() for target in targets}
    assert len(arrows) > 50
    return {f"{source} → {target}" for source, target in arrows if not points_down(source, target)}


def needed_by_the_core() -> set[str]:
    """What grids, kernels and the core import beside torch and what comes with it."""
    torch_only = sys.stdlib_module_names | {PACKAGE.name, "torch", "numpy", "typing_extensions", "triton"}
    files = [path for folder in ("grid", "kernels", "core") for path in (PACKAGE / folder).rglob("*.py")]
    assert len(files) > 10
    packages = {(p.relative_to(PACKAGE).as_posix(), module.split(".")[0]) for p in files for module in imports(p)}
    return {f"{name} → {package}" for name, package in packages if package not in torch_only}


def test_imports_point_down_and_the_core_needs_torch_only() -> None:
    wrong = wrong_arrows() | needed_by_the_core()
    assert not wrong, "\n".join(sorted(wrong))


def test_no_imports_go_round_in_a_circle() -> None:
    TopologicalSorter(graph()).prepare()  # raises CycleError, which names them
