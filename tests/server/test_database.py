"""The database: one function, one transaction, and a name for everything that goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from slm.errors import (
    DatabaseUnavailable,
    InsufficientStorage,
    OutcomeUnknown,
    StartupError,
)
from slm.server.agents.schemas import AgentUpdate
from slm.server.db.database import Database
from slm.server.security.audit import Who
from tests.support.postgres import connect
from tests.support.store import Store, new_agent


def on(engine: str) -> pytest.MarkDecorator:
    """Run a test that takes a store on this engine alone."""
    return pytest.mark.parametrize("database_url", [engine], indirect=True)


def files(folder: Path) -> dict[str, int]:
    """Return the names and modes of a folder's files."""
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Database]:
    database = Database(url, **({"lock_timeout_seconds": 0.2} | options))
    await database.open()
    try:
        yield database
    finally:
        await database.close()


def execute(statement: str, **parameters: Any) -> Callable[[Connection], Any]:
    def work(connection: Connection) -> Any:
        result = connection.execute(text(statement), parameters)
        return [tuple(row) for row in result] if result.returns_rows else None

    return work


# --- both engines ---


async def test_a_function_is_a_transaction(database_url: str) -> None:
    """What it did is there afterwards; if it raises, nothing of it is."""
    async with opened(database_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))

        def fail(connection: Connection) -> None:
            connection.execute(text("INSERT INTO t VALUES (1)"))
            raise LookupError("canary")

        with pytest.raises(LookupError, match="canary"):
            await database.run(fail)
        assert await database.run(execute("SELECT * FROM t")) == []
        await database.run(execute("INSERT INTO t VALUES (2)"))
        assert await database.read(execute("SELECT * FROM t")) == [(2,)]


async def test_a_fault_of_ours_is_no_fault_of_the_database(database_url: str) -> None:
    """A statement that is wrong is not told as a database that is away, and shows no value."""
    async with opened(database_url) as database:
        with pytest.raises(Exception, match="nonsense") as caught:
            await database.run(execute("SELECT nonsense FROM nowhere WHERE :x = 1", x="canary"))
        assert not isinstance(caught.value, DatabaseUnavailable)
        assert "canary" not in str(caught.value)


async def test_a_closed_database_is_unavailable(database_url: str) -> None:
    """After close every use is refused, and closing twice is closing once."""
    async with opened(database_url) as database:
        await database.close()
        with pytest.raises(DatabaseUnavailable):
            await database.run(execute("SELECT 1"))
        with pytest.raises(DatabaseUnavailable):
            await database.read(execute("SELECT 1"))


async def test_a_caller_that_leaves_does_not_undo_a_write(store: Store) -> None:
    """A cancelled request whose write has begun leaves it whole, and the database usable."""
    started, may_go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        connection.execute(text("UPDATE state SET floor = 7"))
        started.set()
        may_go_on.wait(10)

    task = asyncio.create_task(store.database.run(slow))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_go_on.set()
    # The next write waits for the first one's lock, on either engine.
    await store.registry.create(new_agent(), who=Who("tester"))
    assert await store.sql("SELECT floor FROM state") == [(7,)]


async def test_a_read_sees_one_moment(store: Store) -> None:
    """Two statements of one read see the same database, whatever is written between them."""

    def look(connection: Connection) -> tuple[int, int]:
        before = connection.execute(text("SELECT revision FROM state")).scalar_one()
        between.set()
        done.wait(0.3 if store.database.dialect == "sqlite" else 10)
        return before, connection.execute(text("SELECT max(revision) FROM changes")).scalar_one()

    between, done = threading.Event(), threading.Event()
    reading = asyncio.create_task(store.database.read(look))
    await asyncio.to_thread(between.wait, 10)
    writing = asyncio.create_task(store.registry.create(new_agent(), who=Who("tester")))
    if store.database.dialect == "postgresql":
        await writing
        done.set()
    assert await reading == (1, 1)
    assert (await writing).revision == 2


# --- SQLite ---


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


async def test_sqlite_is_opened_as_decided(sqlite_url: str) -> None:
    """WAL, every commit synced, foreign keys on: see docs/decisions/0001 and 0028."""
    async with opened(sqlite_url) as database:
        for pragma, value in (
            ("journal_mode", "wal"),
            ("locking_mode", "normal"),
            ("synchronous", 2),
            ("foreign_keys", 1),
        ):
            assert await database.run(execute(f"PRAGMA {pragma}")) == [(value,)]


async def test_closing_leaves_one_file(sqlite_url: str, tmp_path: Path) -> None:
    """The files of a database in use are readable by us alone; closing folds them into one."""
    async with opened(sqlite_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        await database.read_long(execute("SELECT * FROM t"))
        beside = {f"test.db{suffix}": 0o600 for suffix in ("", "-wal", "-shm")}
        assert files(tmp_path) == beside
    assert files(tmp_path) == {"test.db": 0o600}


async def test_a_second_opener_is_refused_in_one_sentence(sqlite_url: str) -> None:
    """Whoever comes second is told who holds the file, and the first one is not disturbed."""
    async with opened(sqlite_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        with pytest.raises(StartupError, match="Another process holds") as caught:
            async with opened(sqlite_url):
                pass
        assert "\n" not in str(caught.value)
        await database.run(execute("INSERT INTO t VALUES (1)"))
    async with opened(sqlite_url) as database:
        assert await database.run(execute("SELECT * FROM t")) == [(1,)]


async def test_a_second_process_is_refused_until_the_first_is_killed(
    sqlite_url: str, tmp_path: Path
) -> None:
    """The lock goes with its process, kill -9 included, and what it committed is there."""
    script = (
        "import asyncio, sys, signal\n"
        "from sqlalchemy import text\n"
        "from slm.server.db.database import Database\n"
        "async def main():\n"
        f"    database = Database({sqlite_url!r})\n"
        "    await database.open()\n"
        "    def work(connection):\n"
        "        connection.execute(text('CREATE TABLE t (a INTEGER)'))\n"
        "        connection.execute(text('INSERT INTO t VALUES (1)'))\n"
        "    await database.run(work)\n"
        "    print('open', flush=True)\n"
        "    signal.pause()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"open\n"
        with pytest.raises(StartupError, match="Another process holds"):
            async with opened(sqlite_url):
                pass
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    async with opened(sqlite_url) as database:
        assert await database.run(execute("SELECT * FROM t")) == [(1,)]


async def test_a_reader_from_outside_is_waited_for_only_so_long(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A sqlite3 shell in the middle of a transaction is another process too."""
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db")) as shell:
        shell.execute("CREATE TABLE t (a INTEGER)")
        shell.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StartupError, match="Another process holds"):
            async with opened(sqlite_url):
                pass


async def test_what_is_no_database_is_said_to_be_none(sqlite_url: str, tmp_path: Path) -> None:
    """Some other file is not touched and not called locked."""
    (tmp_path / "test.db").write_bytes(b"this is a text of some length " * 100)
    with pytest.raises(StartupError, match="not a SQLite database"):
        async with opened(sqlite_url):
            pass
    assert (tmp_path / "test.db").read_bytes().startswith(b"this is a text")


async def test_a_folder_is_no_database(tmp_path: Path) -> None:
    """A folder in the file's place, or no folder around it, is one sentence."""
    with pytest.raises(StartupError, match="is a folder"):
        async with opened(f"sqlite:///{tmp_path}"):
            pass
    with pytest.raises(StartupError, match="does not exist"):
        async with opened(f"sqlite:///{tmp_path}/none/test.db"):
            pass


@on("sqlite")
async def test_a_full_disk_is_507_and_nothing_partial(store: Store) -> None:
    """A write that does not fit is refused as a whole, and the next one that fits succeeds."""
    await store.registry.create(new_agent(), who=Who("tester"))
    pages = (await store.sql("PRAGMA page_count"))[0][0]
    await store.sql(f"PRAGMA max_page_count = {pages}")
    before = await store.agents()
    head = None
    for n in range(50):
        try:
            await store.registry.update(
                "billing", AgentUpdate(description=f"{n}" + "x" * 9000), who=Who("tester")
            )
        except InsufficientStorage:
            head = await store.head()
            break
        before = await store.agents()
    assert head is not None
    assert await store.agents() == before
    await store.check_laws()
    await store.sql("PRAGMA max_page_count = 100000")
    written = await store.registry.update("billing", AgentUpdate(llm_timeout=7), who=Who("tester"))
    assert written.revision == head + 1
    await store.check_laws()


# --- PostgreSQL ---


async def test_postgresql_sessions_are_bounded(postgres_url: str) -> None:
    """Lock and idle time-outs are set, and times are UTC whatever the server's zone."""
    async with opened(postgres_url, lock_timeout_seconds=1.5) as database:
        for name, value in (
            ("lock_timeout", "1500ms"),
            ("idle_in_transaction_session_timeout", "5s"),
            ("TimeZone", "UTC"),
            ("transaction_isolation", "read committed"),
        ):
            assert await database.run(execute(f"SHOW {name}")) == [(value,)]
        assert await database.read(execute("SHOW transaction_isolation")) == [("repeatable read",)]
        assert await database.read(execute("SHOW transaction_read_only")) == [("on",)]
        # The same connection is an ordinary one again.
        assert await database.run(execute("SHOW transaction_read_only")) == [("off",)]


@on("postgresql")
async def test_a_lock_that_is_not_had_in_time_is_503(store: Store, database_url: str) -> None:
    """Somebody else holds the state row: the write is refused and nothing was changed."""
    await store.registry.create(new_agent(), who=Who("tester"))
    with connect(database_url) as other:
        other.execute("BEGIN")
        other.execute("UPDATE state SET revision = revision")
        with pytest.raises(DatabaseUnavailable):
            await store.registry.update("billing", AgentUpdate(llm_timeout=7), who=Who("tester"))
        # A reader waits for nobody.
        assert (await store.reads.snapshot()).revision == 2
        other.execute("ROLLBACK")
    written = await store.registry.update("billing", AgentUpdate(llm_timeout=7), who=Who("tester"))
    assert written.revision == 3
    await store.check_laws()


async def test_a_stopped_writer_frees_its_lock(postgres_url: str) -> None:
    """A transaction that says nothing for too long is ended; nothing of it stays behind."""
    async with (
        opened(postgres_url, idle_in_transaction_seconds=0.2) as stopped,
        opened(postgres_url, lock_timeout_seconds=10) as other,
    ):
        await stopped.run(execute("CREATE TABLE t (a INTEGER)"))
        await stopped.run(execute("INSERT INTO t VALUES (0)"))
        locked, go_on = threading.Event(), threading.Event()

        def silent(connection: Connection) -> None:
            connection.execute(text("UPDATE t SET a = a + 1"))
            locked.set()
            go_on.wait(10)
            connection.execute(text("UPDATE t SET a = a + 1"))

        task = asyncio.create_task(stopped.run(silent))
        await asyncio.to_thread(locked.wait, 10)
        await other.run(execute("UPDATE t SET a = a + 10"))
        go_on.set()
        # Tried again as a whole, or refused as a whole.
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert result is None or isinstance(result, DatabaseUnavailable)
        expected = 12 if result is None else 10
        assert await stopped.run(execute("SELECT a FROM t")) == [(expected,)]


async def kill_sessions(url: str) -> None:
    def kill() -> None:
        with connect(url) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid != pg_backend_pid()"
            )

    await asyncio.to_thread(kill)


@on("postgresql")
async def test_lost_connections_are_replaced(store: Store, database_url: str) -> None:
    """Sessions killed while idle are noticed before they are used."""
    for n in range(3):
        await kill_sessions(database_url)
        written = await store.registry.create(new_agent(f"a{n}"), who=Who("tester"))
        assert written.revision == n + 2


async def test_a_connection_lost_in_a_write_leaves_nothing_half_done(postgres_url: str) -> None:
    """Killed before the commit began: the whole is done again, or nothing is and that is said."""
    async with opened(postgres_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        inserted, go_on = threading.Event(), threading.Event()

        def work(connection: Connection) -> None:
            connection.execute(text("INSERT INTO t VALUES (1)"))
            inserted.set()
            go_on.wait(10)
            connection.execute(text("INSERT INTO t VALUES (2)"))

        task = asyncio.create_task(database.run(work))
        await asyncio.to_thread(inserted.wait, 10)
        await kill_sessions(postgres_url)
        go_on.set()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert result is None or isinstance(result, DatabaseUnavailable)
        expected = [(1,), (2,)] if result is None else []
        assert await database.run(execute("SELECT * FROM t")) == expected


async def test_a_read_whose_connection_is_lost_is_made_again(postgres_url: str) -> None:
    """PostgreSQL ends a session that stood still in a transaction; who reads never hears of it."""
    async with opened(postgres_url) as database:
        sessions: list[int] = []

        def reading(connection: Connection) -> int:
            sessions.append(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
            if len(sessions) == 1:
                connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            return int(connection.execute(text("SELECT 7")).scalar_one())

        assert await database.read(reading) == 7
        assert len(set(sessions)) == 2


async def test_a_connection_lost_in_its_commit_is_an_unknown_outcome(postgres_url: str) -> None:
    """Nobody can say whether a commit went through whose answer never came."""
    async with opened(postgres_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        await database.run(
            execute(
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_sleep(30); RETURN NULL; END $$"
            )
        )
        # A deferred trigger runs inside COMMIT.
        await database.run(
            execute(
                "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON t"
                " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()"
            )
        )
        task = asyncio.create_task(database.run(execute("INSERT INTO t VALUES (1)")))
        await asyncio.to_thread(wait_for_sleep, postgres_url)
        await kill_sessions(postgres_url)
        with pytest.raises(OutcomeUnknown):
            await task
        assert await database.run(execute("SELECT * FROM t")) == []


def wait_for_sleep(url: str) -> None:
    with connect(url) as other:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        while True:
            row = other.execute(query).fetchone()
            if row is not None and row[0]:
                return


async def test_a_postgresql_that_is_away_refuses_the_start(postgres_url: str) -> None:
    """Nobody at that port: one sentence, with the host and without the password."""
    with pytest.raises(StartupError, match="cannot be opened") as caught:
        async with opened("postgresql+psycopg://u:canary@127.0.0.1:1/d"):
            pass
    assert "127.0.0.1" in str(caught.value)
    assert "canary" not in str(caught.value)
    assert "\n" not in str(caught.value)
