"""A server that the commands of a test find by its data directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.servers import InLoopServer, running_server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InLoopServer]:
    """A server as `slm serve` leaves it: its address is in its data directory."""
    async with running_server(tmp_path / "data") as running:
        (running.data_dir / "server.url").write_text(f"{running.url}\n")
        yield running
