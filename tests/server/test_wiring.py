"""The server's parts are put together by their constructors; nothing is set from outside."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest

from slm.server import app, serve, services


def assignments_from_outside(source: str) -> Iterator[str]:
    """Yield each assignment to an attribute of another object than `self`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in (each for whole in targets for each in ast.walk(whole)):
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                owner = ast.unparse(target)
                # `threading.Timer` takes no argument for it.
                if not owner.startswith("self.") and target.attr != "daemon":
                    yield f"line {node.lineno}: {owner}"


@pytest.mark.parametrize("module", [services, app, serve], ids=lambda module: module.__name__)
def test_no_part_is_completed_from_outside(module: ModuleType) -> None:
    """What a part needs is an argument of its constructor, so none is ever half made."""
    assert list(assignments_from_outside(inspect.getsource(module))) == []


def test_the_check_sees_every_kind_of_assignment() -> None:
    """Plain, annotated, augmented, in a tuple, in a function; not what an object sets itself."""
    source = "a.b = 1\nc.d: int = 2\ne.f += 3\ng, h.i = 4\ndef j():\n  self.k = l.m = 5\n"
    assert len(list(assignments_from_outside(source))) == 5
