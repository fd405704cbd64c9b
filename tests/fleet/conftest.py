"""Two replicas on one PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from tests.support.postgres import postgres as postgres
from tests.support.postgres import postgres_url as postgres_url
from tests.support.raw import Api
from tests.support.servers import InLoopServer, running_server


@pytest.fixture
async def replicas(tmp_path: Path, postgres_url: str) -> AsyncIterator[list[InLoopServer]]:
    """Two servers of one database."""
    shared = {
        "database_url": SecretStr(postgres_url),
        "encryption_keys": SecretStr(Fernet.generate_key().decode()),
        "lease_seconds": 1.5,
        "fleet_interval_seconds": 0.1,
    }
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running_server(tmp_path / name, **shared))
            for name in ("one", "two")
        ]


@pytest.fixture
def apis(replicas: list[InLoopServer], session: aiohttp.ClientSession) -> list[Api]:
    """An admin's calls to each; the tokens are with whoever made the database."""
    return [Api(server, session, replicas[0].admin_token) for server in replicas]
