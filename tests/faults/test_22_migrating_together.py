"""Fault 22: three processes migrate one database at once: one does it, the others wait."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest

from tests.support.faults.site import KEY, Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.postgres import connect
from tests.support.servers import eventually

MISSION_TABLE = """
CREATE TABLE agents (
    id SERIAL PRIMARY KEY,
    agent_id VARCHAR(64) UNIQUE NOT NULL,
    name VARCHAR(128) NOT NULL,
    description TEXT,
    llm_provider VARCHAR(32) NOT NULL,
    llm_endpoint VARCHAR(256),
    llm_model VARCHAR(64) NOT NULL,
    llm_api_key_encrypted TEXT,
    llm_timeout INTEGER DEFAULT 30,
    llm_temperature FLOAT DEFAULT 0.7,
    llm_max_tokens INTEGER,
    is_default BOOLEAN DEFAULT false,
    is_active BOOLEAN DEFAULT true,
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_agents_agent_id ON agents (agent_id);
CREATE INDEX idx_agents_is_default ON agents (is_default);
"""


@pytest.mark.parametrize("database", ["empty", "old"])
async def test_three_at_once(
    postgres_site: Site, http: aiohttp.ClientSession, database: str
) -> None:
    """An empty database, and one with the mission's table alone: migrated once, served by three."""
    site = postgres_site
    rows = 1
    if database == "old":
        rows = 4
        with connect(str(site.database_url)) as there:
            there.execute(MISSION_TABLE)
            for name in ("first", "second", "third"):
                there.execute(
                    "INSERT INTO agents (agent_id, name, llm_provider, llm_model)"
                    " VALUES (%s, %s, 'ollama', 'm')",
                    (name, name),
                )
    servers = [site.process(n) for n in range(3)]
    try:
        await asyncio.gather(*(server.start() for server in servers))
        assert site.rows("SELECT count(*) FROM agents") == [(rows,)]
        assert site.rows("SELECT count(*) FROM agents WHERE is_default") == [(1,)]
        assert site.rows("SELECT revision FROM state") == [(rows,)]
        assert site.rows("SELECT count(*), max(revision) FROM changes") == [(rows, rows)]
        assert site.rows("SELECT count(*) FROM tokens") == [(2,)]
        # One wrote the first tokens, and no other one of its own.
        written = list(site.root.glob("replica-*/admin.token"))
        assert len(written) == 1
        async with subscribers(6, lambda n: servers[n % 3].url, site.backend_token) as subs:
            await eventually(lambda: all(s.reached(0) for s in subs))
            for server in servers:
                revision = await Operator(http, server.url, site.admin_token).set(
                    "default", description=server.url
                )
            await eventually(lambda: all(s.reached(revision) for s in subs))
    finally:
        for server in servers:
            with contextlib.suppress(AssertionError):
                server.kill()
    assert KEY not in "".join(server.log for server in servers)
