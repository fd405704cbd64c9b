"""docs/security.md names a test for each promise; each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "security.md"


def test_every_promise_names_tests_that_exist() -> None:
    """A renamed or dropped test shows up here, not when somebody trusts the page."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", DOCUMENT.read_text())
    assert len(named) > 25
    for file, test in named:
        functions = {
            node.name
            for node in ast.parse((HERE / file).read_text()).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert test in functions, f"{file}::{test}"


def test_every_promise_has_a_test() -> None:
    """No row of the table is without one."""
    table = DOCUMENT.read_text().split("## What is promised")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    assert [row for row in rows if "::test_" not in row] == []
