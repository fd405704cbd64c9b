"""Fault 15: the disk is full: 507, nothing half written, no event, and it recovers."""

from __future__ import annotations

from typing import Any

import aiohttp
from sqlalchemy import Connection

from tests.support.faults.site import Operator, Site, rows_of
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually


async def test_disk_full(sqlite_site: Site, http: aiohttp.ClientSession) -> None:
    """Writes answer 507 and leave nothing, reads and streams go on, and with room all is well."""
    server = sqlite_site.in_loop()
    await server.start()
    try:
        database = server.running.services.database

        async def pages(limit: int) -> None:
            def work(connection: Connection) -> None:
                connection.exec_driver_sql(f"PRAGMA max_page_count = {limit}").all()

            await database.run(work)

        operator = Operator(http, server.url, sqlite_site.admin_token)
        async with subscribers(5, server.url, sqlite_site.backend_token) as subs:
            last = await operator.create("billing")
            [(used,)] = await rows_of(server, "PRAGMA page_count")
            await pages(used + 3)
            accepted, refused = last, 0
            for n in range(20):
                fields: dict[str, Any] = {"llm_options": {"n": n, "text": "x" * 8000}}
                status, headers, said = await operator.ask("PUT", "/api/agents/billing", fields)
                if status == 507:
                    assert said["code"] == "insufficient-storage"
                    refused += 1
                else:
                    assert status == 200, said
                    accepted = int(headers["SLM-Revision"])
            assert refused > 0
            rows = await rows_of(server, "SELECT revision FROM state")
            changes = await rows_of(server, "SELECT max(revision), count(*) FROM changes")
            assert rows == [(accepted,)]
            assert changes == [(accepted, accepted)]
            status, _, said = await operator.ask("GET", "/api/agents/billing")
            assert (status, said["revision"]) == (200, accepted)
            await eventually(lambda: all(s.reached(accepted) for s in subs))
            assert all(s.revision == accepted for s in subs)

            await pages(1_000_000)
            after = await operator.set("billing", llm_model="new")
            assert after == accepted + 1
            await eventually(lambda: all(s.reached(after) for s in subs))
            truth = await operator.agents()
            assert all(s.agents == truth for s in subs)
    finally:
        await server.stop()
