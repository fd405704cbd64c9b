"""The parts of docs/ that are made from the code are what the code says now."""

from __future__ import annotations

import pytest
from tools.docs.pages import PAGES, ROOT, regenerated


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    """`make docs` would change nothing."""
    assert (ROOT / name).read_text() == regenerated(name), "run: python -m tools.docs"
