"""The package is a house with floors: what stands on one is built from those below it."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("errors",),
    ("units", "checks", "memory"),
    ("assets", "engine"),
    ("modelfile",),
    ("measure",),
    ("sizing",),
    ("llama",),
    ("chat",),
    ("server", "compat", "quality", "speed", "calibrate"),
    ("cli",),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Name without the package's, of every module but the package itself and what starts it."""
    found = {}
    for top in ("depthkv_edge", "calibrate"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts[top == "depthkv_edge" :]
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if parts and parts[0] in FLOOR:
                found[".".join(parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("depthkv_edge.") for name in names} & set(known)


def test_nothing_imports_from_above():
    known = modules()
    assert {name.partition(".")[0] for name in known} == set(FLOOR)
    up = []
    for name, path in known.items():
        floor = FLOOR[name.partition(".")[0]]
        for other in imports(path, known):
            top = other.partition(".")[0]
            if FLOOR[top] > floor or (FLOOR[top] == floor and top != name.partition(".")[0]):
                up.append(f"{name} imports {other}")
    assert not up


def test_no_circles():
    """Within a floor too."""
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    assert not graph


def test_one_name_for_one_thing():
    known = modules()
    # a command may have the name of the package that does its work
    names = Counter(name.rpartition(".")[2] for name in known)
    assert {name for name, n in names.items() if n > 1} <= {"calibrate", "chat"}
    nodes = (node for path in known.values() for node in ast.parse(path.read_text()).body)
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert {name for name, n in classes.items() if n > 1} <= {"Llama"}  # the drop-in's has to have it


def test_sizes():
    too_long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > 400}
    assert not too_long
