"""Round every fault test: a site on either engine, no failpoint left, and all streams judged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import aiohttp
import pytest

from slm.server import failpoints
from tests.support.faults.recording import recorded
from tests.support.faults.site import Site
from tests.support.postgres import postgres as postgres
from tests.support.postgres import postgres_url as postgres_url


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Record every stream of a test, and fail the test for what the history checker finds.

    A test that records no stream fails as well. What is in order in a test beyond the contract,
    its marker `history` says (`recording.Recording.verdict`).
    """
    marker = pyfuncitem.get_closest_marker("history")
    expected = dict(marker.kwargs) if marker is not None else {}
    if not expected.pop("streams", True):
        return (yield)
    with recorded() as recording:
        result = yield
        wrong = recording.verdict(**expected)
        assert not wrong, "\n".join(["the history of frames is not in order:", *wrong[:20]])
    return result


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    """A site on each engine in turn; nothing runs yet."""
    if request.param == "sqlite":
        return Site("sqlite", tmp_path, None)
    return Site("postgresql", tmp_path, request.getfixturevalue("postgres_url"))


@pytest.fixture
def sqlite_site(tmp_path: Path) -> Site:
    """A site on SQLite."""
    return Site("sqlite", tmp_path, None)


@pytest.fixture
def postgres_site(tmp_path: Path, postgres_url: str) -> Site:
    """A site on PostgreSQL."""
    return Site("postgresql", tmp_path, postgres_url)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a limit on its connections."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.fixture(autouse=True)
def _no_failpoints() -> Iterator[None]:
    yield
    failpoints.arm(None, testing=False)
