"""A running server, and somebody who may do everything on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.http import Caller, admin
from tests.support.postgres import postgres as postgres
from tests.support.postgres import postgres_url as postgres_url
from tests.support.servers import InLoopServer, running_server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InLoopServer]:
    """A server in this loop, on SQLite."""
    async with running_server(tmp_path / "data") as running:
        yield running


@pytest.fixture
async def ask(server: InLoopServer) -> AsyncIterator[Caller]:
    """The server, asked with a token of every scope."""
    async with admin(server) as caller:
        yield caller
