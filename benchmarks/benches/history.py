"""What a page of a long history costs: its time, and the memory that the server takes for it."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from sqlalchemy import Connection, text

from benchmarks.harness import machine, stats
from benchmarks.harness.run import Bench, Options, say
from benchmarks.harness.slm_server import BenchServer
from benchmarks.peers.postgres_server import PostgresServer
from slm.server.lifecycle.startup import prepare
from slm.server.settings import Settings

FULL_ROWS = 1_000_000
QUICK_ROWS = 20_000
WARM_UP = 3
PAGES = 30

_CHANGES = """
WITH RECURSIVE n(i) AS (SELECT CAST(:base AS BIGINT) + 1 UNION ALL SELECT i + 1 FROM n
                        WHERE i < :base + :rows)
INSERT INTO changes ({columns})
SELECT {values} FROM n, (SELECT * FROM changes WHERE revision = :base) AS c
"""
_CHANGE = {
    "revision": "i",
    "type": "'agent_config_changed'",
    # Half of all changes are of one agent.
    "agent_id": "CASE WHEN i % 2 = 0 THEN 'busy' ELSE 'agent-' || (i % 200) END",
    "actor": "CASE WHEN i < :base + 20 THEN 'early' WHEN i % 5 < 2 THEN 'ci' ELSE 'admin' END",
}
_AUDIT = """
WITH RECURSIVE n(i) AS (SELECT CAST(:base AS BIGINT) + 1 UNION ALL SELECT i + 1 FROM n
                        WHERE i < :base + :rows)
INSERT INTO audit (seq, at, actor, action, agent_id, address, detail, hash)
SELECT i, '2026-01-01T00:00:00.000000Z',
       CASE WHEN i < :base + 5 THEN 'early' ELSE 'backend' END,
       CASE WHEN i < :base + 5 THEN 'token.revoke' WHEN i % 10 = 0 THEN 'agent.update'
            ELSE 'key.read' END,
       'agent-' || (i % 200), '10.0.0.9', '{"api_key_revision": 1, "revision": 1}', '' FROM n
"""
LISTS = {
    "changes, the newest": ("admin", "/api/changes?newest_first=true"),
    "changes, the oldest": ("admin", "/api/changes"),
    "changes of one agent": ("admin", "/api/changes?agent=agent-199"),
    "changes of a busy agent": ("admin", "/api/changes?agent=busy&newest_first=true"),
    "changes of a busy agent, the first": ("admin", "/api/changes?agent=busy&upto=20"),
    "changes by one who made few": ("admin", "/api/changes?actor=early&newest_first=true"),
    "changes by nobody": ("admin", "/api/changes?actor=nobody"),
    "an agent at a time": ("admin", "/api/agents/busy/history?at=2020-01-01T00:00:00Z"),
    "changes, a token of one agent": ("one", "/api/changes?newest_first=true"),
    "changes, a token of no agent": ("none", "/api/changes"),
    "changes by one, a token of no agent": ("none", "/api/changes?actor=ci"),
    "audit, the newest": ("admin", "/api/admin/audit"),
    "audit of one agent": ("admin", "/api/admin/audit?agent=agent-177"),
    "audit of one who did little": ("admin", "/api/admin/audit?actor=early"),
    "audit of one action": ("admin", "/api/admin/audit?action=token.revoke"),
    "audit of actions that begin so": ("admin", "/api/admin/audit?action=token."),
    "audit of two conditions": ("admin", "/api/admin/audit?actor=backend&action=token."),
}
"""Each with who asks and for what; a page has 100 rows at most."""


async def measure(options: Options) -> dict[str, Any]:
    with machine.pinned(machine.cores()[1]):
        return await _measure(options)


async def _measure(options: Options) -> dict[str, Any]:
    rows = QUICK_ROWS if options.quick else FULL_ROWS
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="slm-bench-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        postgres = PostgresServer(Path(folder) / "postgres")
        await postgres.start()
        try:
            url = f"postgresql+psycopg://bench@127.0.0.1:{postgres.port}/postgres"
            for engine, settings in (("SQLite", {}), ("PostgreSQL", {"database_url": url})):
                found[engine] = await _engine(engine, rows, options, settings)
        finally:
            await postgres.stop()
    return {"rows": rows, "pages": PAGES, "engines": found}


async def _engine(
    engine: str, rows: int, options: Options, settings: dict[str, Any]
) -> dict[str, dict[str, list[float]]]:
    lengthen = functools.partial(_lengthen, rows=rows)
    core = machine.cores()[0]
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in LISTS}
    async with BenchServer(core=core, before_start=lengthen, **settings) as server:
        tokens = await _tokens(server)
        for repeat in range(options.repeats):
            for name, (who, path) in LISTS.items():
                page = await _page(server, tokens[who], path)
                say(f"history {repeat + 1}, {engine}, {name}", page)
                for figure, value in page.items():
                    taken[name].setdefault(figure, []).append(value)
    return taken


async def _lengthen(settings: Settings, rows: int) -> None:
    """Make the database and fill it, before the server that is measured opens it."""
    prepared = await prepare(settings)
    database = prepared.database

    def fill(connection: Connection) -> None:
        base = connection.execute(text("SELECT revision FROM state")).scalar_one()
        sample = text("SELECT * FROM changes LIMIT 1")
        columns = list(connection.execute(sample).keys())
        values = ", ".join(_CHANGE.get(name, f"c.{name}") for name in columns)
        changes = _CHANGES.format(columns=", ".join(columns), values=values)
        connection.execute(text(changes), {"base": base, "rows": rows})
        connection.execute(text("UPDATE state SET revision = revision + :rows"), {"rows": rows})
        head = connection.execute(text("SELECT seq FROM audit_head")).scalar_one()
        connection.execute(text(_AUDIT.replace(": 1", "\\: 1")), {"base": head, "rows": rows})
        connection.execute(text("UPDATE audit_head SET seq = seq + :rows"), {"rows": rows})

    try:
        # No limit on the time: a server has one.
        database.answer_within(3600)
        await database.run(fill)
        if database.dialect == "postgresql":
            await database.run(lambda connection: connection.execute(text("ANALYZE")) and None)
    finally:
        await database.close()


async def _tokens(server: BenchServer) -> dict[str, str]:
    admin = await asyncio.to_thread(server.admin_token.read_text)
    tokens = {"admin": admin.strip()}
    headers = {"Authorization": f"Bearer {tokens['admin']}"}
    async with aiohttp.ClientSession(server.url, headers=headers) as session:
        for name, agents in (("one", ["agent-199"]), ("none", ["nothing-*"])):
            body = {"name": name, "scopes": ["config:read"], "agents": agents}
            async with session.post("/api/admin/tokens", json=body) as answer:
                tokens[name] = (await answer.json())["token"]
    return tokens


async def _page(server: BenchServer, token: str, path: str) -> dict[str, float]:
    """Ask for a page again and again; return its median time and the most memory it took."""
    took = []
    async with aiohttp.ClientSession(
        server.url, headers={"Authorization": f"Bearer {token}"}
    ) as session:
        for number in range(WARM_UP + PAGES):
            if number == WARM_UP:
                before = machine.rss_bytes(server.pid)
                Path(f"/proc/{server.pid}/clear_refs").write_text("5")
            begin = time.perf_counter()
            async with session.get(path) as answer:
                await answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"{path} answered {answer.status}")
            took.append((time.perf_counter() - begin) * 1e3)
    most = machine.peak_bytes(server.pid)
    return {
        "p50_ms": stats.quantile(took[WARM_UP:], 0.5),
        "memory_mib": max(0, most - before) / 2**20,
    }


BENCH = Bench("history", "Pages of a long history", measure)
