"""Which pages have generated parts, and how a part is put into its page."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tools.docs import commands, decisions, sdk, variables

ROOT: Final = Path(__file__).parents[2]
PAGES: Final[Mapping[str, Callable[[], Mapping[str, str]]]] = {
    "docs/decisions/README.md": decisions.parts,
    "docs/reference/commands.md": commands.parts,
    "docs/reference/sdk.md": sdk.parts,
    "docs/reference/variables.md": variables.parts,
}
"""A page's path, and what returns the text of each of its generated parts by the part's name."""

_PART: Final = re.compile(
    r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL
)


def regenerated(name: str) -> str:
    """Return a page's text with its generated parts made anew.

    Raises:
        ValueError: the page does not have exactly the parts that are generated for it.
    """
    page = (ROOT / name).read_text()
    parts = PAGES[name]()
    placed = [found["name"] for found in _PART.finditer(page)]
    if sorted(placed) != sorted(parts):
        raise ValueError(f"{name} has places for {placed}, and {sorted(parts)} are generated")
    return _PART.sub(
        lambda found: f"{found[1]}\n{parts[found['name']].strip()}\n\n{found[3]}", page
    )
