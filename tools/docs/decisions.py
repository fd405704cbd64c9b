"""The index of docs/decisions, from the first line of each page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "decisions"


def parts() -> Mapping[str, str]:
    """Return the table of all decisions by their number."""
    rows = []
    for page in sorted(FOLDER.glob("[0-9]*.md")):
        found = re.match(r"# (\d+)\. (.+)\n", page.read_text())
        if found is None or int(found[1]) != int(page.name[:4]):
            raise ValueError(f"{page.name} does not begin with its number and a title")
        rows.append(f"| {found[1]} | [{found[2]}]({page.name}) |")
    return {"index": "\n".join(["| | decision |", "|---|---|", *rows])}
