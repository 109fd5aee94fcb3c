"""Which way imports run: cli, server -> engine -> models -> formats, and downwards between the rooms of the engine."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrun.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]

# From the top down: a room may import what stands after it, and itself.
HOUSE = ["cli", "server", "engine", "models", "formats"]
ENGINE = [
    "face", "pyinstaller", "quantize", "judging", "embedding", "generation", "text", "sampling", "program", "native",
    "kernels", "simd", "cpu", "arguments", "errors",
]  # fmt: skip
FACE = ("__init__", "model", "figures", "finding", "identity", "conversation", "chat_template", "tokenizer")


def imports_of(path: Path) -> Iterator[str]:
    """The modules of the house that a file imports anywhere in it, for types alone too: "engine.program.runtime"."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if module_path(name) else node.module for name in inside]
        else:
            continue
        yield from (name.removeprefix("qrun.") for name in names if name.startswith("qrun."))


def module_path(name: str) -> Path | None:
    """The file of a module that is called "qrun.engine.model", if there is one."""
    base = ROOT.joinpath(*name.removeprefix("qrun.").split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def is_package(name: str) -> bool:
    path = module_path(name)
    return path is not None and path.name == "__init__.py"


def files() -> list[Path]:
    found = [path for top in HOUSE for path in sorted((ROOT / top).rglob("*.py"))]
    assert len(found) > 100
    return found


def room(name: str) -> str:
    """The room of the engine that a module is in: "program" of "engine.program.runtime"."""
    _, *rest = name.split(".")
    return "face" if not rest or rest[0] in FACE else rest[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    name = name_of(path)
    top = name.split(".")[0]
    for imported in imports_of(path):
        other = imported.split(".")[0]
        assert HOUSE.index(other) >= HOUSE.index(top), f"{name} imports {imported}"
        if top == other == "engine":
            assert ENGINE.index(room(imported)) >= ENGINE.index(room(name)), f"{name} imports {imported}"


def test_no_two_files_import_each_other() -> None:
    """Directly or around corners, within a room as well. The `__init__` of a package, which gathers, is left out."""
    edges: dict[str, set[str]] = {}
    for path in files():
        if path.name != "__init__.py":
            edges[name_of(path)] = {other for other in imports_of(path) if not is_package(other)}
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])


@pytest.mark.parametrize("folder", ["engine/program", "engine/generation", "engine/quantize", "cli"])
def test_the_map_of_a_room_names_its_files(folder: str) -> None:
    """Commands are in `qrun --help`."""
    described = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text("utf-8"))) or ""
    files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    if folder == "cli":
        files -= COMMANDS.keys()
    assert {name for name in files if not re.search(rf"\b{name}\b", described)} == set()
