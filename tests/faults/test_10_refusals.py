"""Fault 10: every HTTP refusal at connect and at reconnect: backoff or minutes, never given up."""

from __future__ import annotations

import itertools

import pytest
from aiohttp import web

from slm.client.status import ClientStatus
from tests.support.faults.backends import backend, is_live
from tests.support.faults.scripted import Peer, ScriptedSLM, changed, config, scripted_slm
from tests.support.servers import eventually

AGENTS = {"default": (1, config("d", is_default=True)), "billing": (5, config("b"))}
TRIES = 3


async def once(peer: Peer) -> None:
    """Go live for a moment, then away."""
    await peer.subscribed(5)
    await peer.say({"type": "heartbeat", "revision": 5, "behind": False})


async def lasting(peer: Peer) -> None:
    await peer.subscribed(peer.asked.get("since", 5))
    await peer.say(changed("billing", 6, "after"))
    await peer.live(6)


def refusing(slm: ScriptedSLM, status: int, first: int, **headers: str) -> None:
    """Refuse `TRIES` handshakes from number `first` on."""
    slm.refuse = lambda n: (
        web.Response(status=status, headers=headers) if first <= n < first + TRIES else None
    )


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.mark.parametrize("when", ["connect", "reconnect"])
@pytest.mark.parametrize("status", [400, 408, 500, 503])
async def test_backoff(status: int, when: str) -> None:
    """These are tried again with the normal backoff, and the backend recovers by itself."""
    first = 0 if when == "connect" else 1
    scripts = [lasting] if when == "connect" else [once, lasting]
    async with scripted_slm(revision=5, agents=AGENTS, scripts=scripts) as slm:
        refusing(slm, status, first)
        async with backend(slm.url, "t", start_timeout=0.2) as client:
            await eventually(lambda: client.revision == 6 and is_live(client))
        assert len(slm.handshakes) == first + TRIES + 1
        if when == "reconnect":
            assert slm.subscriptions[1]["since"] == 5


@pytest.mark.parametrize("when", ["connect", "reconnect"])
async def test_retry_after(when: str) -> None:
    """A 429 or 503 that says when to come back is not asked before then."""
    first = 0 if when == "connect" else 1
    scripts = [lasting] if when == "connect" else [once, lasting]
    async with scripted_slm(revision=5, agents=AGENTS, scripts=scripts) as slm:
        refusing(slm, 429, first, **{"Retry-After": "1"})
        async with backend(slm.url, "t", start_timeout=0.2) as client:
            await eventually(lambda: client.revision == 6 and is_live(client), 20)
        assert all(gap >= 1 for gap in gaps(slm.handshakes)[first:])


@pytest.mark.parametrize("when", ["connect", "reconnect"])
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_token(status: int, when: str) -> None:
    """A refused token is tried once in a while (minutes; here seconds), and never given up."""
    first = 0 if when == "connect" else 1
    scripts = [lasting] if when == "connect" else [once, lasting]
    async with scripted_slm(revision=5, agents=AGENTS, scripts=scripts) as slm:
        refusing(slm, status, first)
        async with backend(slm.url, "t", {"refused_retry_seconds": 0.6}) as client:
            await eventually(lambda: client.status is ClientStatus.UNAUTHORIZED)
            assert client.last_error is not None
            if when == "reconnect":
                assert (await client.resolve("billing")).llm_model == "b"
            await eventually(lambda: client.revision == 6 and is_live(client), 20)
        assert len(slm.handshakes) == first + TRIES + 1
        # Jitter makes it 0.75 to 1.25 of the interval.
        assert all(gap >= 0.75 * 0.6 for gap in gaps(slm.handshakes)[first:])
