"""What strangers install uses no private name of a library, so no library needs an upper pin."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import slm

ROOT = Path(slm.__file__).parent
ROOMS = ("client", "common", "errors", "llm", "testing.py", "endpoints.py", "protocol.py")


def trees() -> Iterator[ast.Module]:
    for room in ROOMS:
        path = ROOT / room
        for each in [path] if path.is_file() else sorted(path.rglob("*.py")):
            yield ast.parse(each.read_text())


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def defined(tree: ast.Module) -> Iterator[str]:
    """Yield each name that the module gives something: a function, a variable, an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def used(tree: ast.Module) -> Iterator[str]:
    """Yield each private name that is read of an object or imported from another package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if is_private(node.attr):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("slm"):
            names = [*(node.module or "").split("."), *(each.name for each in node.names)]
            yield from (f"{node.module}: {name}" for name in names if is_private(name))


def foreign(modules: list[ast.Module]) -> set[str]:
    ours = {name for tree in modules for name in defined(tree)}
    return {name for tree in modules for name in used(tree)} - ours


def test_every_private_name_that_is_read_is_our_own() -> None:
    """An attribute with an underscore is one that a module of these rooms defines."""
    assert foreign(list(trees())) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class W(aiohttp.ClientWebSocketResponse):\n    def f(self):\n        self._response", 1),
        ("session.connector._conns", 1),
        ("from httpx._client import Client", 1),
        ("def f(self):\n    self._x = 1\n    self._x", 0),
        ("from __future__ import annotations", 0),
    ],
)
def test_the_law_sees_a_library_s_private_names(source: str, found: int) -> None:
    """An attribute of an object, one that a subclass inherits, and an import are all seen."""
    assert len(foreign([ast.parse(source)])) == found
