"""A live client, and a proxy before the server, for the tests of the client."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from slm import SLMClient
from tests.support.gateway import Gateway, gateway
from tests.support.sdk import client_of
from tests.support.servers import InLoopServer


@pytest.fixture
async def client(server: InLoopServer) -> AsyncIterator[SLMClient]:
    """A client that is live."""
    async with client_of(server.url, server) as opened:
        yield opened


@pytest.fixture
async def gate(server: InLoopServer) -> AsyncIterator[Gateway]:
    """A reverse proxy before the server, that refuses what a test likes."""
    async with gateway(server.url) as opened:
        yield opened
