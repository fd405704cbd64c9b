"""docs/security.md and docs/reliability.md name a test for each promise; each of them is there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECURITY = (ROOT / "docs" / "security.md").read_text()
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()


@functools.cache
def functions_in(file: Path) -> set[str]:
    """Return the names of the functions of a file."""
    return {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def rows_of(document: str, title: str) -> list[str]:
    """Return the rows of the table under this title, without its head."""
    section = document.split(f"## {title}")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


def test_every_promise_names_tests_that_exist() -> None:
    """A renamed or dropped test shows up here, not when somebody trusts the page."""
    named = re.findall(r"`((?:tests/(?:\w+/)?)?test_\w+\.py)::(test_\w+)`", SECURITY)
    assert len(named) > 100
    for file, test in named:
        path = ROOT / file if "/" in file else HERE / file
        assert test in functions_in(path), f"{file}::{test}"


def test_every_fault_and_promise_of_the_server_names_tests_that_exist() -> None:
    """docs/reliability.md names a file and then tests of it, or a file alone."""
    tests = 0
    for line in RELIABILITY.splitlines():
        file: Path | None = None
        for name in re.findall(r"`((?:tests/\w+/)?test_\w+(?:\.py)?)`", line):
            if name.endswith(".py"):
                file = ROOT / name if "/" in name else ROOT / "tests" / "faults" / name
                assert file.is_file(), name
            elif file is not None:
                assert name in functions_in(file), f"{file.name}: {name}"
                tests += 1
    assert tests > 90
    assert [
        row for row in rows_of(RELIABILITY, "Promises of the server") if "test_" not in row
    ] == []


def test_every_promise_has_a_test() -> None:
    """No row of the table is without one."""
    rows = rows_of(SECURITY, "What is promised")
    assert len(rows) > 50
    assert [row for row in rows if "::test_" not in row] == []
