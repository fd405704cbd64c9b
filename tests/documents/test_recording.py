"""The README's picture is a real run: it can be taken again, and shows what was printed."""

from __future__ import annotations

import re

import pytest
from tools.recording import PICTURE, TRANSCRIPT, check, masked, picture, record

LINES = TRANSCRIPT.read_text().splitlines()


@pytest.mark.documents
async def test_the_run_can_be_taken_again() -> None:
    """It prints the same, times apart, and no request after the change is an old one."""
    assert masked(await record()) == masked(LINES)


def test_the_picture_is_what_was_printed() -> None:
    """The SVG is drawn from the transcript beside it; `make picture` takes both anew."""
    assert PICTURE.read_text() == picture(LINES)
    shown = re.sub(r"<[^>]*>", "", PICTURE.read_text()).replace("&#160;", " ")
    assert "claude-sonnet-5-5" in shown


def test_the_picture_loads_nothing_from_elsewhere() -> None:
    """It names no address but that of the SVG format, so that it looks the same everywhere."""
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", PICTURE.read_text()))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "@font-face" not in PICTURE.read_text()
    assert "<script" not in PICTURE.read_text()


def test_an_old_configuration_after_the_change_is_refused() -> None:
    """The script keeps no run in which the promise of the README did not hold."""
    late = next(line for line in LINES if "revision 2" in line)
    with pytest.raises(RuntimeError, match="after the change"):
        check([*LINES, late])
