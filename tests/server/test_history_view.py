"""A limited token's history: what it may see today, page by page, and nothing of anybody else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.support.http import Caller, admin, agent, make_token
from tests.support.servers import InLoopServer, running_server
from tests.support.store import KEY


@pytest.fixture
async def server(tmp_path: Path, database_url: str) -> AsyncIterator[InLoopServer]:
    async with running_server(
        tmp_path / "data", database_url=SecretStr(database_url), encryption_keys=SecretStr(KEY)
    ) as running:
        yield running


@pytest.fixture
async def ask(server: InLoopServer) -> AsyncIterator[Caller]:
    async with admin(server) as caller:
        yield caller


async def test_a_former_default_is_not_seen(ask: Caller) -> None:
    """What an agent was while it was the default is hidden in every answer once it is not."""
    boss = agent("boss", llm_endpoint="https://gateway.example.com/v1", is_default=True)
    shown = (await ask("POST", "/api/agents", boss)).body["revision"]
    limited = await make_token(ask, "limited", "config:read", agents=["mine"])

    async def seen() -> tuple[int, int, list[str]]:
        listed = (await limited("GET", "/api/changes")).body["changes"]
        return (
            (await limited("GET", "/api/agents/boss/history")).status,
            (await limited("GET", f"/api/changes/{shown}/receipt")).status,
            [change["agent_id"] for change in listed],
        )

    assert await seen() == (200, 200, ["boss"])
    await ask("PUT", "/api/agents/default", {"is_default": True})
    assert await seen() == (404, 404, ["default", "default", "default"])
    await ask("PUT", "/api/agents/boss", {"llm_model": "secret"})
    assert await seen() == (404, 404, ["default", "default", "default"])


async def test_an_empty_page_has_a_next_one(ask: Caller, server: InLoopServer) -> None:
    """Pages of what a token may not see are empty and bounded; following `next` finds its own."""
    await ask("POST", "/api/agents", agent("mine"))
    await ask("POST", "/api/agents", agent("other"))
    database = server.running.services.database

    def lengthen(connection: object) -> None:
        execute = connection.exec_driver_sql  # type: ignore[attr-defined]
        columns = list(execute("SELECT * FROM changes LIMIT 1").keys())
        others = ", ".join(columns[1:])
        execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)"
            f" INSERT INTO changes (revision, {others}) SELECT revision + i, {others}"
            " FROM changes, n WHERE revision = (SELECT revision FROM state)"
        )
        execute("UPDATE state SET revision = revision + 3000")

    await database.run(lengthen)
    limited = await make_token(ask, "limited", "config:read", agents=["min*", "%", "_ther"])
    found, empty, query = [], 0, ""
    while True:
        page = (await limited("GET", f"/api/changes?newest_first=true{query}")).body
        found += [change["agent_id"] for change in page["changes"]]
        if page["next"] is None:
            break
        empty += not page["changes"]
        query = f"&upto={page['next']}"
    assert set(found) == {"mine", "default"}
    assert empty >= 2
