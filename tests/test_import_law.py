"""Who may know whom inside the package, how large its parts may be, and what `import slm` loads."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import slm

ROOT = Path(slm.__file__).parent

BASE = frozenset({"common", "endpoints", "errors", "protocol", "schemas"})

# A room, and the rooms of the package that its modules may import beside their own.
LAW: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "common": frozenset({"errors"}),
    "endpoints": frozenset({"common"}),
    "protocol": BASE,
    "schemas": BASE,
    "client": BASE,
    "llm": BASE | {"client"},
    "server": BASE,
    "cli": BASE | {"client", "llm", "server", "slm"},
    "slm": BASE | {"client", "llm"},
    "testing": BASE | {"client"},
    "__main__": frozenset({"cli"}),
}

SERVER_PARTS = {
    "fastapi",
    "starlette",
    "uvicorn",
    "websockets",
    "httptools",
    "sqlalchemy",
    "alembic",
    "psycopg",
    "pydantic_settings",
    "prometheus_client",
    "typer",
    "rich",
}
PROVIDER_PARTS = {"openai", "anthropic", "ollama", "httpx", "httpx2"}


def rooms_of(source: str, module: str, *, package: bool) -> Iterator[str]:
    """Yield the room of every import of `slm` in the source, at whatever depth it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if package else 0)]
                start = ".".join([*parts, start]).rstrip(".")
            # `from slm import client` names a room as well as `import slm.client` does.
            # Its version is nobody's room.
            names = [f"{start}.{a.name}" for a in node.names if a.name != "__version__"]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "slm":
                known = len(parts) > 1 and parts[1] in LAW
                yield parts[1] if known else "slm"


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("slm", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """Return the room a module lives in; the package's own `__init__` is the room `slm`."""
    return module.split(".")[1] if "." in module else "slm"


@pytest.mark.parametrize("module", modules())
def test_each_module_imports_only_what_its_room_may_know(module: str) -> None:
    """Client and server never meet, the base knows nobody, only the command line sees all."""
    path = modules()[module]
    mine = room(module)
    assert mine in LAW, f"{module} lives in a room that the law does not name"
    package = path.name == "__init__.py"
    used = set(rooms_of(path.read_text(), module, package=package))
    assert used <= LAW[mine] | {mine}, f"{module} may not import {used - LAW[mine] - {mine}}"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import slm.server.app", {"server"}),
        ("from slm.server import app", {"server"}),
        ("from slm import server, errors", {"server", "errors"}),
        ("from slm import SLMClient", {"slm"}),
        ("from ..server import app", {"server"}),
        ("from .. import server", {"server"}),
        ("from . import cache", {"client"}),
        ("def f():\n    if True:\n        from slm.server.app import create_app", {"server"}),
        ("import importlib\nimportlib.import_module('slm.server.app')", {"server"}),
        ("from slmx import server\nimport json", set()),
    ],
)
def test_the_law_sees_every_form_of_import(source: str, rooms: set[str]) -> None:
    """An import in a function, a relative one or one by name counts like any other."""
    assert set(rooms_of(source, "slm.client.stream", package=False)) == rooms


# --- the floors of CONTRIBUTING.md ---

PROJECT = Path(__file__).parents[1]


def floors_of(room: str, document: str) -> dict[str, int]:
    """Return the floor of each name in the picture of a room; the ground is 0."""
    found = re.search(rf"^```text {room}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    assert found, f"CONTRIBUTING.md has no picture of {room}"
    lines = [re.split(r" {2,}", line)[0].split(", ") for line in found[1].splitlines()]
    return {name: floor for floor, names in enumerate(reversed(lines)) for name in names}


def uses_of(source: str, room: str, module: str, *, package: bool) -> Iterator[tuple[str, int]]:
    """Yield what the source imports from its own room, by its first name there, and the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if package else 0)]
                start = ".".join([*parts, start]).rstrip(".")
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[:2] == ["slm", room] and len(parts) > 2:
                yield parts[2], node.lineno


def breaks(room: str, floors: dict[str, int], module: str, path: Path) -> list[str]:
    """Return a sentence for each import that goes up, or across, on the floors of a room."""
    mine = module.split(".")[2]
    found = []
    uses = uses_of(path.read_text(), room, module, package=path.name == "__init__.py")
    for name, line in uses:
        if name != mine and name in floors and floors[name] >= floors[mine]:
            found.append(
                f"{path.relative_to(ROOT)}:{line} ({mine}, floor {floors[mine]}) imports"
                f" slm.{room}.{name} (floor {floors[name]}): only what stands below may be imported"
            )
    return found


@pytest.mark.parametrize("room", ["server", "client", "cli"])
def test_imports_go_down_the_floors_of_a_room(room: str) -> None:
    """No import goes up or across in the pictures of CONTRIBUTING.md, which name every part."""
    floors = floors_of(room, (PROJECT / "CONTRIBUTING.md").read_text())
    inside = {m: p for m, p in modules().items() if m.startswith(f"slm.{room}.")}
    assert {module.split(".")[2] for module in inside} == set(floors)
    wrong = [each for m, p in inside.items() for each in breaks(room, floors, m, p)]
    assert not wrong, "\n".join(wrong)


def test_an_import_that_goes_up_is_named_with_both_files(tmp_path: Path) -> None:
    """The sentence says which file imports what, and which law that breaks."""
    floors = floors_of("server", (PROJECT / "CONTRIBUTING.md").read_text())
    database = ROOT / "server" / "db" / "database.py"
    assert breaks("server", floors, "slm.server.db.database", database) == []
    floors["failpoints"] = floors["db"] + 1
    (sentence, *_) = breaks("server", floors, "slm.server.db.database", database)
    assert sentence.startswith("server/db/database.py:")
    assert "imports slm.server.failpoints" in sentence


@pytest.mark.parametrize("room", ["server", "client", "llm", "cli"])
def test_a_class_has_a_name_of_its_own(room: str) -> None:
    """No two modules of a room define a class of the same name."""
    where: dict[str, list[str]] = {}
    for module, path in modules().items():
        if module.startswith(f"slm.{room}.") and "migrations" not in module:
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    where.setdefault(node.name, []).append(module)
    assert not {name: found for name, found in where.items() if len(found) > 1}


# --- sizes ---

MOST_LINES = {"src": 400, "tests": 600}
MOST_IN_A_FOLDER = 12
ROOMIER = {"slm/server": 24}
EXEMPT = {"routes", "commands", "versions"}


def test_no_file_is_too_long_to_read() -> None:
    """A file of the package has at most 400 lines, one of the tests 600."""
    long = {
        str(path.relative_to(PROJECT)): lines
        for top, most in MOST_LINES.items()
        for path in (PROJECT / top).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > most
    }
    assert not long


def test_no_folder_holds_too_much_to_see_at_once() -> None:
    """A folder of the package has at most 12 things in it, `server/` itself 24."""
    source = ROOT.parent
    full = {}
    for folder in (ROOT, *(path for path in ROOT.rglob("*") if path.is_dir())):
        things = [
            path.name
            for path in folder.iterdir()
            if path.name not in ("__init__.py", "__pycache__")
            and (path.is_dir() or path.suffix == ".py")
        ]
        name = folder.relative_to(source).as_posix()
        if folder.name not in EXEMPT and len(things) > ROOMIER.get(name, MOST_IN_A_FOLDER):
            full[name] = sorted(things)
    assert not full


# --- what an import loads ---


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules in memory after a fresh interpreter ran the statement."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_slm_is_light() -> None:
    """`import slm` loads neither a part of the server nor a provider's SDK."""
    loaded = loaded_by("import slm; [getattr(slm, name) for name in slm.__all__]")
    assert "slm" in loaded
    assert not loaded & SERVER_PARTS
    assert not loaded & PROVIDER_PARTS


def test_import_slm_loads_no_server_module() -> None:
    """Not even our own server modules come along with the SDK."""
    script = (
        "import slm, sys; [getattr(slm, name) for name in slm.__all__]; "
        "print([m for m in sys.modules if m.split('.')[:2] in (['slm', 'server'], ['slm', 'cli'])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
