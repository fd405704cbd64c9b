"""A database that can be read and not written: plain reads go on, and everybody is told."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.support.postgres import connect
from tests.support.raw import Api
from tests.support.servers import eventually, running_server
from tests.support.store import KEY


async def _is_red(api: Api) -> bool:
    answer = await api.get("/readyz")
    return answer.status == 503 and answer.json["writable"] is False


async def _is_green(api: Api) -> bool:
    return (await api.get("/readyz")).status == 200


@pytest.mark.parametrize("noticed_by", ["a write", "itself"])
async def test_a_database_that_became_read_only(
    postgres_url: str,
    tmp_path: Path,
    session: aiohttp.ClientSession,
    caplog: pytest.LogCaptureFixture,
    noticed_by: str,
) -> None:
    """Writes are 503, reads go on and say that they may be old; then all is as before."""
    options = {"database_url": postgres_url, "encryption_keys": KEY, "lease_seconds": 0.9}
    async with running_server(tmp_path / "data", **options) as server:
        api = Api(server, session, server.admin_token)
        assert (await api.put("default", llm_model="m1")).status == 200
        name = "(SELECT current_database())"
        with connect(postgres_url) as admin:
            row = admin.execute(f"SELECT {name}").fetchone()
            assert row is not None

            def set_read_only(value: str) -> None:
                alter = f'ALTER DATABASE "{row[0]}" SET default_transaction_read_only = {value}'
                admin.execute("SET default_transaction_read_only = off")
                admin.execute(alter)
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid != pg_backend_pid()"
                )

            set_read_only("on")
            if noticed_by == "a write":
                answer = await api.put("default", llm_model="m2")
                assert (answer.status, answer.code) == (503, "database-unavailable")
                assert "read-only" in answer.json["detail"]
            await eventually(lambda: _is_red(api))
            assert "read-only" in (await api.get("/readyz")).json["reason"]
            plain = await api.get("/api/agents/default")
            assert (plain.status, plain.json["llm_model"]) == (200, "m1")
            assert plain.headers["SLM-Stale"] == "true"
            set_read_only("off")
        await eventually(lambda: _is_green(api), timeout=20)
        assert (await api.put("default", llm_model="m3")).status == 200
    told = [r for r in caplog.records if "cannot be written" in r.getMessage()]
    assert len(told) == 1


async def test_a_full_disk_makes_readyz_red_until_there_is_room(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """507 for the write, red until one fits again, found without anybody writing."""
    async with running_server(tmp_path / "data", lease_seconds=0.9) as server:
        api = Api(server, session, server.admin_token)
        database = server.running.services.database

        async def limit(pages: int) -> None:
            await database.run(
                lambda c: c.exec_driver_sql(f"PRAGMA max_page_count = {pages}") and None
            )

        await limit(1)
        statuses = set()
        for n in range(60):
            answer = await api.put("default", description=f"{n}" + "x" * 9000)
            statuses.add(answer.status)
            if answer.status == 507:
                break
        assert 507 in statuses
        assert await _is_red(api)
        assert (await api.get("/api/agents/default")).status == 200
        await limit(100000)
        await eventually(lambda: _is_green(api))
