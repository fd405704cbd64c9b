"""What a limited token, or one without config:read, is told: nothing of what it may not see now."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import select

from slm.schemas import Agent
from slm.server.agents.changes import CommittedChange
from slm.server.db.column_types import EPOCH_START
from slm.server.db.tables import AUDIT
from slm.server.security.agent_scope import View
from slm.server.security.tokens import SCOPES
from slm.server.stream.encoding import encode_change
from tests.security.test_doors import BODIES, RULES
from tests.security.test_revocation import CHANGING, KEYED, KEYS
from tests.support.http import Caller, Stream, admin, agent, make_token
from tests.support.servers import InLoopServer, running_server

SECRET: Final = "https://gw.internal/v1/tenant-secret"


async def was_the_default(ask: Caller) -> dict[str, int]:
    """Make an agent the default and an ordinary one again; return the revisions of interest."""
    start = (await ask("GET", "/api/agents")).body["revision"]
    body = agent("boss", llm_endpoint=SECRET, is_default=True)
    made = (await ask("POST", "/api/agents", body)).body["revision"]
    change = {"llm_options": {"metadata": SECRET}}
    changed = (await ask("PUT", "/api/agents/boss", change)).body["revision"]
    back = await ask("PUT", "/api/agents/default", {"is_default": True})
    head = int(back.headers["SLM-Revision"])
    later = (await ask("PUT", "/api/agents/boss", {"llm_model": "m2"})).body["revision"]
    return {"start": start, "made": made, "changed": changed, "left": head, "later": later}


async def test_a_replay_is_judged_by_what_is_visible_now(ask: Caller) -> None:
    """A replay never holds a former default's configuration, only that it left the view."""
    at = await was_the_default(ask)
    epoch = (await ask("GET", "/api/agents")).body["epoch"]
    limited = await make_token(ask, "late", "config:read", agents=["mine"])
    for since in (at["start"], at["made"], at["changed"]):
        async with limited.stream(since=since, epoch=epoch) as stream:
            told = await stream.upto(at["later"])
        assert SECRET not in json.dumps(told)
        of_boss = [(m["revision"], m["type"]) for m in told if m.get("agent_id") == "boss"]
        assert of_boss == [(at["left"], "agent_deleted")], since
    whole = await make_token(ask, "whole", "config:read")
    async with whole.stream(since=at["start"], epoch=epoch) as stream:
        assert SECRET in json.dumps(await stream.upto(at["later"])), "nobody else is limited"


IDS: Final = ("mine", "other", "third")
STEPS: Final = st.lists(
    st.tuples(st.sampled_from(IDS), st.sampled_from(["write", "promote", "delete"])), max_size=14
)


@settings(deadline=None)
@given(steps=STEPS, share=st.floats(0, 1))
def test_a_limited_client_that_resumes_anywhere_ends_with_what_it_may_see(
    steps: list[tuple[str, str]], share: float
) -> None:
    """Whatever happened meanwhile; and no frame holds what is hidden now."""
    view = View(("mine",))
    agents, changes, states = history_of(steps)
    since = int(share * len(changes))
    client = {a.agent_id: a for a in states[since] if view.sees(a.agent_id, a.is_default)}
    visible = {a.agent_id: a for a in agents if view.sees(a.agent_id, a.is_default)}
    held = {name: a.revision for name, a in client.items()}
    for change in changes[since:]:
        hidden = change.agent.agent_id not in visible and change.agent.agent_id != "mine"
        frame = json.loads(encode_change(change, view, hidden_today=hidden))
        assert frame["revision"] == change.revision
        if "config" in frame:
            assert not hidden
            held[frame["agent_id"]] = frame["revision"]
        elif frame["type"] == "agent_deleted":
            held.pop(frame["agent_id"], None)
    assert held == {name: a.revision for name, a in visible.items()}


def history_of(
    steps: list[tuple[str, str]],
) -> tuple[list[Agent], list[CommittedChange], list[list[Agent]]]:
    """The agents at the end, the changes, and the agents before each change and after the last."""
    now = {"default": made_agent("default", 1, is_default=True)}
    changes: list[CommittedChange] = []
    states = [list(now.values())]

    def record(kind: str, agent: Agent, was_default: bool) -> None:
        changes.append(CommittedChange(agent.revision, kind, agent, was_default))
        if kind == "agent_deleted":
            now.pop(agent.agent_id)
        else:
            now[agent.agent_id] = agent
        states.append(list(now.values()))

    for name, what in steps:
        old, revision = now.get(name), len(changes) + 2
        was_default = old is not None and old.is_default
        if what == "delete":
            if old is not None and not was_default:
                record("agent_deleted", old.model_copy(update={"revision": revision}), False)
            continue
        kind = "agent_created" if old is None else "agent_config_changed"
        former = next(a for a in now.values() if a.is_default)
        promotes = what == "promote" and not was_default
        is_default = was_default or promotes
        record(kind, made_agent(name, revision, is_default=is_default), was_default)
        if promotes:
            update = {"is_default": False, "revision": revision + 1}
            record("agent_config_changed", former.model_copy(update=update), True)
    return list(now.values()), changes, states


def made_agent(name: str, revision: int, *, is_default: bool) -> Agent:
    return Agent(
        id=1,
        agent_id=name,
        name=name,
        description=None,
        llm_provider="ollama",
        llm_endpoint=None,
        llm_model="m",
        llm_timeout=30,
        llm_temperature=0.7,
        llm_max_tokens=None,
        llm_options={},
        is_default=is_default,
        is_active=True,
        created_at=EPOCH_START,
        updated_at=EPOCH_START,
        revision=revision,
        has_api_key=False,
        api_key_revision=None,
    )


async def test_a_hidden_receipt_is_one_that_is_not_there(ask: Caller) -> None:
    """A receipt that the token may not see is answered as if its revision did not exist."""
    at = await was_the_default(ask)
    limited = await make_token(ask, "limited", "config:read", agents=["mine"])
    missing = await limited("GET", f"/api/changes/{at['later'] + 100}/receipt")
    assert (missing.status, missing.code) == (404, "revision-not-found")
    for name in ("made", "changed", "later"):
        hidden = await limited("GET", f"/api/changes/{at[name]}/receipt")
        assert (hidden.status, hidden.body) == (missing.status, missing.body), name
        assert (await ask("GET", f"/api/changes/{at[name]}/receipt")).status == 200


async def test_what_is_hidden_costs_the_database_what_is_missing_costs(
    server: InLoopServer, ask: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No route that names an agent looks at the database before it knows that it may be seen."""
    options = {"a": "b" * 15_000}
    await ask("POST", "/api/agents", agent("hidden", llm_api_key="sk-x", llm_options=options))
    limited = await make_token(ask, "limited", *SCOPES[:3], agents=["mine"])
    database = server.running.services.database
    asked: list[str] = []

    def count(name: str) -> None:
        real = getattr(database, name)

        async def counted(*arguments: Any, **more: Any) -> Any:
            asked.append(name)
            return await real(*arguments, **more)

        monkeypatch.setattr(database, name, counted)

    # The feed looks as well, so it is stopped; nothing here waits for it.
    await server.running.services.feed.stop()
    await server.running.services.token_watch.stop()
    await server.running.services.caretaker._task.stop()
    count("run")
    count("read")
    for method, path in sorted(RULES):
        if "{agent_id}" not in path:
            continue
        answers = []
        for agent_id in ("hidden", "no-such"):
            asked.clear()
            body = BODIES.get((method, path))
            answer = await limited(method, path.format(agent_id=agent_id), body)
            answers.append((answer.status, answer.body, list(asked)))
        assert answers[0] == answers[1], path
        assert answers[0][0] in (403, 404)
        assert answers[0][2] == [], path


async def test_a_write_reads_nothing_back_without_the_scope(ask: Caller) -> None:
    """Without config:read an answer names the agent and its revision; with it, the whole agent."""
    body = agent("a", llm_endpoint=SECRET, description=SECRET)
    await ask("POST", "/api/agents", body)
    await ask("PUT", "/api/agents/a", {"llm_model": "second"})
    writer = await make_token(ask, "writer", "agents:write")
    both = await make_token(ask, "both", "agents:write", "config:read")
    kept = {"agent_id", "revision", "restored_revision", "receipt", "api_key_cleared"}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("PUT", "/api/agents/a", {}),
        ("PUT", "/api/agents/a?wait=0", {}),
        ("PUT", "/api/agents/a", {"llm_model": "third"}),
        ("POST", "/api/agents/a/rollback", {}),
        ("POST", "/api/agents/a/rollback?wait=0", {}),
        ("POST", "/api/agents", agent("b", description="mine")),
    ]
    for method, path, body in asked:
        answer = await writer(method, path, body)
        assert answer.status in (200, 201), (path, answer)
        assert answer.body.keys() <= kept, (path, answer)
        assert str(answer.body["revision"]) in answer.headers["ETag"]
        assert SECRET not in json.dumps(answer.body) + str(answer.headers)
    assert (await both("PUT", "/api/agents/a", {})).body["llm_endpoint"] == SECRET


@contextlib.asynccontextmanager
async def backend(caller: Caller, name: str, revision: int) -> AsyncIterator[Stream]:
    """A connected backend that has acked `revision`."""
    async with caller.stream(client={"name": name, "instance": "1"}) as stream:
        refused = {"mine": {"revision": revision, "reason": "at 10.1.2.3"}}
        await stream.socket.send_json({"ack": revision, "not_in_force": refused})
        await stream.socket.send_json({"ack": "wrong"})
        while (await stream.next())["type"] != "error":
            pass
        yield stream


async def test_receipts_name_other_tokens_backends_to_nobody_else(ask: Caller) -> None:
    """Who may not read the fleet is told its own backends by name, and the others' number."""
    await ask("POST", "/api/agents", agent("mine"))
    start = (await ask("GET", "/api/agents")).body["revision"]
    limited = await make_token(ask, "limited", "config:read", "agents:write", agents=["mine"])
    writer = await make_token(ask, "writer", "agents:write")
    async with backend(ask, "payroll", start), backend(limited, "own", start):
        changed = await ask("PUT", "/api/agents/mine", {"llm_model": "n"})
        path = f"/api/changes/{changed.body['revision']}/receipt"
        full = (await ask("GET", path)).body
        assert sorted(full["pending"]) == ["own/1", "payroll/1"]
        assert "others" not in full
        told = (await limited("GET", path)).body
        assert told["pending"] == ["own/1"]
        assert told["others"] == {"applied": 0, "refused": 0, "pending": 1, "unknown": 0}
        for caller, own in ((limited, ["own/1"]), (writer, [])):
            answer = await caller("PUT", "/api/agents/mine?wait=0", {})
            receipt = answer.body["receipt"]
            assert receipt["pending"] + [r["backend"] for r in receipt["refused"]] == own
            assert sum(receipt["others"].values()) == 2 - len(own)
            assert "payroll" not in json.dumps(answer.body)
            assert ("10.1.2.3" in json.dumps(answer.body)) == bool(own and receipt["refused"])


NOT_ON_POSTGRESQL: Final = ("/keys", "/keys/rotate", "/keys/prune", "/backup")
"""With one key of the environment there is none to add, to go on to, or to retire."""


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
async def test_whatever_changes_something_is_in_the_audit(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every route but the plain reads, in the name of the token that asked; no change without."""
    given_: dict[str, Any] = {}
    if engine == "postgresql":
        url = SecretStr(request.getfixturevalue("postgres_url"))
        given_ = {"database_url": url, "encryption_keys": KEYS}
    async with running_server(tmp_path / "data", **given_) as server, admin(server) as ask:
        await ask("POST", "/api/agents", agent("a", llm_api_key="sk-a"))
        await ask("PUT", "/api/agents/a", {"llm_model": "o"})
        victim = await ask("POST", "/api/admin/tokens", {"name": "v", "scopes": ["config:read"]})
        doer = await make_token(ask, "doer", *SCOPES)
        database = server.running.services.database
        wanted = select(AUDIT.c.seq).where(AUDIT.c.actor == "doer")
        order = [*KEYED, *sorted(CHANGING, key=lambda rule: rule[0] == "DELETE")]
        for method, path in order:
            before = await database.read(lambda c: len(c.execute(wanted).all()))
            asked = path.format(agent_id="a", token_id=victim.body["id"])
            body = BODIES.get((method, path))
            if path.endswith("/exported"):
                body = {"head": (await ask("GET", "/api/admin/audit/verify")).body["head"]}
            answer = await doer(method, asked, body)
            after = await database.read(lambda c: len(c.execute(wanted).all()))
            if engine == "postgresql" and path.endswith(NOT_ON_POSTGRESQL):
                assert after == before, (method, path)
            else:
                assert answer.status < 300, (path, answer)
                assert after > before, (method, path)


async def test_one_token_does_not_hold_every_wait(tmp_path: Path) -> None:
    """Past SLM_WAITS_PER_TOKEN a request with ?wait= is 429, before anything is written."""
    async with running_server(tmp_path / "data", waits_per_token=1) as server, admin(server) as ask:
        start = (await ask("GET", "/api/agents")).body["revision"]
        other = await make_token(ask, "other", *SCOPES)
        waits = server.running.services.waits
        token_id = server.running.services.tokens.caller(str(other.token))
        assert token_id is not None
        assert waits.take(token_id.token_id)
        refused = await other("PUT", "/api/agents/default?wait=1s", {"llm_model": "n"})
        assert (refused.status, refused.code) == (429, "too-many-requests")
        assert (await ask("GET", "/api/agents")).body["revision"] == start
        assert (await ask("PUT", "/api/agents/default?wait=0", {"llm_model": "n"})).status == 200
        waits.release(token_id.token_id)
        assert (await other("PUT", "/api/agents/default?wait=0", {"llm_model": "o"})).status == 200
