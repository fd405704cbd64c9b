"""No fault test can forget the history checker: what it does not ask for is judged all the same."""

from __future__ import annotations

import aiohttp
import pytest

from tests.support.faults import recording
from tests.support.faults.backends import backend, is_live
from tests.support.faults.network import proxied
from tests.support.faults.scripted import Peer, changed, config, scripted_slm
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import heard, subscribers
from tests.support.servers import eventually

AGENTS = {"default": (1, config("d", is_default=True))}


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="it records no stream")
async def test_a_test_without_a_stream_fails() -> None:
    """A fault test in which no stream is recorded shows nothing, and so it fails."""


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="a revision is missing")
async def test_a_test_that_asserts_nothing_fails_for_a_hole() -> None:
    """A hole in what the SDK hears fails a test that never looks at frames."""

    async def script(peer: Peer) -> None:
        await peer.subscribed(5)
        await peer.say(changed("billing", 7, "six is missing"))
        await peer.live(7)

    async with (
        scripted_slm(revision=5, agents=AGENTS, scripts=[script]) as slm,
        backend(slm.url, "t") as client,
    ):
        await eventually(lambda: client.revision == 7)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="no frame is garbage")
@pytest.mark.history(faults="no frame of the contract")
async def test_a_fault_that_does_not_happen_fails() -> None:
    """A test whose frames are to be wrong fails when they are all right."""

    async def script(peer: Peer) -> None:
        await peer.subscribed(5)
        await peer.live(5)

    async with (
        scripted_slm(revision=5, agents=AGENTS, scripts=[script]) as slm,
        backend(slm.url, "t") as client,
    ):
        await eventually(lambda: is_live(client))


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="the change is in no database")
async def test_what_the_database_does_not_hold_fails(sqlite_site: Site) -> None:
    """A stream that tells of a change is compared with the database of the test's site."""

    async def script(peer: Peer) -> None:
        await peer.subscribed(5)
        await peer.say(changed("billing", 6, "made up"))
        await peer.live(6)

    async with (
        sqlite_site.process(),
        scripted_slm(revision=5, agents=AGENTS, scripts=[script]) as slm,
        backend(slm.url, "t") as client,
    ):
        await eventually(lambda: client.revision == 6)


async def test_each_way_of_listening_is_recorded(sqlite_site: Site) -> None:
    """The SDK, the subscriber, a single look and what passes a proxy are all in the recording."""
    async with (
        sqlite_site.process() as server,
        proxied(server.url) as proxy,
        aiohttp.ClientSession() as http,
        subscribers(1, server.url, sqlite_site.backend_token) as subs,
        backend(proxy.url, sqlite_site.backend_token) as client,
    ):
        revision = await Operator(http, server.url, sqlite_site.admin_token).create("billing")
        await eventually(lambda: subs[0].reached(revision) and client.revision >= revision)
        await heard(http, server.url, sqlite_site.backend_token, upto=revision)
    now = recording.now
    [passed] = now.passed.values()
    kinds = [
        [frame["type"] for connection in history for frame in connection.frames]
        for history in [*now.heard.values(), passed]
    ]
    assert len(now.heard) == 3
    assert sorted(kind.count("agent_created") for kind in kinds) == [0, 1, 1, 1]
    assert all(kind[0] == "subscribed" for kind in kinds)
