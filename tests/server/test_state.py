"""The state row is the one that every write locks first: its statements are in one module."""

from __future__ import annotations

import ast
from pathlib import Path

import slm.server

ROOT = Path(slm.server.__file__).parent
ITS_MODULE = "db/state.py"


def names_state(node: ast.AST) -> bool:
    """Say whether the table of the state row is named anywhere below."""
    return any(isinstance(each, ast.Name) and each.id == "STATE" for each in ast.walk(node))


def changes_or_locks_state(source: str) -> bool:
    """Say whether the source updates, inserts, deletes or locks the state row."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("update", "insert", "delete") and any(map(names_state, node.args)):
            return True
        if called == "with_for_update" and names_state(node):
            return True
    return False


def test_only_one_module_changes_or_locks_the_state_row() -> None:
    """Nowhere else in the server is the state row updated or locked; migrations come before it."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "migrations" not in path.parts and changes_or_locks_state(path.read_text())
    }
    assert found == {ITS_MODULE}


def test_the_search_finds_each_form() -> None:
    """An update, a lock and a lock within a longer statement are found; a plain read is not."""
    assert changes_or_locks_state("update(STATE).values(revision=1)")
    assert changes_or_locks_state("sa.update(STATE)")
    assert changes_or_locks_state("select(STATE.c.id).where(STATE.c.id == 1).with_for_update()")
    assert not changes_or_locks_state("select(STATE.c.revision)")
    assert not changes_or_locks_state("update(AGENTS); select(AUDIT_HEAD).with_for_update()")
