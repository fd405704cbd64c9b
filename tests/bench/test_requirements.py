"""The bench is installed from two locks at once, so they must agree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins(lock: str) -> dict[str, str]:
    """Return the version of each package in a lock."""
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


def test_both_locks_name_the_same_versions() -> None:
    """No package is in both locks with two versions: pip would refuse to install them together."""
    ours, theirs = pins("requirements.lock"), pins("benchmarks/requirements.txt")
    assert ours["aiohttp"]
    assert theirs["aetcd"]
    both = ours.keys() & theirs.keys()
    assert not {n: (ours[n], theirs[n]) for n in both if ours[n] != theirs[n]}
