"""PostgreSQL as operators run it: poolers, encodings, several hosts, too few connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from slm.errors import ConfigurationError, DatabaseUnavailable, StartupError
from slm.server.database_url import sqlalchemy_spelling
from slm.server.db.database import Database
from slm.server.db.engines.postgresql import refuse_unfit
from slm.server.settings import Settings, load_settings
from tests.server.test_database import execute, opened
from tests.support.faults.network import Proxy
from tests.support.postgres import connect, free_port
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server
from tests.support.store import KEY

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


# --- poolers ---


@contextlib.contextmanager
def pooler(url: str, mode: str) -> Iterator[str]:
    """Run pgbouncer in front of a database; give the URL through it."""
    assert PGBOUNCER is not None
    real, port = make_url(url), free_port()
    # Where another user than root may read: pgbouncer refuses to be root.
    folder = Path(tempfile.mkdtemp(prefix="slm-bouncer-"))
    folder.chmod(0o755)
    ini = folder / "bouncer.ini"
    ini.write_text(
        f"[databases]\n{real.database} = host={real.host} port={real.port} user={real.username}\n"
        f"[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\nunix_socket_dir=\n"
        f"auth_type=any\npool_mode={mode}\nlogfile=\npidfile=\n"
    )
    user = "nobody" if os.geteuid() == 0 else None
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([PGBOUNCER, str(ini)], user=user, stdout=log, stderr=log)
    try:
        through = real.set(host="127.0.0.1", port=port)
        text = through.render_as_string(hide_password=False)
        for _ in range(500):
            with contextlib.suppress(psycopg.OperationalError), connect(text):
                break
            assert process.poll() is None, (folder / "log").read_text()
        yield text
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


@pytest.mark.skipif(PGBOUNCER is None, reason="there is no pgbouncer here")
@pytest.mark.parametrize("mode", ["transaction", "statement"])
async def test_a_pooler_that_shares_sessions_is_refused(postgres_url: str, mode: str) -> None:
    """One sentence at the start, which says what to do."""
    with pooler(postgres_url, mode) as url:
        with pytest.raises(StartupError, match="pool_mode = session") as caught:
            async with opened(url):
                pass
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(PGBOUNCER is None, reason="there is no pgbouncer here")
async def test_a_pooler_of_sessions_is_as_good_as_none(postgres_url: str, tmp_path: Path) -> None:
    """Through pool_mode = session the server starts, writes and hears."""
    with pooler(postgres_url, "session") as url:
        options = {"database_url": url, "encryption_keys": KEY}
        async with running_server(tmp_path / "data", **options) as server:
            [task] = [
                each
                for each in server.running.services.supervisor.states()
                if each.name == "listener"
            ]
            assert task.running


async def test_two_connections_of_one_session_are_seen_through(postgres_url: str) -> None:
    """What a pooler does, without one: both are given the same session of PostgreSQL."""
    with connect(postgres_url) as one, connect(postgres_url) as other:
        refuse_unfit(one, other, "it")
        with pytest.raises(StartupError, match="pooler"):
            refuse_unfit(one, one, "it")


async def test_prepared_statements_that_are_gone_fail_no_request(
    postgres_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler that comes later gives another session: nothing is 500, and the log says why."""
    options = {"database_url": postgres_url, "encryption_keys": KEY}
    async with running_server(tmp_path / "data", **options) as server, api(server) as admin:
        for n in range(30):
            assert (await admin.put("default", llm_timeout=n + 1)).status == 200
        database = server.running.services.database
        forget = execute("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
        await asyncio.gather(*(database.run(forget) for _ in range(16)))
        answers = [await admin.put("default", llm_timeout=n + 100) for n in range(20)]
        statuses = Counter(answer.status for answer in answers)
        assert statuses.keys() <= {200, 503}
        assert statuses[200] >= 10
        assert (await admin.put("default", llm_timeout=99)).status == 200
    told = [r for r in caplog.records if "pooler" in r.getMessage()]
    assert len(told) == 1


@contextlib.asynccontextmanager
async def api(server: InLoopServer) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession() as session:
        yield Api(server, session, server.admin_token, key_token=server.backend_token)


# --- encodings ---


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_that_is_not_in_utf8_is_refused(postgres: str, encoding: str) -> None:
    """It could not hold every name: it is refused in one sentence, and nothing is created."""
    name = f"slm_{encoding.lower()}_{os.getpid()}"
    with connect(postgres) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        try:
            url = make_url(postgres).set(database=name).render_as_string(hide_password=False)
            with pytest.raises(StartupError, match=f"encoding {encoding}; SLM needs UTF8"):
                async with opened(url):
                    pass
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_another_client_encoding_is_not_taken_over(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment or the database sets for its clients changes no text."""
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    async with opened(postgres_url) as database:
        assert await database.read(execute("SELECT '日本 🎉'")) == [("日本 🎉",)]


# --- connections ---


async def test_exhausted_connections_wait_for_one_of_ours(postgres_url: str) -> None:
    """While PostgreSQL takes no more, a transaction waits for the connection of another."""
    name = make_url(postgres_url).database
    with connect(postgres_url) as admin:
        role = f"few_{name}"
        admin.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 2")
        admin.execute(f"GRANT ALL ON SCHEMA public TO {role}")
        url = make_url(postgres_url).set(username=role).render_as_string(hide_password=False)
        try:
            async with opened(url, lock_timeout_seconds=5) as database:
                slow = execute("SELECT pg_sleep(0.05)")
                await asyncio.gather(*(database.run(slow) for _ in range(30)))
                stuck = [database.run(execute("SELECT pg_sleep(1)")) for _ in range(2)]
                held = [asyncio.ensure_future(each) for each in stuck]
                assert database._main is not None
                database._main.wait_seconds = 0.1
                busy = f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{role}'"
                busy += " AND state = 'active' AND query LIKE '%pg_sleep(1)%'"
                await eventually(lambda: admin.execute(busy).fetchall() == [(2,)])
                with pytest.raises(DatabaseUnavailable):
                    await database.run(execute("SELECT 1"))
                await asyncio.gather(*held)
        finally:
            admin.execute(f"REVOKE ALL ON SCHEMA public FROM {role}")
            admin.execute(f"DROP ROLE {role}")


# --- several hosts ---


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("postgresql://u:p@a:1,b:2/d?x=1", "postgresql://u:p@/d?host=a,b&port=1,2&x=1"),
        ("postgresql://a,b/d", "postgresql:///d?host=a,b&port=5432,5432"),
        ("postgres://u@[::1]:7,b/d", "postgres://u@/d?host=::1,b&port=7,5432"),
        ("postgresql+psycopg://a,b:3", "postgresql+psycopg:///?host=a,b&port=5432,3"),
        ("postgresql://u@a:1/d?x=1,2", "postgresql://u@a:1/d?x=1,2"),
        ("sqlite:////a,b/c.db", "sqlite:////a,b/c.db"),
    ],
)
def test_libpqs_spelling_of_several_hosts(given: str, read: str) -> None:
    """Hosts and ports are named one after the other, as SQLAlchemy reads them."""
    assert sqlalchemy_spelling(given) == read
    make_url(read)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("postgresql+psycopg:///d?host=a,b&port=1,2", "read-write"),
        ("postgresql+psycopg:///d?host=a:1&host=b:2", "read-write"),
        ("postgresql+psycopg:///d?host=a,b&target_session_attrs=any", "any"),
        ("postgresql+psycopg://a/d", None),
        ("postgresql+psycopg:///d?host=/run/postgresql", None),
    ],
)
def test_of_several_hosts_the_writable_one_is_meant(given: str, meant: str | None) -> None:
    """A standby that is named first, or that was the primary once, takes no connection of ours."""
    assert Database(given).url.query.get("target_session_attrs") == meant


def test_a_port_that_is_none_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which setting, and never the password in it."""
    monkeypatch.setenv("SLM_DATABASE_URL", "postgresql://u:canary@a:x,b/d")
    with pytest.raises(ConfigurationError, match="SLM_DATABASE_URL") as caught:
        load_settings()
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("spelling", ["libpq", "query"])
async def test_a_failover_to_the_second_host_goes_on_by_itself(
    postgres_url: str, tmp_path: Path, spelling: str
) -> None:
    """The engine and the listener find the host that is there, whichever it is."""
    real = make_url(postgres_url)
    assert real.host is not None
    assert real.port is not None
    first, second = Proxy(real.host, real.port), Proxy(real.host, real.port)
    await first.open()
    await second.open()
    try:
        user, name = real.username, real.database
        hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
        url = f"postgresql://{user}@{hosts}/{name}?target_session_attrs=read-write"
        if spelling == "query":
            ports = f"{first.port},{second.port}"
            url = f"postgresql://{user}@/{name}?host=127.0.0.1,127.0.0.1&port={ports}"
        options = {"database_url": url, "encryption_keys": KEY}
        async with running_server(tmp_path / "data", **options) as server, api(server) as admin:
            assert (await admin.put("default", llm_model="m1")).status == 200
            await first.close()

            async def writes() -> bool:
                return (await admin.put("default", llm_model="m2")).status == 200

            await eventually(writes)

            async def listens() -> bool:
                query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = :n"
                found = execute(f"{query} AND datname = current_database()", n="slm-listener")
                return bool((await server.running.services.database.read(found))[0][0])

            await eventually(listens)
            assert (await admin.get("/readyz")).status == 200
    finally:
        await first.close()
        await second.close()


def test_the_name_of_several_hosts_has_no_password() -> None:
    """Messages name every host."""
    url = Settings(database_url=SecretStr("postgresql://u:canary@a:1,b:2/d")).url
    name = Database(url).name
    assert "a,b" in name
    assert "canary" not in name
