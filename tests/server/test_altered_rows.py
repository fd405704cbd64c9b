"""Rows that another program altered: they hide no other row, and nothing answers 500."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import Connection, text

from tests.support.servers import InLoopServer, eventually, reads_keys, running_server

KEYS: Final = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="

ROWS: Final = {
    "agents": "agent_id = 'a'",
    "changes": "revision = 2",
    "audit_head": "id = 1",
    "tokens": "name = 'limited'",
    "encryption_keys": "is_active",
    "replicas": "1 = 1",
    "state": "id = 1",
}
"""The row of each table that is altered."""

SQLITE: Final[list[tuple[str, Any]]] = [
    *(("tokens.scopes", b"\xff\x00"), ("tokens.name", b""), ("tokens.agents", "[" * 100_000)),
    *(("tokens.expires_at", "no time"), ("tokens.created_at", 1e308), ("tokens.digest", b"\xff")),
    *(("changes.agent", "{"), ("changes.type", b"\xff"), ("changes.created_at", b"")),
    *(("changes.revision", "text"), ("changes.revision", 2.5), ("changes.agent_id", b"a\xff")),
    *(("audit_head.seq", "text"), ("audit_head.seq", 1), ("audit_head.seq", 2**63 - 1)),
    *(("audit_head.hash", b"\xff"), ("replicas.fingerprints", "{"), ("replicas.seen_at", "text")),
    *(("encryption_keys.created_at", "text"), ("agents.revision", "text")),
    *(("agents.api_key_revision", 1e308), ("agents.llm_options", b"\xff")),
]
POSTGRESQL: Final[list[tuple[str, Any]]] = [
    *(("tokens.expires_at", "infinity"), ("tokens.created_at", "0044-03-15 BC")),
    *(("changes.created_at", "-infinity"), ("agents.updated_at", "294000-01-01")),
    *(("changes.agent", "{"), ("replicas.seen_at", "NaN"), ("audit_head.seq", 1)),
    ("audit_head.seq", 2**63 - 1),
]
VITAL: Final[list[tuple[str, Any]]] = [
    *(("state.revision", "text"), ("state.epoch", "\u00e9\r\n"), ("state.tokens_version", b"")),
    *(("state.keyring_version", "text"), ("audit_head.id", 7), ("state.revision", 0)),
]
"""What nothing can go on without."""

READS: Final = (
    *("/api/agents", "/api/agents/a", "/api/agents/a/llm", "/api/agents/b/llm", "/api/snapshot"),
    *("/api/changes", "/api/changes?newest_first=true&limit=1", "/api/changes?actor=admin"),
    *("/api/agents/a/history", "/api/agents/b/history", "/api/changes/2/receipt", "/api/fleet"),
    *("/api/admin/tokens", "/api/admin/keys", "/api/admin/audit", "/api/admin/audit/verify"),
    *("/api/admin/audit/export?all=true", "/metrics"),
)


class Site:
    """A server with two agents and a limited token, whose rows can be altered."""

    def __init__(self, server: InLoopServer, client: httpx.AsyncClient) -> None:
        self.server = server
        self.client = client
        self._number = 0

    async def begin(self) -> None:
        for agent_id in ("a", "b"):
            body = {"agent_id": agent_id, "name": "n", "llm_provider": "openai", "llm_model": "m"}
            made = await self.client.post("/api/agents", json=body | {"llm_api_key": "sk-example"})
            assert made.status_code == 201
        token = {"name": "limited", "scopes": ["config:read"], "agents": ["a"]}
        assert (await self.client.post("/api/admin/tokens", json=token)).status_code == 201

    @contextlib.asynccontextmanager
    async def altered(self, place: str, value: Any) -> AsyncIterator[None]:
        """Set one value, and have every token read again, for as long as the block lasts."""
        table, _, column = place.partition(".")
        database = self.server.running.services.database
        row = ROWS[table]

        def work(connection: Connection) -> Any:
            before = connection.execute(text(f"SELECT {column} FROM {table} WHERE {row}"))
            given = ":value"
            if database.dialect == "postgresql" and isinstance(value, str):
                given = f"'{value}'"
            connection.execute(
                text(f"UPDATE {table} SET {column} = {given} WHERE {row}"),
                {"value": value} if given == ":value" else {},
            )
            if place != "state.tokens_version":
                again = "UPDATE state SET tokens_version = tokens_version + 1"
                connection.execute(text(again))
            return before.scalar_one()

        def back(connection: Connection) -> None:
            same = {"before": before}
            where = "1 = 1" if table in ("state", "audit_head") else row
            if column in ROWS[table]:
                where = f"{column} = :value" if column != "id" else where
                same |= {"value": value} if column != "id" else {}
            connection.execute(text(f"UPDATE {table} SET {column} = :before WHERE {where}"), same)

        before = await database.run(work)
        yield
        await database.run(back)

    async def statuses(self) -> dict[str, int]:
        found = {path: (await self.client.get(path)).status_code for path in READS}
        self._number += 1
        body: dict[str, Any] = {"description": str(self._number)}
        for agent_id in ("a", "b"):
            path = f"/api/agents/{agent_id}"
            found[f"PUT {path}"] = (await self.client.put(path, json=body)).status_code
        body = {"name": f"made-{self._number}", "scopes": ["config:read"]}
        made = await self.client.post("/api/admin/tokens", json=body)
        return found | {"POST": made.status_code}


@pytest.fixture(params=["sqlite", "postgresql"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    more: dict[str, Any] = {"encryption_keys": KEYS}
    if request.param == "postgresql":
        more["database_url"] = request.getfixturevalue("postgres_url")
    async with running_server(tmp_path / "data", **more) as server:

        def authorized(request: httpx.Request) -> httpx.Request:
            keyed = request.method == "GET" and reads_keys(request.url.path)
            token = server.backend_token if keyed else server.admin_token
            request.headers["authorization"] = f"Bearer {token}"
            return request

        async with httpx.AsyncClient(base_url=server.url, auth=authorized, timeout=30) as client:
            site = Site(server, client)
            await site.begin()
            yield site


async def test_an_altered_row_hides_no_other(site: Site) -> None:
    """Whatever another program put into one row, every route goes on, and so do all other rows."""
    services = site.server.running.services
    for place, value in SQLITE if services.database.dialect == "sqlite" else POSTGRESQL:
        async with site.altered(place, value):
            found = await site.statuses()
            receipt = found.pop("/api/changes/2/receipt")
            assert set(found.values()) <= {200, 201}, (place, value, found)
            assert receipt in (200, 404), (place, value)
            changes = (await site.client.get("/api/changes")).json()["changes"]
            assert 3 in [change["revision"] for change in changes], (place, value)
            await eventually(lambda: services.feed.trouble is None)


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
async def test_without_a_vital_row_it_is_the_database_that_is_away(site: Site) -> None:
    """What nothing can go on without is 503 and not 500, and a header never holds what was read."""
    for place, value in VITAL:
        async with site.altered(place, value):
            found = await site.statuses()
            assert set(found.values()) <= {200, 201, 401, 404, 503}, (place, value, found)
