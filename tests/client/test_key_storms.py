"""What a storm of key changes costs one backend, and how late its keys come: virtual time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.keys_in_use import KeysInUse
from slm.client.cache.snapshot import ReceivedAgent, ReceivedSnapshot
from slm.client.sync.acks import Acks
from slm.client.sync.key_fetcher import FEW, KeyFetcher
from slm.client.timings import Timings
from slm.errors import SLMError
from slm.protocol import AgentChanged, ServerMessage, parse_server_message
from tests.support.virtual_time import run

AGENTS = 200
JITTER = Timings().key_jitter_seconds
SETTLED = 3 * JITTER
LONGEST = Timings().key_pause_max_seconds


class Backend:
    """A fetcher of keys whose server takes `seconds` to answer whatever it is asked."""

    def __init__(self, seconds: float) -> None:
        self.awaited: set[str] = set()
        self.began: list[float] = []
        self.under_way = 0
        self.most_under_way = 0
        self._seconds = seconds
        self._all_here = asyncio.Event()
        cache = SimpleNamespace(size=AGENTS, position=SimpleNamespace(synced=True), find=self._find)
        self.fetcher = KeyFetcher(
            cast("AgentConfigCache", cache),
            Timings(),
            self._one,
            self._all,
            lambda work: asyncio.ensure_future(work),
        )

    def _find(self, agent_id: str) -> Any:
        return SimpleNamespace(awaits_key=agent_id in self.awaited, key_error=None)

    async def _one(self, agent_id: str) -> SLMError | None:
        return await self._answer({agent_id})

    async def _all(self) -> SLMError | None:
        return await self._answer(None)

    async def _answer(self, what: set[str] | None) -> SLMError | None:
        self.began.append(asyncio.get_running_loop().time())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self._seconds)
        # Read when the answer leaves: what changed meanwhile is in it.
        self.awaited -= set(self.awaited) if what is None else what
        self.under_way -= 1
        if not self.awaited:
            self._all_here.set()
        return None

    async def hear(self, changes: int, gap: float) -> tuple[float, float]:
        """Have so many agents' keys change; return when the last did, and when all were here."""
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(self.fetcher.run())
        for number in range(changes):
            if number:
                await asyncio.sleep(gap)
            name = f"agent-{number % AGENTS}"
            self.awaited.add(name)
            self._all_here.clear()
            self.fetcher.want(name)
        last = loop.time()
        await self._all_here.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return last, loop.time()


@settings(max_examples=60, deadline=None)
@given(
    changes=st.integers(1, 300),
    gap=st.floats(0.001, SETTLED * 0.9),
    seconds=st.floats(0.01, 5),
)
def test_a_storm_costs_few_requests_and_ends_soon(changes: int, gap: float, seconds: float) -> None:
    """A slow server is asked seldom while keys go on changing, and soon once they no longer do."""

    async def storm() -> None:
        backend = Backend(seconds)
        last, done = await backend.hear(changes, gap)
        # Between two requests lies a pause of at least twice what one takes, or the longest one.
        turn = seconds + min(2 * seconds, LONGEST)
        rounds = set(backend.began)
        assert len(rounds) <= 3 + last / turn
        assert backend.most_under_way <= FEW
        # One that was under way, a pause, and the one that brings the rest.
        pause = min(1.5 * seconds, LONGEST / 4)
        assert done - last <= 2 * seconds + max(pause, SETTLED) + 2 * JITTER

    run(storm())


@settings(max_examples=60, deadline=None)
@given(gap=st.floats(SETTLED * 1.1, 3), seconds=st.floats(0.01, 3))
def test_keys_that_change_one_after_the_other(gap: float, seconds: float) -> None:
    """Where each change comes alone, a slow server still has a pause after each answer."""

    async def drip() -> None:
        backend = Backend(seconds)
        last, _ = await backend.hear(50, gap)
        assert backend.most_under_way <= FEW
        turn = seconds + min(seconds / 2, LONGEST / 4)
        assert len(set(backend.began)) <= 3 + last / turn

    run(drip())


@settings(max_examples=30, deadline=None)
@given(seconds=st.floats(0.001, 2))
def test_one_key_alone_is_asked_for_at_once(seconds: float) -> None:
    """Nothing is saved on the one key that an operator changes: it waits for the jitter alone."""

    async def one() -> None:
        backend = Backend(seconds)
        _, done = await backend.hear(1, 0)
        assert len(backend.began) == 1
        assert backend.began[0] <= JITTER
        assert done <= seconds + 2 * JITTER

    run(one())


def changed(agent_id: str, revision: int) -> ServerMessage:
    """An agent's key has changed."""
    message = parse_server_message(
        f'{{"type": "agent_config_changed", "agent_id": "{agent_id}", "revision": {revision},'
        f' "config": {{"llm_provider": "openai", "llm_model": "m", "llm_timeout": 30,'
        f' "llm_temperature": 0.7, "llm_options": {{}}, "is_default": false, "is_active": true,'
        f' "has_api_key": true, "api_key_revision": {revision}, "llm_endpoint": null,'
        f' "llm_max_tokens": null}}}}'
    )
    assert message is not None
    return message


@settings(max_examples=20, deadline=None)
@given(changes=st.integers(20, AGENTS), gap=st.floats(0.01, 0.1))
def test_what_acks_name_is_bounded_in_time(changes: int, gap: float) -> None:
    """Acks that name many awaited keys are fewer; once all are here, one says so at once."""

    async def storm() -> None:
        loop = asyncio.get_running_loop()
        cache = AgentConfigCache(clock=loop.time)
        cache.begin("e", 0)
        names = [f"agent-{number}" for number in range(changes)]
        agents = [
            ReceivedAgent(agent_id=name, revision=1, llm_provider="openai", llm_model="m")
            for name in names
        ]
        cache.apply_snapshot(ReceivedSnapshot(revision=1, epoch="e", agents=agents))
        sent: list[tuple[float, str]] = []

        async def send(text: str) -> bool:
            sent.append((loop.time(), text))
            return True

        timings = Timings()
        acks = Acks(cache, KeysInUse(), timings, 1000, send)
        task = asyncio.create_task(acks.run())
        for number, name in enumerate(names):
            message = changed(name, 2 + number)
            assert isinstance(message, AgentChanged)
            cache.position.advance(message.revision)
            cache.apply_change(message)
            acks.changed()
            await asyncio.sleep(gap)
        named = sum(text.count("agent-") for _, text in sent)
        # An interval for each sixteen names: so many names a second at most, and each ack one more.
        per_second = 16 / timings.ack_interval_seconds
        assert named <= per_second * (loop.time() + 1) + len(sent)
        for each in cache.keys_awaited():
            known = cache.find(each)
            assert known is not None
            cache.apply_absent(each, known.revision)
        settled = loop.time()
        acks.changed()
        await asyncio.sleep(1)
        assert '"keys":{"' not in sent[-1][1].replace(" ", "")
        assert sent[-1][0] - settled <= timings.ack_interval_seconds + timings.ack_delay_seconds
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(storm())
