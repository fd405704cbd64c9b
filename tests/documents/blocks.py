"""The code blocks of a document, and which of them are to be run.

A block is run by a test, unless the line before it is `<!-- fragment -->` or
`<!-- fragment: why -->`. A block without a language, or of `text`, is a picture. A generated part
of a page marks its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FRAGMENT = re.compile(r"<!-- fragment(: .+)? -->")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: the document's path.
        line: the number of the line on which it begins.
        language: what is written behind the fence.
        text: what is in it.
        fragment: whether it is marked as one that does not run by itself.
        stops: the commands that are to be stopped before it, as `<!-- stop: COMMAND -->` says.
    """

    page: str
    line: int
    language: str
    text: str
    fragment: bool
    stops: tuple[str, ...]


def all_blocks(page: str) -> Iterator[Block]:
    """Yield every block of a page that is code."""
    before: list[str] = []
    lines = iter(enumerate((ROOT / page).read_text().splitlines(), 1))
    for number, line in lines:
        if not line.startswith("```"):
            before = [*before, line] if line.startswith("<!-- ") else []
            continue
        inside: list[str] = []
        for _, text in lines:
            if text.startswith("```"):
                break
            inside.append(f"{text}\n")
        language = line.removeprefix("```").partition(" ")[0]
        if language not in ("", "text"):
            fragment = any(FRAGMENT.fullmatch(each) for each in before)
            stops = tuple(
                found[1] for each in before if (found := re.match(r"<!-- stop: (.+) -->", each))
            )
            yield Block(page, number, language, "".join(inside), fragment, stops)
        before = []


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the blocks of these languages that are to be run, in order."""
    return [each for each in all_blocks(page) if not each.fragment and each.language in languages]
