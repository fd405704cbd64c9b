"""docs/how-to/troubleshooting.md quotes what the code says, word for word."""

from __future__ import annotations

import ast
import re

from tests.documents.blocks import ROOT

PAGE = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text()
BLANK = "\0"


def said(node: ast.AST) -> str | None:
    """Return a text of the source with a blank for whatever is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[srdg]", BLANK, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else BLANK for part in node.values
        )
    return None


def texts() -> set[str]:
    """Return every text in the source."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        found |= {text for node in ast.walk(ast.parse(path.read_text())) if (text := said(node))}
    return found


def test_every_quoted_text_is_in_the_source() -> None:
    """The text in the first column is one that somebody can see."""
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    quoted = [text for text in rows if " " in text]
    assert len(quoted) > 40
    source = texts()
    for text in quoted:
        pattern = re.compile(".*".join(map(re.escape, text.split("…"))), re.DOTALL)
        assert any(pattern.search(each) for each in source), text


def test_each_row_has_a_cause_and_a_remedy() -> None:
    """No cell of the tables is empty."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 3, row
        assert all(cells), row
