"""The house: rooms import in one direction, nothing imports in a circle, no room is overfull."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sa_patch"
# Each room may import itself and the rooms below it.
ROOMS = (
    *("cli", "report", "sweep", "benchmark", "evaluation", "training", "analysis"),
    *("models", "patching", "kernels", "patterns", "figures", "files", "errors"),
)
MOST_FILES = 16


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if "_data" not in path.parts}


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found - {module_name(path)}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def room(module: str) -> str | None:
    """The room of a module; None for the root, whose names lead everywhere."""
    return module.split(".")[1] if "." in module else None


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ROOMS])
def test_rooms_import_downwards(name: str) -> None:
    here = ROOMS.index(room(name) or "")
    above = {other for other in IMPORTS[name] if room(other) in ROOMS[:here]}
    assert not above, f"{name} imports from rooms above its own: {sorted(above)}"


def test_every_module_has_a_room() -> None:
    loose = {name for name in MODULES if room(name) not in (*ROOMS, "__main__", None)}
    assert not loose


def test_no_circle() -> None:
    # The root imports on first use only.
    graph = {name: {other for other in IMPORTS[name] if room(other)} for name in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import in a circle: {' -> '.join(error.args[1])}")


def test_no_room_is_overfull() -> None:
    files = Counter(path.parent for path in MODULES.values())
    assert {str(place): count for place, count in files.items() if count > MOST_FILES} == {}
