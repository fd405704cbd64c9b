"""Keys that come after their change: many with one snapshot, one for a call at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from slm import SLMClient
from slm.client.cache.cache import AgentConfigCache
from slm.client.sync.key_fetcher import FEW, MAX_SINGLE, KeyFetcher
from slm.client.timings import Timings
from slm.errors import SLMError, SLMUnavailable
from slm.server.agents.schemas import AgentUpdate
from slm.server.security.audit import AuditLog, Who
from tests.support.servers import InLoopServer, eventually, running_server
from tests.support.store import new_agent

COUNT = 40


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InLoopServer]:
    """A server with forty agents that have a key."""
    async with running_server(tmp_path / "data") as running:
        for number in range(COUNT):
            agent = new_agent(f"agent-{number}", llm_api_key="sk-old")
            await running.running.services.registry.create(agent, who=Who("tester"))
        yield running


async def rotate(server: InLoopServer, *names: str) -> None:
    """Give each of these agents a new key."""
    update = AgentUpdate.model_validate({"llm_api_key": "sk-new"})
    registry = server.running.services.registry
    await asyncio.gather(*(registry.update(name, update, who=Who("tester")) for name in names))


async def reads(server: InLoopServer) -> list[str]:
    """What the backend's token read, newest first."""
    log = AuditLog(server.running.services.database)
    return [each.action for each in await log.entries(actor="backend", limit=1000)]


async def test_many_keys_are_one_request(server: InLoopServer) -> None:
    """When all keys are rotated a backend takes a snapshot or two, and not each key by itself."""
    async with SLMClient(server.url, token=server.backend_token) as client:
        before = len(await reads(server))
        await rotate(server, *(f"agent-{number}" for number in range(COUNT)))

        def all_are_here() -> bool:
            configs = [client.peek(f"agent-{number}") for number in range(COUNT)]
            keys = [c.llm_api_key for c in configs if c is not None and c.llm_api_key is not None]
            return [key.get_secret_value() for key in keys] == ["sk-new"] * COUNT

        await eventually(all_are_here)
        assert client.status.value == "live"
        made = (await reads(server))[: len(await reads(server)) - before]
        assert "key.read_all" in made
        assert len(made) < COUNT / 2


async def test_a_call_that_waits_for_its_key_is_not_put_off(server: InLoopServer) -> None:
    """The spreading of requests over time delays no LLM request."""
    timings = Timings(key_jitter_seconds=600)
    async with SLMClient(
        server.url, token=server.backend_token, timings=timings, key_wait=8
    ) as client:
        for name in ("agent-1", "agent-2"):
            await rotate(server, name)

            def heard(name: str = name) -> bool:
                return client.peek(name) is None

            await eventually(heard)
            config = await client.get_agent_config(name)
            assert config["llm_api_key"] == "sk-new"
        assert (await reads(server))[:2] == ["key.read", "key.read"]


class Asked:
    """A fetcher of keys over a cache that says what it is told, and what it asked for."""

    def __init__(self, size: int, *, fails: bool = False, **timings: float) -> None:
        self.awaited: set[str] = set()
        self.asked: list[list[str]] = []
        self._fails = fails
        cache = SimpleNamespace(size=size, position=SimpleNamespace(synced=True), find=self._find)
        self.fetcher = KeyFetcher(
            cast("AgentConfigCache", cache),
            Timings(**timings),
            self._one,
            self._all,
            lambda work: asyncio.ensure_future(work),
            uniform=lambda low, high: high,
        )

    def _find(self, agent_id: str) -> Any:
        return SimpleNamespace(awaits_key=agent_id in self.awaited, key_error=None)

    async def _one(self, agent_id: str) -> SLMError | None:
        return self._answer([agent_id])

    async def _all(self) -> SLMError | None:
        return self._answer(["all"])

    def _answer(self, what: list[str]) -> SLMError | None:
        self.asked.append(what)
        if self._fails:
            return SLMUnavailable("no")
        self.awaited -= self.awaited if what == ["all"] else set(what)
        return None

    def want(self, count: int) -> None:
        names = [f"agent-{number}" for number in range(count)]
        self.awaited |= set(names)
        for name in names:
            self.fetcher.want(name)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.fetcher.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("wanted", "size", "requests"),
    [
        (1, 200, 1),
        (FEW, 200, FEW),
        (FEW + 1, 200, 1),
        (200, 200, 1),
        (MAX_SINGLE + 1, 100_000, MAX_SINGLE + 1),
    ],
)
async def test_a_few_are_asked_for_one_by_one(wanted: int, size: int, requests: int) -> None:
    """A snapshot is taken for many keys, but not for a few among a hundred thousand agents."""
    asked = Asked(size, key_jitter_seconds=0.01, key_pause_max_seconds=0.01)
    async with asked.running():
        asked.want(wanted)
        await eventually(lambda: not asked.awaited)
    assert len(asked.asked) == requests


async def test_what_fails_is_tried_again_with_backoff() -> None:
    """A server that is away is asked less and less often, and a waiting call hurries nothing."""
    asked = Asked(200, fails=True, key_jitter_seconds=0.001, backoff_initial_seconds=0.05)
    async with asked.running():
        asked.want(1)
        await eventually(lambda: len(asked.asked) >= 3)
        tried = len(asked.asked)
        for _ in range(20):
            asked.fetcher.hurry("agent-0")
        await asyncio.sleep(0)
        assert len(asked.asked) <= tried + 1
