"""The parts of docs/ that are made from the code are what the code says now."""

from __future__ import annotations

import doctest
import re

import pytest
from tools.docs.pages import PAGES, ROOT, regenerated

import slm
import slm.llm
import slm.testing


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    """`make docs` would change nothing."""
    assert (ROOT / name).read_text() == regenerated(name), "run: python -m tools.docs"


def test_the_page_of_the_sdk_has_every_public_name() -> None:
    """Whatever slm, slm.llm and slm.testing export has a heading or a row, and nothing else has."""
    page = (ROOT / "docs" / "reference" / "sdk.md").read_text()
    shown = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    shown += re.findall(r"^\| `(\w+)` \| `", page, re.MULTILINE)
    assert sorted(shown) == sorted({*slm.__all__, *slm.llm.__all__, *slm.testing.__all__})


@pytest.mark.parametrize("example", [slm.lifespan, slm.testing.FakeSLMClient])
def test_an_example_of_the_sdks_names_runs(example: object) -> None:
    """The examples in docstrings that need no server do what they show."""
    (found,) = [
        each for each in doctest.DocTestFinder(recurse=False).find(example) if each.examples
    ]
    assert doctest.DocTestRunner().run(found).failed == 0
