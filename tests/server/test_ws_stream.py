"""The stream at /ws, heard by a plain client: order, resuming, resync, heartbeats."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import Connection, delete, select, update

from slm.protocol import Ack
from slm.schemas import Agent
from slm.server.agents.changes import CommittedChange
from slm.server.agents.schemas import AgentUpdate
from slm.server.db.tables import CHANGES, STATE
from slm.server.security.audit import Who
from slm.server.stream.encoding import Frames, encode_change
from slm.server.transport.ws_connection import WebSocketConnection
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "messages.json").read_text())
TYPES = {"agent_config_changed", "agent_created", "agent_deleted"}


async def history(server: InLoopServer) -> list[dict[str, Any]]:
    """Every frame that the changes table stands for, read from the database itself."""

    def rows(connection: Connection) -> list[dict[str, Any]]:
        frames = []
        for row in connection.execute(select(CHANGES).order_by(CHANGES.c.revision)):
            agent = json.loads(row.agent)
            frame = {
                "type": row.type,
                "agent_id": row.agent_id,
                "revision": row.revision,
                "change_id": row.change_id,
            }
            if row.type != "agent_deleted":
                names = GOLDEN["server"]["agent_config_changed"]["config"]
                frame["config"] = {name: agent[name] for name in names}
            frames.append(frame)
        return frames

    return await server.running.services.database.read(rows)


@pytest.mark.parametrize("name", ["agent_config_changed", "agent_created", "agent_deleted"])
def test_frames_are_the_golden_messages(name: str) -> None:
    """A change of the golden file is encoded as it stands there, to the letter."""
    golden = GOLDEN["server"][name]
    agent = GOLDEN["http"]["agent"] | golden.get("config", {}) | {"agent_id": golden["agent_id"]}
    change = CommittedChange(
        golden["revision"], name, Agent.model_validate(agent), change_id=golden["change_id"]
    )
    assert json.loads(encode_change(change)) == golden


async def test_live_changes_from_now_on(admin: Api, backend: Api) -> None:
    """Without since: `subscribed` at the head, then each change once, in order, with its fields."""
    await admin.create("before")
    async with backend.stream() as socket:
        subscribed = await socket.frame()
        assert subscribed == {
            "type": "subscribed",
            "channel": "agent_config",
            "revision": 2,
            "epoch": (await admin.get("/api/agents")).headers["SLM-Epoch"],
            "heartbeat": 2.0,
            "head": 2,
            "change_id": (await history(admin.server))[-1]["change_id"],
        }
        await admin.create("a", llm_provider="openai", llm_api_key="sk-canary-frame")
        await admin.put("a", is_default=True)
        await admin.delete("default")
        frames = await socket.until(6)
    assert frames == (await history(admin.server))[2:]
    assert [frame["type"] for frame in frames] == [
        "agent_created",
        "agent_config_changed",
        "agent_config_changed",
        "agent_deleted",
    ]
    assert [frame["agent_id"] for frame in frames] == ["a", "a", "default", "default"]
    assert "sk-canary-frame" not in json.dumps(frames)


async def test_a_burst_is_one_write_to_each_stream_and_one_message_a_change(
    admin: Api, backend: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five changes that come at once are one write to each of three sockets, and five messages."""
    services = admin.server.running.services
    await services.feed.stop()
    push = WebSocketConnection.push
    writes: dict[WebSocketConnection, list[int]] = {}

    def counting(connection: WebSocketConnection, frames: Frames) -> int:
        if '"agent_config_changed"' in frames.texts[0]:
            writes.setdefault(connection, []).append(len(frames.texts))
        return push(connection, frames)

    monkeypatch.setattr(WebSocketConnection, "push", counting)
    async with backend.stream() as one, backend.stream() as two, backend.stream() as three:
        for socket in (one, two, three):
            assert (await socket.next())["type"] == "subscribed"
        await eventually(lambda: services.hub.live_count() == 3)
        for number in range(5):
            change = AgentUpdate(llm_model=f"m{number}")
            await services.registry.update("default", change, who=Who("test"))
        services.feed.follow()
        for socket in (one, two, three):
            assert [f["revision"] for f in await socket.until(6)] == [2, 3, 4, 5, 6]
        assert list(writes.values()) == [[5], [5], [5]]


async def test_a_frame_comes_after_the_catalog_has_moved(admin: Api, backend: Api) -> None:
    """Whoever hears of a change and reads at once reads the change."""
    async with backend.stream() as socket:
        await socket.frame()
        for turn in range(20):
            write = asyncio.create_task(admin.put("default", llm_model=f"m{turn}"))
            frame = await socket.next()
            read = await backend.get("/api/agents/default")
            assert read.revision >= frame["revision"]
            assert read.json["llm_model"] == f"m{turn}"
            await write


async def test_since_replays_all_that_was_missed(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """From any revision on, page by page, everything after it and nothing twice, then live."""
    async with running_server(tmp_path, replay_page=3) as server:
        admin = Api(server, session, server.admin_token)
        for turn in range(10):
            await admin.create(f"a{turn}")
        epoch = (await admin.get("/api/agents")).headers["SLM-Epoch"]
        expected = await history(server)
        for since in (0, 1, 5, 10, 11):
            async with admin.stream(since=since, epoch=epoch) as socket:
                assert (await socket.frame())["revision"] == since
                assert [await socket.next() for _ in range(11 - since)] == expected[since:]
        async with admin.stream(since=9, epoch=epoch) as socket:
            await admin.put("default", description="live")
            assert [f["revision"] for f in await socket.until(12)] == [9, 10, 11, 12]


async def test_a_replay_under_writes_has_no_hole(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """While others write, replays join the live stream without losing or doubling a change."""
    async with running_server(tmp_path, replay_page=2) as server:
        admin = Api(server, session, server.admin_token)
        epoch = (await admin.get("/api/agents")).headers["SLM-Epoch"]
        for turn in range(20):
            await admin.put("default", llm_model=f"early{turn}")

        async def write() -> None:
            for turn in range(60):
                await admin.put("default", llm_model=f"m{turn}")

        async def listen(since: int) -> list[dict[str, Any]]:
            async with admin.stream(since=since, epoch=epoch) as socket:
                assert (await socket.next())["type"] == "subscribed"
                return await socket.until(81, timeout=30)

        writing = asyncio.create_task(write())
        heard = await asyncio.gather(*(listen(since) for since in range(0, 20, 2)))
        await writing
        expected = await history(server)
        for since, frames in zip(range(0, 20, 2), heard, strict=True):
            assert frames == expected[since:]


async def test_resync_where_since_cannot_be_resumed(admin: Api) -> None:
    """Another epoch, beyond the database, or compacted: `resync` at the head, and on from there."""
    for turn in range(5):
        await admin.put("default", llm_model=f"m{turn}")
    epoch = (await admin.get("/api/agents")).headers["SLM-Epoch"]

    def compact(connection: Connection) -> None:
        connection.execute(delete(CHANGES).where(CHANGES.c.revision <= 3))
        connection.execute(update(STATE).values(floor=3))

    await admin.server.running.services.database.run(compact)
    head = 6
    for since, of_epoch, reason in (
        (4, "another", "epoch"),
        (99, epoch, "ahead"),
        (2, epoch, "compacted"),
        (0, epoch, "compacted"),
    ):
        async with admin.stream(since=since, epoch=of_epoch) as socket:
            subscribed = await socket.frame()
            assert (subscribed["type"], subscribed["revision"]) == ("subscribed", head)
            assert await socket.frame() == {
                "type": "resync",
                "revision": head,
                "epoch": epoch,
                "reason": reason,
                "change_id": subscribed["change_id"],
            }
            await admin.put("default", description=reason + str(since))
            head += 1
            assert (await socket.next())["revision"] == head
    async with admin.stream(since=3, epoch=epoch) as socket:
        assert (await socket.frame())["revision"] == 3
        assert [f["revision"] for f in await socket.until(head)] == list(range(4, head + 1))


async def test_a_new_epoch_moves_every_stream(admin: Api) -> None:
    """When the database's life changes under a server, live streams get `resync` with its epoch."""
    async with admin.stream() as one, admin.stream() as two:
        for socket in (one, two):
            await socket.frame()

        def renew(connection: Connection) -> None:
            connection.execute(update(STATE).values(epoch="feedbeef"))

        await admin.server.running.services.database.run(renew)
        for socket in (one, two):
            assert await socket.next() == {
                "type": "resync",
                "revision": 1,
                "epoch": "feedbeef",
                "reason": "epoch",
                "change_id": (await history(admin.server))[0]["change_id"],
            }
        await admin.put("default", llm_model="new")
        assert (await one.next())["revision"] == 2
    assert (await admin.get("/api/agents")).headers["SLM-Epoch"] == "feedbeef"


async def test_a_fallen_revision_makes_a_new_epoch(admin: Api) -> None:
    """A database put back under a running server gets a new epoch, and everyone a `resync`."""
    for turn in range(3):
        await admin.put("default", llm_model=f"m{turn}")
    epoch = (await admin.get("/api/agents")).headers["SLM-Epoch"]
    async with admin.stream() as socket:
        await socket.frame()

        def fall(connection: Connection) -> None:
            connection.execute(delete(CHANGES).where(CHANGES.c.revision > 2))
            connection.execute(update(STATE).values(revision=2))

        await admin.server.running.services.database.run(fall)
        resync = await socket.next()
        assert (resync["type"], resync["revision"], resync["reason"]) == ("resync", 2, "epoch")
        assert resync["epoch"] != epoch
    answer = await admin.get("/api/agents")
    assert (answer.revision, answer.headers["SLM-Epoch"]) == (2, resync["epoch"])


async def test_heartbeats_name_what_was_sent(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """A heartbeat names the last revision of its own connection, and never one not yet sent."""
    async with running_server(tmp_path, heartbeat_seconds=0.02) as server:
        admin = Api(server, session, server.admin_token)
        async with admin.stream() as socket:
            frame = await socket.frame()
            sent, change_id = frame["revision"], frame["change_id"]
            writes = asyncio.create_task(_write_some(admin, 20))
            beats = 0
            while sent < 21 or beats < 5:
                frame = await socket.frame()
                if frame["type"] == "heartbeat":
                    assert frame == {
                        "type": "heartbeat",
                        "revision": sent,
                        "behind": False,
                        "change_id": change_id,
                    }
                    beats += 1
                else:
                    assert frame["revision"] == sent + 1
                    sent, change_id = sent + 1, frame["change_id"]
            await writes


async def _write_some(admin: Api, count: int) -> None:
    for turn in range(count):
        await admin.put("default", llm_model=f"m{turn}")


async def test_heartbeats_say_behind_while_the_database_is_away(admin: Api) -> None:
    """`behind` comes when the last good look is too old, at once, and goes when it is back."""
    database = admin.server.running.services.database
    async with admin.stream() as socket:
        await socket.frame()
        await database.close()
        assert await _next_beat(socket, behind=True)
        await database.open()
        assert await _next_beat(socket, behind=False)
        await admin.put("default", llm_model="after")
        assert (await socket.next())["revision"] == 2


async def _next_beat(socket: Any, *, behind: bool) -> bool:
    async with asyncio.timeout(10):
        while (await socket.frame()).get("behind") is not behind:
            pass
    return True


async def test_the_head_can_be_joined_while_the_database_is_away(admin: Api) -> None:
    """Who has everything needs no replay; who has not is closed with 1013 and comes back."""
    await admin.put("default", llm_model="one")
    services = admin.server.running.services
    epoch = services.feed.epoch
    await services.database.close()
    async with admin.stream(since=2, epoch=epoch) as socket:
        assert (await socket.frame())["revision"] == 2
    async with admin.stream(since=1, epoch=epoch) as socket:
        assert await socket.close_code() == 1013
    await services.database.open()


async def test_a_wrong_message_gets_an_error_and_the_stream_goes_on(admin: Api) -> None:
    """Wrong shapes, since without epoch, a second subscription: `error`, and the stream lives."""
    async with admin.stream() as socket:
        await socket.frame()
        wrong: list[dict[str, Any]] = [
            *GOLDEN["client_refused"].values(),
            {},
            {"subscribe": "agent_config"},
            {"hello": "sk-canary-hello"},
            {"ack": "x", "keys": []},
        ]
        for message in wrong:
            await socket.send(**message)
            answer = await socket.next()
            assert (answer["type"], answer["code"]) == ("error", "bad-message")
            assert "canary" not in answer["detail"]
        await socket.ws.send_str("[1, 2]")
        assert (await socket.next())["type"] == "error"
        await admin.put("default", llm_model="still here")
        assert (await socket.next())["revision"] == 2


async def test_the_last_ack_is_kept(admin: Api) -> None:
    """What a client says that it has, and who it is, is kept."""
    services = admin.server.running.services
    await admin.create("code-assistant")
    client = {"name": "billing", "instance": "b-1", "version": "1", "host": "h", "pid": 7}
    async with admin.stream(client=client) as socket:
        await socket.frame()
        for name in ("ack", "ack_with_refusals"):
            await socket.ws.send_str(json.dumps(GOLDEN["client"][name]))
        [backend] = services.fleet.backends()
        await eventually(lambda: backend.keys)
        last = backend.acks.last
        assert last is not None
        said = Ack(ack=last.revision, not_in_force=dict(last.not_in_force), keys=dict(backend.keys))
        assert said.model_dump() == GOLDEN["client"]["ack_with_refusals"]
        assert backend.client.model_dump() == client | {"plain_http": None}
    await eventually(lambda: not services.hub.subscribers())


@pytest.mark.parametrize("seed", range(3))
async def test_any_mix_of_writes_is_heard_as_it_was_committed(
    tmp_path: Path, session: aiohttp.ClientSession, seed: int
) -> None:
    """Concurrent creates, updates, deletes and promotions: every stream equals the changes table.

    Ordered, each revision once, no hole, whenever and from wherever a subscriber came in.
    """
    chance = random.Random(seed)
    async with running_server(tmp_path, replay_page=7) as server:
        admin = Api(server, session, server.admin_token)
        epoch = server.running.services.feed.epoch
        heard: list[tuple[int, list[dict[str, Any]]]] = []
        done = asyncio.Event()

        async def write(number: int) -> None:
            for turn in range(25):
                agent_id = f"a{chance.randrange(6)}"
                match chance.randrange(5):
                    case 0:
                        await admin.create(agent_id)
                    case 1:
                        await admin.delete(agent_id)
                    case 2:
                        await admin.put(agent_id, is_default=True)
                    case _:
                        await admin.put(agent_id, llm_model=f"{number}-{turn}")

        async def listen() -> None:
            since = chance.choice([None, 0, chance.randrange(1 + server.running.services.hub.head)])
            wanted = {} if since is None else {"since": since, "epoch": epoch}
            async with admin.stream(**wanted) as socket:
                first = await socket.frame()
                assert first["type"] == "subscribed"
                frames: list[dict[str, Any]] = []
                heard.append((first["revision"], frames))
                reached = first["revision"]
                while not done.is_set() or reached < server.running.services.feed.position:
                    frame = await socket.frame()
                    if frame["type"] == "heartbeat":
                        assert frame["revision"] == reached
                        continue
                    assert frame["type"] in TYPES
                    frames.append(frame)
                    reached = frame["revision"]

        async def listeners() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(12):
                    group.create_task(listen())
                    await asyncio.sleep(chance.random() / 50)

        listening = asyncio.create_task(listeners())
        await asyncio.gather(*(write(number) for number in range(4)))
        done.set()
        # One more change, so that whoever waits for a frame gets one.
        await admin.put("default", description="the end")
        await asyncio.wait_for(listening, 30)
        expected = await history(server)
        assert [frame["revision"] for frame in expected] == list(range(1, len(expected) + 1))
        assert len(heard) == 12
        for start, frames in heard:
            assert frames == expected[start:][: len(frames)]
            assert len(frames) >= len(expected) - start - 1
