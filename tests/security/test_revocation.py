"""A revoked token is out at once, wherever it is: in a body, a transaction, a wait, or a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from pydantic import SecretStr
from sqlalchemy import select, update

from slm.errors import DatabaseUnavailable
from slm.server.db.tables import AUDIT, REPLICAS, STATE, TOKENS, utc_now
from slm.server.security.tokens import SCOPES
from tests.security.test_doors import BODIES, RULES
from tests.support.http import Answer, Caller, admin, agent, make_token
from tests.support.servers import InLoopServer, eventually, running_server

KEYS: Final = SecretStr("MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")
NEVER: Final = 1000.0

KEYED: Final = [("GET", "/api/snapshot"), ("GET", "/api/agents/{agent_id}/llm")]
CHANGING: Final = [rule for rule in RULES if rule[0] not in ("GET", "WEBSOCKET")]


def database_of(engine: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings that put a server on this engine."""
    if engine == "sqlite":
        return {}
    url = SecretStr(request.getfixturevalue("postgres_url"))
    return {"database_url": url, "encryption_keys": KEYS}


@pytest.fixture(params=["sqlite", "postgresql"])
async def deaf(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[InLoopServer]:
    """A server that looks at its database only when something makes it."""
    engine = database_of(request.param, request)
    settings = {"poll_interval_seconds": NEVER, "behind_after_seconds": NEVER}
    async with running_server(tmp_path / "data", **engine, **settings) as server:
        yield server


async def id_of(ask: Caller, name: str) -> int:
    tokens = (await ask("GET", "/api/admin/tokens")).body["tokens"]
    return next(int(token["id"]) for token in reversed(tokens) if token["name"] == name)


async def revoke(ask: Caller, name: str) -> Answer:
    answer = await ask("DELETE", f"/api/admin/tokens/{await id_of(ask, name)}")
    assert answer.status == 200
    return answer


async def revoke_elsewhere(server: InLoopServer, name: str) -> None:
    """Revoke a token as another server does, without a wake-up."""

    def work(connection: Any) -> None:
        raised = update(STATE).values(tokens_version=STATE.c.tokens_version + 1)
        connection.execute(raised)
        mine = update(TOKENS).where(TOKENS.c.name == name)
        connection.execute(mine.values(revoked_at=utc_now()))

    await server.running.services.database.run(work)


async def actions_of(server: InLoopServer, actor: str) -> list[str]:
    wanted = select(AUDIT.c.action).where(AUDIT.c.actor == actor)
    database = server.running.services.database
    return await database.read(lambda c: list(c.execute(wanted).scalars()))


async def test_a_transaction_asks_whether_the_token_counts(deaf: InLoopServer) -> None:
    """No route writes or hands out a key for a token that was revoked elsewhere a moment ago."""
    on_sqlite = deaf.running.services.database.dialect == "sqlite"
    async with admin(deaf) as ask:
        await ask("POST", "/api/agents", agent("a", llm_api_key="sk-a"))
        await ask("PUT", "/api/agents/a", {"llm_model": "o"})
        victim = await make_token(ask, "victim", *SCOPES)
        await revoke_elsewhere(deaf, "victim")
        assert (await victim("GET", "/api/agents")).status == 200, "this server has not heard of it"
        before = (await ask("GET", "/api/agents")).body
        number = await id_of(ask, "backend")
        for method, path in CHANGING + KEYED:
            answer = await victim(
                method, path.format(agent_id="a", token_id=number), BODIES.get((method, path))
            )
            if path.endswith("/backup") and not on_sqlite:
                # Nothing is there to hand out; refused sooner where the wake-up of the
                # token's own making comes this late.
                assert answer.status in (401, 422)
            else:
                assert (answer.status, answer.code) == (401, "unauthorized"), (method, path)
        assert await actions_of(deaf, "victim") == []
        assert (await ask("GET", "/api/agents")).body == before


async def test_a_token_is_asked_for_again_after_the_body(server: InLoopServer) -> None:
    """Whoever is revoked while its body arrives is refused when it is there, and does nothing."""
    async with admin(server) as ask:
        await ask("POST", "/api/agents", agent("a"))
        for number, (rule, body) in enumerate(BODIES.items()):
            victim = await make_token(ask, f"victim {number}", *SCOPES)
            await slow_body(server, ask, victim, *rule, json.dumps(body).encode())
            assert await actions_of(server, f"victim {number}") == [], rule


async def slow_body(
    server: InLoopServer, ask: Caller, victim: Caller, method: str, path: str, body: bytes
) -> None:
    """Send a head and most of a body, revoke the token, send the rest: 401."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"{method} {path.format(agent_id='a')} HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {victim.token}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body[:-1]
    )
    await writer.drain()
    # The head was judged once the token is known to have been used.
    tokens = server.running.services.tokens
    number = (await ask("GET", "/api/admin/tokens")).body["tokens"][-1]["id"]
    await eventually(lambda: number in tokens.used)
    assert (await ask("DELETE", f"/api/admin/tokens/{number}")).status == 200
    writer.write(body[-1:])
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 401 "), (method, path, head)


async def test_a_feed_that_fails_keeps_no_revoked_token_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are followed whatever the feed is at: here each of its polls fails."""
    async with running_server(tmp_path / "data") as server, admin(server) as ask:
        victim = await make_token(ask, "victim", "config:read")

        async def broken() -> None:
            raise RuntimeError

        monkeypatch.setattr(server.running.services.feed, "_poll", broken)
        async with victim.stream() as stream:
            await revoke_elsewhere(server, "victim")
            assert await stream.closed(timeout=2) == 1008
        assert (await victim("GET", "/api/agents")).status == 401


async def test_a_revocation_is_in_force_before_its_answer_under_steady_writes(
    server: InLoopServer,
) -> None:
    """With writers all the while, whose commits overtake every look, nobody waits for a look."""
    async with admin(server) as ask:
        victim = await make_token(ask, "victim", "config:read", "agents:write")
        await ask("POST", "/api/agents", agent("a"))
        over = False

        async def write(number: int) -> None:
            count = 0
            while not over:
                count += 1
                body = {"llm_timeout": 1 + (number + 8 * count) % 3000}
                assert (await ask("PUT", "/api/agents/a", body)).status == 200

        writers = [asyncio.create_task(write(number)) for number in range(8)]
        try:
            await revoke(ask, "victim")
            refused = [
                (await victim("GET", "/api/agents/a")).status,
                (await victim("PUT", "/api/agents/a", {"llm_model": "n"})).status,
            ]
            fresh = await make_token(ask, "fresh", "config:read")
            assert (await fresh("GET", "/api/agents/a")).status == 200, "and so is a new token"
            assert refused == [401, 401]
        finally:
            over = True
            await asyncio.gather(*writers)
        assert await actions_of(server, "victim") == []


@contextlib.asynccontextmanager
async def silent_backend(ask: Caller, revision: int) -> AsyncIterator[None]:
    """A backend that acked once, and answers nothing any more."""
    async with ask.stream(client={"name": "silent", "instance": "1"}) as stream:
        await stream.socket.send_json({"ack": revision})
        # Whoever is answered after this ack is answered after it was taken in.
        await stream.socket.send_json({"ack": "wrong"})
        while (await stream.next())["type"] != "error":
            pass
        yield


async def test_waits_end_with_their_token(tmp_path: Path) -> None:
    """A receipt, a revision and an explanation are waited for no longer: 401 within two seconds."""
    async with (
        running_server(tmp_path / "data", min_revision_wait_seconds=30) as server,
        admin(server) as ask,
    ):
        start = (await ask("GET", "/api/agents")).body["revision"]
        inside = server.running.services.doorkeeper._inside
        async with silent_backend(ask, start):
            changed = await ask("PUT", "/api/agents/default", {"llm_model": "n"})
            revision = changed.body["revision"]
            for path in (
                f"/api/changes/{revision}/receipt?wait=30s",
                f"/api/agents?min_revision={revision + 1000}",
                "/api/explain?agent_id=default&backend=silent/1",
            ):
                victim = await make_token(ask, "victim", "config:read")
                waiting = asyncio.create_task(victim("GET", path))
                await eventually(lambda: inside)
                await revoke(ask, "victim")
                async with asyncio.timeout(2):
                    answer = await waiting
                assert (answer.status, answer.code) == (401, "unauthorized"), path
            short = await make_token(ask, "short", "config:read", expires_in_seconds=1)
            async with asyncio.timeout(3):
                answer = await short("GET", f"/api/changes/{revision}/receipt?wait=30s")
            assert answer.status == 401, "an expired one too"


async def test_a_write_that_waits_is_answered_when_its_token_is_revoked(
    server: InLoopServer,
) -> None:
    """It was made, so the answer says so; its receipt is what is known by then."""
    async with admin(server) as ask:
        start = (await ask("GET", "/api/agents")).body["revision"]
        async with silent_backend(ask, start):
            victim = await make_token(ask, "victim", *SCOPES)
            path = "/api/agents/default?wait=30s"
            waiting = asyncio.create_task(victim("PUT", path, {"llm_model": "n"}))
            await eventually(lambda: server.running.services.fleet.waiters)
            await revoke(ask, "victim")
            async with asyncio.timeout(2):
                answer = await waiting
            assert answer.status == 200
            assert answer.body["receipt"]["pending"] == ["silent/1"]


async def test_a_copy_of_the_database_ends_with_its_token(
    server: InLoopServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that is under way when its token is revoked is cut off."""
    monkeypatch.setattr("slm.server.api.routes.backup._CHUNK_BYTES", 4096)
    async with admin(server) as ask:
        options = {"x": "y" * 15_000}
        for number in range(300):
            await ask("POST", "/api/agents", agent(f"a{number}", llm_options=options))
        victim = await make_token(ask, "victim", "admin")
        headers = {"Authorization": f"Bearer {victim.token}"}
        async with (
            aiohttp.ClientSession(read_bufsize=4096) as session,
            session.post(server.url + "/api/admin/backup", headers=headers) as answer,
        ):
            assert answer.status == 200
            await answer.content.readexactly(100)
            await revoke(ask, "victim")
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()


async def test_a_revocation_names_the_servers_that_have_not_confirmed_it(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usually none, at once; a live server that does not follow its tokens is named."""
    shared = {"database_url": SecretStr(postgres_url), "encryption_keys": KEYS}
    async with (
        running_server(tmp_path / "one", **shared) as one,
        running_server(tmp_path / "two", **shared) as two,
        admin(one) as ask,
    ):
        for name in ("first", "second"):
            await make_token(ask, name, "config:read")
        begun = time.monotonic()
        assert (await revoke(ask, "first")).body["unconfirmed"] == []
        assert time.monotonic() - begun < 1.5
        there = two.running.services
        monkeypatch.setattr(there.tokens, "take", lambda *_: None)

        def rename(connection: Any) -> None:
            mine = update(REPLICAS).where(REPLICAS.c.id == there.caretaker.lease.id)
            connection.execute(mine.values(name="two"))

        there.caretaker.lease.name = "two"
        await there.database.run(rename)
        assert (await revoke(ask, "second")).body["unconfirmed"] == ["two"]
        monkeypatch.undo()


async def test_on_sqlite_there_is_nobody_to_confirm(ask: Caller) -> None:
    """The answer has the list all the same, empty."""
    await make_token(ask, "first", "config:read")
    assert (await revoke(ask, "first")).body["unconfirmed"] == []


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
async def test_nobody_is_served_for_ever_without_the_database(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past SLM_MAX_OUTAGE_SECONDS a plain read is 503 and a stream closed with 1013, then not."""
    settings = {"max_outage_seconds": 0.6, **database_of(engine, request)}
    async with running_server(tmp_path / "data", **settings) as server, admin(server) as ask:
        database = server.running.services.database

        async def away(*_: Any, **__: Any) -> None:
            raise DatabaseUnavailable

        async with ask.stream() as stream:
            with monkeypatch.context() as cut:
                cut.setattr(database, "read", away)
                cut.setattr(database, "run", away)
                assert (await ask("GET", "/api/agents")).status == 200, "for a while"
                assert await stream.closed(timeout=5) == 1013
                answer = await ask("GET", "/api/agents")
                assert (answer.status, answer.code) == (503, "database-unavailable")
                assert "Retry-After" in answer.headers
                assert (await ask.as_("slm_no")("GET", "/api/agents")).status == 401
                with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                    async with ask.stream():
                        pass
                assert refusal.value.status == 503

        async def served() -> bool:
            return (await ask("GET", "/api/agents")).status == 200

        await eventually(served)
        async with ask.stream():
            pass
