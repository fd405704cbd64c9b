"""Tokens: made, limited, revoked, expired; what each can see, and when it is out."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from tests.support.http import Caller, agent, make_token
from tests.support.servers import InLoopServer, eventually, running_server


async def _make_agents(ask: Caller) -> None:
    for agent_id in ("code-a", "code-b", "billing", "secret-x"):
        body = agent(agent_id, llm_api_key=f"sk-{agent_id}")
        assert (await ask("POST", "/api/agents", body)).status == 201


async def test_a_token_is_shown_once_and_kept_as_a_digest(
    ask: Caller, server: InLoopServer
) -> None:
    """The answer that makes it is the only place where it stands; the table has its SHA-256."""
    made = await ask("POST", "/api/admin/tokens", {"name": "b", "scopes": ["config:read"]})
    token = made.body["token"]
    assert token.startswith("slm_")
    assert len(token) == 4 + 43, "256 random bits"
    assert made.headers["Cache-Control"] == "no-store"
    listed = await ask("GET", "/api/admin/tokens")
    assert [t["name"] for t in listed.body["tokens"]] == ["admin", "backend", "b"]
    assert token not in str(listed.body)
    assert (await ask.as_(token)("GET", "/api/agents")).status == 200
    await server.stop()
    with sqlite3.connect(server.data_dir / "slm.db") as database:
        stored = [row[0] for row in database.execute("SELECT digest FROM tokens")]
    database.close()
    assert hashlib.sha256(token.encode()).hexdigest() in stored
    everything = b"".join(p.read_bytes() for p in server.data_dir.glob("slm.db*"))
    assert token.encode() not in everything


SENSELESS: list[dict[str, Any]] = [
    {"name": "x", "scopes": []},
    {"name": "x", "scopes": ["config:write"]},
    {"name": "", "scopes": ["config:read"]},
    {"name": "x", "scopes": ["config:read"], "agents": []},
    {"name": "x", "scopes": ["config:read"], "agents": [""]},
    {"name": "x", "scopes": ["admin"], "agents": ["a*"]},
    {"name": "x", "scopes": ["config:read"], "expires_in_seconds": 0},
    {"name": "x", "scopes": ["config:read"], "expires_in_seconds": 10**12},
    {"name": "x", "scopes": ["config:read"], "token": "slm_mine"},
]


async def test_a_token_that_makes_no_sense_is_refused(ask: Caller) -> None:
    """No scope, an unknown one, an empty limit, a limited administrator, a chosen token: 422."""
    for body in SENSELESS:
        answer = await ask("POST", "/api/admin/tokens", body)
        assert (answer.status, answer.code) == (422, "invalid-request"), body


async def test_names_are_unique_and_the_last_administrator_stays(ask: Caller) -> None:
    """A name is given once while it counts; whoever could administer last is not revoked."""
    await make_token(ask, "b", "config:read")
    again = await ask("POST", "/api/admin/tokens", {"name": "b", "scopes": ["config:read"]})
    assert (again.status, again.code) == (409, "conflict")
    refused = await ask("DELETE", "/api/admin/tokens/1")
    assert (refused.status, refused.code) == (409, "conflict")
    other = await make_token(ask, "second admin", "admin")
    assert (await other("DELETE", "/api/admin/tokens/1")).status == 200
    assert (await ask("GET", "/api/agents")).status == 401
    assert (await other("DELETE", "/api/admin/tokens/99")).code == "token-not-found"


async def test_what_a_limited_token_sees(ask: Caller) -> None:
    """The list, one agent, /llm and the snapshot hold its agents and the default, nothing else."""
    await _make_agents(ask)
    limited = await make_token(
        ask, "limited", "config:read", "key:read", "agents:write", agents=["code-*", "billing"]
    )
    mine = ["default", "code-a", "code-b", "billing"]
    listed = (await limited("GET", "/api/agents")).body
    assert ([a["agent_id"] for a in listed["agents"]], listed["total"]) == (mine, 4)
    assert (await limited("GET", "/api/agents?search=secret")).body["total"] == 0
    assert (await limited("GET", "/api/agents?agent_id=secret-x")).body["agents"] == []
    snapshot = (await limited("GET", "/api/snapshot")).body
    assert [a["agent_id"] for a in snapshot["agents"]] == mine
    assert "secret-x" not in str(snapshot)
    for path in ("/api/agents/secret-x", "/api/agents/secret-x/llm"):
        hidden = await limited("GET", path)
        missing = await limited("GET", path.replace("secret-x", "no-such"))
        assert (hidden.status, hidden.body) == (404, missing.body), "as if it were not there"
    history = (await limited("GET", "/api/changes")).body
    assert "secret-x" not in str(history)
    assert (await limited("GET", "/api/agents/secret-x/history")).status == 404
    assert (await limited("GET", "/api/agents/code-a/llm")).body["llm_api_key"] == "sk-code-a"
    assert (await limited("GET", "/api/agents/default/llm")).status == 200
    assert (await limited("GET", "/api/agents/default")).body["agent_id"] == "default"


async def test_what_a_limited_token_writes(ask: Caller) -> None:
    """Its own agents; another one, there or not, is 403, and so is making one the default."""
    await _make_agents(ask)
    limited = await make_token(ask, "l", "config:read", "agents:write", agents=["code-*"])
    change = {"llm_model": "n"}
    assert (await limited("PUT", "/api/agents/code-a", change)).status == 200
    assert (await limited("POST", "/api/agents", agent("code-new"))).status == 201
    assert (await limited("DELETE", "/api/agents/code-b")).status == 204
    assert (await limited("PUT", "/api/agents/code-none", change)).status == 404
    refused = [
        await limited("PUT", "/api/agents/secret-x", change),
        await limited("PUT", "/api/agents/no-such", change),
        await limited("PUT", "/api/agents/default", change),
        await limited("DELETE", "/api/agents/secret-x"),
        await limited("POST", "/api/agents", agent("other")),
        await limited("POST", "/api/agents/secret-x/rollback", {}),
        await limited("PUT", "/api/agents/code-a", {"is_default": True}),
        await limited("POST", "/api/agents", agent("code-c", is_default=True)),
    ]
    assert [(r.status, r.code) for r in refused] == [(403, "forbidden")] * len(refused)
    default = (await ask("GET", "/api/agents/default")).body
    assert default["agent_id"] == "default"


async def test_what_a_limited_stream_hears(ask: Caller) -> None:
    """A change outside its view is a heartbeat with its revision; a demotion is a deletion."""
    await _make_agents(ask)
    limited = await make_token(ask, "l", "config:read", agents=["code-*"])
    everyone = await make_token(ask, "all", "config:read")
    start = (await ask("GET", "/api/agents")).body
    async with limited.stream() as stream, everyone.stream() as whole:
        await ask("PUT", "/api/agents/secret-x", {"llm_model": "n"})
        await ask("PUT", "/api/agents/code-a", {"llm_model": "n"})
        # secret-x becomes the default, which is always visible, and then is not any more.
        await ask("PUT", "/api/agents/secret-x", {"is_default": True})
        await ask("PUT", "/api/agents/secret-x", {"llm_model": "o"})
        await ask("PUT", "/api/agents/code-b", {"is_default": True})
        await ask("POST", "/api/agents", agent("hidden"))
        await ask("DELETE", "/api/agents/hidden")
        last = await ask("DELETE", "/api/agents/code-a")
        head = int(last.headers["SLM-Revision"])
        heard = await stream.upto(head)
        all_heard = [m for m in await whole.upto(head) if m["type"] != "heartbeat"]
    r = start["revision"]
    told = [(m["revision"] - r, m["type"], m.get("agent_id")) for m in heard if m["revision"] > r]
    # A heartbeat of the clock may name a revision twice.
    told = [t for i, t in enumerate(told) if i == 0 or t[0] != told[i - 1][0]]
    assert told == [
        (1, "heartbeat", None),
        (2, "agent_config_changed", "code-a"),
        (3, "agent_config_changed", "secret-x"),
        (4, "agent_deleted", "default"),
        (5, "agent_config_changed", "secret-x"),
        (6, "agent_config_changed", "code-b"),
        (7, "agent_deleted", "secret-x"),
        (8, "heartbeat", None),
        (9, "heartbeat", None),
        (10, "agent_deleted", "code-a"),
    ]
    assert [m["revision"] - r for m in all_heard] == list(range(1, 11)), "nobody else is limited"
    async with limited.stream(since=r, epoch=start["epoch"]) as stream:
        replayed = await stream.upto(head)
    again = [(m["revision"] - r, m["type"], m.get("agent_id")) for m in replayed]
    # A replay tells the same, without the configuration of what is not visible any more.
    hidden = [(3, "agent_config_changed", "secret-x"), (5, "agent_config_changed", "secret-x")]
    told = [(t[0], "heartbeat", None) if t in hidden else t for t in told]
    assert [t for t in again if t[0] > 0] == told


async def test_revocation_closes_open_streams_and_refuses_the_next_request(ask: Caller) -> None:
    """Within two seconds the stream is closed with 1008; other streams stay."""
    victim = await make_token(ask, "victim", "config:read")
    number = (await ask("GET", "/api/admin/tokens")).body["tokens"][-1]["id"]
    async with victim.stream() as stream, ask.stream() as other:
        assert (await ask("DELETE", f"/api/admin/tokens/{number}")).status == 200
        assert await stream.closed(timeout=2) == 1008
        refused = await victim("GET", "/api/agents")
        assert (refused.status, refused.code) == (401, "unauthorized")
        changed = await ask("PUT", "/api/agents/default", {"llm_model": "n"})
        await other.upto(int(changed.headers["SLM-Revision"]))
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        async with victim.stream():
            pass
    assert refusal.value.status == 401


async def test_expiry_closes_open_streams(ask: Caller) -> None:
    """A token's time runs out by the clock, with a stream open, and nobody has to do anything."""
    short = await make_token(ask, "short", "config:read", expires_in_seconds=1)
    async with short.stream() as stream:
        assert await stream.closed(timeout=3) == 1008
    assert (await short("GET", "/api/agents")).status == 401
    named = (await ask("GET", "/api/admin/tokens")).body["tokens"][-1]
    assert named["expires_at"] is not None
    assert (await make_token(ask, "short", "config:read")).token != short.token, "the name is free"


async def test_revocation_reaches_every_replica(tmp_path: Any, postgres_url: str) -> None:
    """Revoked on one replica, the stream on another is closed within two seconds."""
    shared = {
        "database_url": SecretStr(postgres_url),
        "encryption_keys": SecretStr("MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="),
        # So slow that only NOTIFY can be in time.
        "poll_interval_seconds": 30,
    }
    async with (
        running_server(tmp_path / "one", **shared) as one,
        running_server(tmp_path / "two", **shared) as two,
        aiohttp.ClientSession() as session,
    ):
        here = Caller(one.url, one.admin_token, session)
        victim = await make_token(here, "victim", "config:read")
        there = Caller(two.url, victim.token, session)

        async def known() -> bool:
            return (await there("GET", "/api/agents")).status == 200

        await eventually(known)
        async with there.stream() as stream:
            number = (await here("GET", "/api/admin/tokens")).body["tokens"][-1]["id"]
            await here("DELETE", f"/api/admin/tokens/{number}")
            assert await stream.closed(timeout=2) == 1008
        assert (await there("GET", "/api/agents")).status == 401


async def test_when_a_token_was_last_used_is_written_seldom(tmp_path: Any) -> None:
    """The list says about when each token was used; a thousand requests are one write."""
    async with (
        running_server(tmp_path / "data", last_used_seconds=0.2, lease_seconds=0.3) as server,
        aiohttp.ClientSession() as session,
    ):
        ask = Caller(server.url, server.admin_token, session)
        user = await make_token(ask, "user", "config:read")

        async def used() -> str | None:
            last: str | None = (await ask("GET", "/api/admin/tokens")).body["tokens"][-1][
                "last_used_at"
            ]
            return last

        assert await used() is None
        await asyncio.gather(*(user("GET", "/api/agents") for _ in range(50)))
        assert await eventually(used)


async def test_a_cap_on_streams_counts_what_is_open(tmp_path: Any) -> None:
    """With a cap of two the third stream of a token is 429; a closed one makes room."""
    async with (
        running_server(tmp_path / "data", streams_per_token=2) as server,
        aiohttp.ClientSession() as session,
    ):
        ask = Caller(server.url, server.admin_token, session)
        other = await make_token(ask, "other", "config:read")
        async with ask.stream():
            async with ask.stream():
                with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                    async with ask.stream():
                        pass
                assert refusal.value.status == 429
                assert refusal.value.headers is not None
                assert int(refusal.value.headers["Retry-After"]) >= 1
                async with other.stream():
                    pass

            async def room() -> bool:
                try:
                    async with ask.stream():
                        return True
                except aiohttp.WSServerHandshakeError:
                    return False

            await eventually(room)


async def test_writes_are_limited_by_token(tmp_path: Any) -> None:
    """Past its burst a token's write is 429 with Retry-After; another token's is not."""
    async with (
        running_server(tmp_path / "data", writes_per_second=0.5, writes_burst=3) as server,
        aiohttp.ClientSession() as session,
    ):
        ask = Caller(server.url, server.admin_token, session)
        other = await make_token(ask, "other", "agents:write")
        answers = [
            await ask("PUT", "/api/agents/default", {"llm_model": f"m{n}"}) for n in range(4)
        ]
        assert [a.status for a in answers] == [200, 200, 200, 429]
        assert answers[-1].code == "too-many-requests"
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 2
        assert (await other("PUT", "/api/agents/default", {"llm_model": "x"})).status == 200
        assert (await ask("GET", "/api/agents")).status == 200, "reads are not writes"
