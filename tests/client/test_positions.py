"""What the SDK resumes from: a revision, its epoch and the change that it was; and when it is live.

Against a scripted SLM, so that each order of frames and answers is made on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm import SLMClient
from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.snapshot_file import SnapshotFile
from slm.client.status import ClientStatus
from slm.schemas import LLMConfigWithKey, Snapshot
from tests.client.test_golden import EPOCH, client_of
from tests.support.faults.scripted import Peer, changed, config, scripted_slm
from tests.support.servers import eventually

AGENTS: dict[str, tuple[int, dict[str, Any]]] = {"default": (1, config("m", is_default=True))}


def _subscribed(revision: int, change_id: str, **more: Any) -> dict[str, Any]:
    frame = {"type": "subscribed", "channel": "agent_config", "heartbeat": 0.5, "epoch": EPOCH}
    return frame | {"revision": revision, "change_id": change_id} | more


def _beat(revision: int, change_id: str) -> dict[str, Any]:
    return {"type": "heartbeat", "revision": revision, "behind": False, "change_id": change_id}


async def test_the_last_change_is_resumed_from() -> None:
    """The id goes along with the revision: of a change, and of a heartbeat that stands for one."""
    ends: list[list[dict[str, Any]]] = [
        [changed("default", 43, "x") | {"change_id": "i43"}],
        [_beat(44, "i44")],
        [_beat(44, "i44")],
    ]

    async def script(peer: Peer) -> None:
        number = len(slm.subscriptions) - 1
        if number == 0:
            await peer.say(_subscribed(42, "i42"))
            await eventually(lambda: client.status is ClientStatus.LIVE)
        else:
            await peer.say(_subscribed(peer.asked["since"], peer.asked["change_id"]))
        frames = ends[min(number, 2)]
        await peer.say(*frames)
        await eventually(lambda: client.revision == frames[-1]["revision"])

    async with scripted_slm(revision=42, agents=AGENTS, scripts=[script]) as slm:
        client = client_of(slm)
        async with client:
            await eventually(lambda: len(slm.subscriptions) >= 3)
    asked = [(one.get("since"), one.get("change_id")) for one in slm.subscriptions]
    assert asked[:3] == [(None, None), (43, "i43"), (44, "i44")]
    assert slm.snapshots == 1


async def test_a_resumed_client_is_live_at_the_head() -> None:
    """Until it reaches the head that was named, it is not live and its answers are stale."""

    async def first(peer: Peer) -> None:
        await peer.say(_subscribed(42, "i42"))
        await eventually(lambda: client.status is ClientStatus.LIVE)

    async def second(peer: Peer) -> None:
        await peer.say(_subscribed(42, "i42", head=44))
        await peer.say(changed("default", 43, "x") | {"change_id": "i43"}, _beat(43, "i43"))
        await eventually(lambda: client.revision == 43)
        seen.append(client.status)
        await peer.say(changed("default", 44, "y") | {"change_id": "i44"})
        await eventually(lambda: client.status is ClientStatus.LIVE)
        seen.append(client.status)
        await peer.live(44)

    seen: list[ClientStatus] = []
    async with scripted_slm(revision=42, agents=AGENTS, scripts=[first, second]) as slm:
        client = client_of(slm)
        async with client:
            await eventually(lambda: len(seen) == 2)
            assert (await client.resolve("default")).llm_model == "y"
    assert seen == [ClientStatus.SYNCING, ClientStatus.LIVE]


async def test_a_newer_snapshot_is_not_resumed_from() -> None:
    """Only the stream's position is resumed: a snapshot may come from a database that lost it."""

    async def first(peer: Peer) -> None:
        await peer.say(_subscribed(42, "i42"))
        await eventually(lambda: client.status is ClientStatus.LIVE)
        assert client.revision == 45

    async def second(peer: Peer) -> None:
        await peer.say(_subscribed(42, "i42", head=45))
        await peer.say(*(changed("default", n, "m") for n in (43, 44, 45)))
        await peer.live(45)

    async with scripted_slm(revision=45, agents=AGENTS, scripts=[first, second]) as slm:
        client = client_of(slm)
        async with client:
            await eventually(lambda: len(slm.subscriptions) == 2)
            await eventually(lambda: client.status is ClientStatus.LIVE)
            assert client.revision == 45
    asked = slm.subscriptions[1]
    assert (asked["since"], asked["change_id"]) == (42, "i42")


def _snapshot(revision: int, change_id: str | None, **models: tuple[int, str]) -> Snapshot:
    agents = [
        LLMConfigWithKey(agent_id=agent_id, revision=at, llm_provider="ollama", llm_model=model)
        for agent_id, (at, model) in models.items()
    ]
    return Snapshot(revision=revision, epoch="e1", change_id=change_id, agents=agents)


def test_a_snapshot_that_contradicts_the_stream_replaces_everything() -> None:
    """The same revision, another change: what the stream told is not in that database."""
    cache = AgentConfigCache()
    cache.begin("e1", 5, "lost")
    cache.apply_snapshot(_snapshot(5, "lost", a=(5, "lost")))
    assert cache.ready["a"].llm_model == "lost"
    generation = cache.position.generation
    cache.apply_snapshot(_snapshot(5, "new", a=(3, "older"), b=(5, "new")))
    assert cache.position.generation > generation
    assert {name: value.llm_model for name, value in cache.ready.items()} == {
        "a": "older",
        "b": "new",
    }
    assert cache.position.heard == (5, "new")


async def _live_once(url: str, path: Path) -> None:
    async with SLMClient(url, "t", cache_file=path) as client:
        await eventually(lambda: client.status is ClientStatus.LIVE)


async def test_the_file_keeps_the_position(tmp_path: Path) -> None:
    """A backend that starts from its snapshot file resumes from the change that it last heard."""
    path = tmp_path / "cache.json"

    async def script(peer: Peer) -> None:
        await peer.say(_subscribed(peer.asked.get("since", 42), "i42"))
        await peer.live(42)

    async with scripted_slm(revision=42, agents=AGENTS, scripts=[script]) as slm:
        slm.epoch = EPOCH
        for _ in range(2):
            await _live_once(slm.url, path)
        loaded = SnapshotFile(path).load()
    assert loaded is not None
    assert (loaded.revision, loaded.change_id) == (42, "i42")
    asked = slm.subscriptions[1]
    assert (asked["since"], asked["change_id"]) == (42, "i42")
