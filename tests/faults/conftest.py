"""What every fault test starts from: a site on either engine, and no failpoint left armed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from slm.server import failpoints
from tests.faults.site import Site
from tests.postgres import postgres as postgres
from tests.postgres import postgres_url as postgres_url


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
