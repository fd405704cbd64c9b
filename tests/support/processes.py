"""What tests of synchronous code share: a server of another process, and how to write to it."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import ServerProcess


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Poll a condition, in code without a loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server in a process of its own; this one has no loop."""
    server = ServerProcess(tmp_path / "data")
    asyncio.run(server.start())
    yield server
    server.kill()


def write(server: ServerProcess, method: str, path: str, body: Any = None) -> int:
    """Do what an operator does, and return the revision."""
    request = urllib.request.Request(
        f"{server.url}/api/agents{path}",
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={
            "Authorization": f"Bearer {server.admin_token}",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request) as answer:
        return int(answer.headers["SLM-Revision"])


def create(server: ServerProcess, agent_id: str, **fields: Any) -> int:
    body = {"agent_id": agent_id, "name": agent_id, "llm_provider": "ollama", "llm_model": "m"}
    return write(server, "POST", "", body | fields)
