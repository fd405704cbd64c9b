"""Failpoints: armed by one variable, refused outside tests, silent when nothing is armed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from slm.errors import ConfigurationError, DatabaseUnavailable
from slm.server import failpoints


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm(None, testing=False)


def test_nothing_armed_does_nothing() -> None:
    """Without SLM_FAILPOINT every place is passed."""
    failpoints.arm(None, testing=False)
    failpoints.arm("", testing=False)
    for name in failpoints.NAMES:
        failpoints.reach(name)
        asyncio.run(failpoints.reach_async(name))


def test_refused_outside_tests() -> None:
    """A failpoint without SLM_TESTING=1 is refused, and arms nothing."""
    with pytest.raises(ConfigurationError, match="SLM_TESTING=1"):
        failpoints.arm("after_commit:raise", testing=False)
    failpoints.reach("after_commit")


@pytest.mark.parametrize(
    "text",
    ["nowhere:kill", "after_commit", "after_commit:burn", "before_push:hold", "before_push:hold:x",
     "after_commit:kill:3", "after_commit:kill@x"],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(text: str) -> None:
    """An unknown place or action is refused with what would have been right."""
    with pytest.raises(ConfigurationError, match="NAME:ACTION"):
        failpoints.arm(text, testing=True)


def test_raise_fails_at_its_place_alone() -> None:
    """`raise` fails as a database that is away would, from the passing that `@N` names on."""
    failpoints.arm("before_commit:raise@2", testing=True)
    failpoints.reach("after_commit")
    failpoints.reach("before_commit")
    failpoints.reach("before_commit")
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable):
            failpoints.reach("before_commit")


async def test_hold_leaves_the_loop_free() -> None:
    """`hold` waits at its place, in a thread or in the loop, while everything else goes on."""
    failpoints.arm("before_push:hold:0.05,after_commit:hold:0.05", testing=True)
    before = time.monotonic()
    held = asyncio.create_task(failpoints.reach_async("before_push"))
    await asyncio.sleep(0)
    assert not held.done()
    await held
    await asyncio.to_thread(failpoints.reach, "after_commit")
    assert time.monotonic() - before >= 0.1


def test_kill_ends_the_process_as_a_power_cut_does() -> None:
    """`kill` leaves no chance to clean up."""
    code = (
        "from slm.server import failpoints\n"
        "failpoints.arm('after_commit:kill', testing=True)\n"
        "try:\n    failpoints.reach('after_commit')\nfinally:\n    print('cleaned up')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -9
    assert done.stdout == b""
