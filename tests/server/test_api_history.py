"""History and rollback over HTTP: what an agent was, who did it, and getting it back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.servers import InLoopServer, running_server

CANARY = "sk-canary-history"
OLD: dict[str, Any] = {
    "agent_id": "billing",
    "name": "Billing",
    "description": "as it was",
    "llm_provider": "openai",
    "llm_endpoint": "https://one.example.com/v1",
    "llm_model": "gpt-6.1-sol",
    "llm_api_key": CANARY,
    "llm_timeout": 45,
    "llm_temperature": 0.25,
    "llm_max_tokens": 100,
    "llm_options": {"top_p": 0.5},
    "comment": "first",
}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InLoopServer]:
    async with running_server(tmp_path) as running:
        yield running


@pytest.fixture
async def http(server: InLoopServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        server.url, headers={"Authorization": f"Bearer {server.admin_token}"}
    ) as session:
        yield session


async def send(
    http: aiohttp.ClientSession, method: str, path: str, body: Any = None, status: int = 200
) -> Any:
    async with http.request(method, path, json=body) as answer:
        assert answer.status == status, await answer.text()
        return None if status == 204 else await answer.json()


async def test_a_rollback_after_five_edits(http: aiohttp.ClientSession) -> None:
    """The old config is back to the last field; the key is not; six changes name who and why."""
    created = await send(http, "POST", "/api/agents", OLD, 201)
    for edit in (
        {"llm_model": "gpt-6.1-terra"},
        {"llm_temperature": 1.0, "llm_options": {}},
        {"llm_api_key": "sk-second"},
        {"llm_endpoint": "https://two.example.com/v1", "llm_api_key": "sk-third"},
        {"name": "Billing 2", "description": None, "comment": "renamed"},
    ):
        await send(http, "PUT", "/api/agents/billing", edit)
    back = await send(
        http,
        "POST",
        "/api/agents/billing/rollback",
        {"to": created["revision"], "comment": "it got worse"},
    )
    kept = {k: v for k, v in OLD.items() if k not in ("llm_api_key", "comment")}
    assert {name: back[name] for name in kept} == kept
    assert back["restored_revision"] == created["revision"]
    assert back["api_key_cleared"] is True
    assert back["has_api_key"] is False

    history = await send(http, "GET", "/api/agents/billing/history")
    first = created["revision"]
    assert [c["revision"] for c in history["changes"]] == list(range(first + 6, first - 1, -1))
    assert {change["actor"] for change in history["changes"]} == {"admin"}
    assert history["changes"][0]["comment"] == f"restores revision {first}: it got worse"
    assert history["changes"][1]["comment"] == "renamed"
    assert history["changes"][-1]["comment"] == "first"
    assert CANARY not in str(history)


async def test_a_rollback_that_keeps_the_place_keeps_the_key(
    http: aiohttp.ClientSession, server: InLoopServer
) -> None:
    """Where provider and origin are the same, the key of today stays, not the key of then."""
    await send(http, "POST", "/api/agents", OLD, 201)
    await send(http, "PUT", "/api/agents/billing", {"llm_api_key": "sk-today"})
    await send(http, "PUT", "/api/agents/billing", {"llm_model": "gpt-6.1-terra"})
    back = await send(http, "POST", "/api/agents/billing/rollback", {})
    assert back["llm_model"] == "gpt-6.1-sol"
    assert "api_key_cleared" not in back
    http.headers["Authorization"] = f"Bearer {server.backend_token}"
    keyed = await send(http, "GET", "/api/agents/billing/llm")
    assert keyed["llm_api_key"] == "sk-today"


async def test_a_deleted_agent_comes_back(http: aiohttp.ClientSession) -> None:
    """Rolling back a deleted agent makes it again as it was, without its key, and says so."""
    made = await send(http, "POST", "/api/agents", OLD, 201)
    await send(http, "DELETE", "/api/agents/billing?comment=by+mistake", status=204)
    back = await send(http, "POST", "/api/agents/billing/rollback", {})
    assert back["llm_options"] == {"top_p": 0.5}
    assert back["has_api_key"] is False
    assert back["api_key_cleared"] is True
    assert back["restored_revision"] == made["revision"]
    history = await send(http, "GET", "/api/agents/billing/history")
    assert [change["type"] for change in history["changes"]] == [
        "agent_created",
        "agent_deleted",
        "agent_created",
    ]
    assert history["changes"][1]["comment"] == "by mistake"


async def test_what_ran_at_a_time(http: aiohttp.ClientSession) -> None:
    """`at` answers what an agent ran at a moment: the newest change that is not after it."""
    await send(http, "POST", "/api/agents", OLD, 201)
    await send(http, "PUT", "/api/agents/billing", {"llm_model": "middle"})
    await send(http, "PUT", "/api/agents/billing", {"llm_model": "last"})
    changes = (await send(http, "GET", "/api/agents/billing/history"))["changes"]
    at = changes[1]["created_at"]
    found = await send(http, "GET", f"/api/agents/billing/history?limit=1&at={at}")
    assert [change["agent"]["llm_model"] for change in found["changes"]] == ["middle"]
    before = await send(http, "GET", "/api/agents/billing/history?at=2020-01-01T00:00:00Z")
    assert before["changes"] == []


async def test_changes_after_a_revision(http: aiohttp.ClientSession) -> None:
    """GET /api/changes lists what came after a revision, by agent and by actor."""
    first = (await send(http, "POST", "/api/agents", OLD, 201))["revision"]
    await send(http, "PUT", "/api/agents/default", {"llm_model": "other"})
    listed = await send(http, "GET", f"/api/changes?since={first - 1}")
    assert [c["agent_id"] for c in listed["changes"]] == ["billing", "default"]
    mine = await send(http, "GET", "/api/changes?agent=billing&actor=admin")
    assert [change["revision"] for change in mine["changes"]] == [first]
    assert (await send(http, "GET", "/api/changes?actor=nobody"))["changes"] == []


async def test_a_rollback_to_what_never_was(http: aiohttp.ClientSession) -> None:
    """A revision that the history does not hold is 404 `revision-not-found`; nothing changes."""
    created = await send(http, "POST", "/api/agents", OLD, 201)
    for agent_id, body in (
        ("billing", {}),
        ("billing", {"to": created["revision"] - 1}),
        ("billing", {"to": created["revision"] + 1}),
        ("nobody", {}),
    ):
        problem = await send(http, "POST", f"/api/agents/{agent_id}/rollback", body, 404)
        assert problem["code"] == "revision-not-found"
    await send(http, "POST", "/api/agents/billing/rollback", {"to": 0}, 422)
    assert (await send(http, "GET", "/api/agents/billing"))["revision"] == created["revision"]
