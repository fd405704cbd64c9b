"""Who may know whom inside the package, and what `import slm` may load."""

from __future__ import annotations

import ast
import json
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
