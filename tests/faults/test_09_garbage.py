"""Fault 9: not JSON, JSON of the wrong shape: drop, reconnect, resume; an unknown type: ignored."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.faults.backends import backend, is_live
from tests.support.faults.scripted import Peer, changed, config, scripted_slm
from tests.support.servers import eventually

AGENTS = {"default": (1, config("d", is_default=True)), "billing": (5, config("b"))}


@pytest.mark.history(faults="this is no frame of the contract")
@pytest.mark.parametrize(
    "garbage",
    [
        "not json",
        '{"type": "heartbeat", "revision": 7',
        "[1, 2, 3]",
        '{"no": "type"}',
        '{"type": 7}',
        '{"type": "heartbeat", "revision": "seven"}',
        '{"type": "agent_config_changed", "agent_id": "billing", "revision": 7}',
        '{"type": "agent_config_changed", "agent_id": "billing", "revision": 7, "config": []}',
        '{"type": "agent_deleted", "agent_id": 5, "revision": 7}',
        "[" * 100_000,
        b"\x00\x01binary",
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_garbage_costs_the_connection_only(garbage: str | bytes) -> None:
    """What cannot be understood ends the connection; the next one resumes and misses nothing."""
    holds_snapshot = asyncio.Event()

    async def broken(peer: Peer) -> None:
        await peer.subscribed(5)
        await holds_snapshot.wait()
        await peer.say(changed("billing", 6, "before"), garbage)
        await peer.live(6)

    async def whole(peer: Peer) -> None:
        await peer.subscribed()
        await peer.say(changed("billing", 7, "after"))
        await peer.live(7)

    async with (
        scripted_slm(revision=5, agents=AGENTS, scripts=[broken, whole]) as slm,
        backend(slm.url, "t") as client,
    ):
        await eventually(lambda: is_live(client))
        holds_snapshot.set()
        await eventually(lambda: client.revision == 7 and is_live(client))
        assert [s.get("since") for s in slm.subscriptions] == [None, 6]
        assert slm.snapshots == 1
        assert (await client.resolve("billing")).llm_model == "after"


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "news", "revision": 3},
        {"type": "agent_config_renamed", "agent_id": "billing", "revision": 6, "config": 1},
        {"type": "error", "code": "bad-message", "detail": "?"},
    ],
    ids=lambda frame: frame["type"],
)
async def test_an_unknown_type_is_ignored(frame: dict[str, Any]) -> None:
    """A message of a version to come changes nothing, and the stream goes on."""

    async def script(peer: Peer) -> None:
        await peer.subscribed(5)
        known = changed("billing", 6, "after") | {"new_field": {"of": "a version to come"}}
        await peer.say(frame, known, frame)
        await peer.live(6)

    async with (
        scripted_slm(revision=5, agents=AGENTS, scripts=[script]) as slm,
        backend(slm.url, "t") as client,
    ):
        await eventually(lambda: client.revision == 6 and is_live(client))
        assert (await client.resolve("billing")).llm_model == "after"
        assert len(slm.subscriptions) == 1
