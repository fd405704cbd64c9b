"""Backup while serving, and restore into another life of the database."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from slm.errors import DatabaseUnavailable, InsufficientStorage, InvalidRequest, StartupError
from slm.server.agents.schemas import AgentUpdate
from slm.server.lifecycle.backup import backup, restore
from slm.server.security.audit import Who
from slm.server.settings import Settings
from tests.server.test_adoption import MISSION
from tests.support.store import KEY, OTHER_KEY, Store, new_agent


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    """Settings of a SQLite database in a directory of its own."""
    folder = tmp_path / "data"
    return Settings(data_dir=folder, encryption_keys=SecretStr(KEY), lock_timeout_seconds=0.2)


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Store]:
    """A database in use."""
    store = await Store.open(settings)
    try:
        yield store
    finally:
        await store.close()


def names(folder: Path) -> list[str]:
    """Return the names of a folder's files."""
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    """Return a file's mode."""
    return path.stat().st_mode & 0o777


async def epoch_of(store: Store) -> str:
    """Return the epoch."""
    return str((await store.sql("SELECT epoch FROM state"))[0][0])


# --- backup ---


async def test_a_backup_is_the_database_at_one_moment(here: Settings, tmp_path: Path) -> None:
    """Taken while writes go on, it is whole: revisions, changes and table agree."""
    copy = tmp_path / "copy.db"
    async with serving(here) as store:
        await store.registry.create(new_agent(llm_api_key="sk-canary"), who=Who("tester"))

        async def write() -> None:
            for n in range(1, 60):
                await store.registry.update(
                    "billing", AgentUpdate(llm_timeout=n), who=Who("tester")
                )

        writing = asyncio.create_task(write())
        await asyncio.sleep(0)
        await backup(store.database, copy)
        await writing
        head = await store.head()
    assert mode(copy) == 0o600
    assert b"sk-canary" not in copy.read_bytes()
    settings = Settings(
        data_dir=tmp_path / "elsewhere",
        database_url=SecretStr(f"sqlite:///{copy}"),
        encryption_keys=SecretStr(KEY),
    )
    async with serving(settings) as restored:
        await restored.check_laws()
        assert 2 <= await restored.head() <= head
        assert (await restored.reads.llm("billing"))[0].llm_api_key == SecretStr("sk-canary")


async def test_no_write_waits_for_a_backup(here: Settings, tmp_path: Path) -> None:
    """Each is over long before the copy is, and the copy is of the moment when it began."""
    async with serving(here) as store:
        await store.registry.create(new_agent(), who=Who("tester"))
        fill = (
            "WITH RECURSIVE n(i) AS (SELECT 3 UNION ALL SELECT i + 1 FROM n WHERE i < 15000)"
            " INSERT INTO changes (revision, type, agent_id, agent, was_default, actor, comment,"
            " created_at) SELECT i, type, agent_id, agent || printf('%1000s', ' '), was_default,"
            " actor, comment, created_at FROM changes, n WHERE revision = 2"
        )
        await store.sql(fill)
        await store.sql("UPDATE state SET revision = 15000")
        copying = asyncio.create_task(backup(store.database, tmp_path / "copy.db"))
        during = 0
        while not copying.done():
            began = asyncio.get_running_loop().time()
            change = AgentUpdate(llm_timeout=during % 100 + 1)
            await store.registry.update("billing", change, who=Who("tester"))
            assert asyncio.get_running_loop().time() - began < 1, "far more than a write takes"
            during += not copying.done()
        await copying
        assert during >= 3
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        [head] = connection.execute("SELECT revision FROM state").fetchone()
        assert connection.execute("SELECT max(revision) FROM changes").fetchone() == (head,)
        assert 15000 <= head < 15000 + during


async def test_a_backup_replaces_nothing(here: Settings, tmp_path: Path) -> None:
    """A file that is there, a link to nowhere or a missing folder: refused, nothing written."""
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    async with serving(here) as store:
        for path in (there, link, tmp_path / "none" / "copy.db", here.data_dir):
            with pytest.raises(InvalidRequest):
                await backup(store.database, path)
        await store.check_laws()
    assert there.read_text() == "mine"
    assert names(tmp_path) == ["data", "link", "there"]


async def test_a_backup_of_postgresql_is_another_tools_work(
    postgres_url: str, tmp_path: Path
) -> None:
    """It says which."""
    settings = Settings(
        data_dir=tmp_path,
        database_url=SecretStr(postgres_url),
        encryption_keys=SecretStr(KEY),
    )
    async with serving(settings) as store:
        with pytest.raises(InvalidRequest, match="pg_dump"):
            await backup(store.database, tmp_path / "copy.db")
    with pytest.raises(StartupError, match="pg_restore"):
        await restore(settings, tmp_path / "copy.db")


async def test_a_backup_that_does_not_fit_leaves_nothing(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is 507, and no half of a file stays."""
    import resource

    async with serving(here) as store:
        await store.registry.create(new_agent(description="x" * 16000), who=Who("tester"))
        size = (here.data_dir / "slm.db").stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 + 4096, hard))
        try:
            with pytest.raises((InsufficientStorage, DatabaseUnavailable)):
                await backup(store.database, tmp_path / "copy.db")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == ["data"]
        await backup(store.database, tmp_path / "copy.db")


# --- restore ---


async def backed_up(here: Settings, path: Path) -> dict[str, Any]:
    """Make a database with one agent, back it up, and go on: one agent more, one changed."""
    async with serving(here) as store:
        await store.registry.create(new_agent(llm_api_key="sk-old"), who=Who("tester"))
        await backup(store.database, path)
        then = {"agents": await store.agents(), "epoch": await epoch_of(store)}
        await store.registry.create(new_agent("later"), who=Who("tester"))
        await store.registry.update(
            "billing", AgentUpdate(llm_api_key=SecretStr("sk-new")), who=Who("tester")
        )
        return then


async def test_a_restored_database_is_the_old_one_in_a_new_epoch(
    here: Settings, tmp_path: Path
) -> None:
    """What was later is gone, what was there is back, and positions of before mean nothing."""
    copy = tmp_path / "copy.db"
    then = await backed_up(here, copy)
    before = copy.read_bytes()
    notes = await restore(here, copy)
    assert "before-restore-1" in " ".join(notes)
    assert copy.read_bytes() == before
    async with serving(here) as store:
        assert await store.agents() == then["agents"]
        assert await epoch_of(store) != then["epoch"]
        assert (await store.reads.llm("billing"))[0].llm_api_key == SecretStr("sk-old")
        await store.check_laws()
    assert mode(here.data_dir / "slm.db") == 0o600


async def test_what_was_there_is_kept(here: Settings, tmp_path: Path) -> None:
    """Each restore keeps the database it replaces, and that one is whole."""
    copy = tmp_path / "copy.db"
    await backed_up(here, copy)
    await restore(here, copy)
    await restore(here, copy)
    kept = here.data_dir / "slm.db.before-restore-1"
    assert [name for name in names(here.data_dir) if "slm" in name] == [
        "slm.db",
        "slm.db.before-restore-1",
        "slm.db.before-restore-2",
    ]
    with contextlib.closing(sqlite3.connect(kept)) as connection:
        rows = connection.execute("SELECT agent_id FROM agents ORDER BY id").fetchall()
        assert rows == [("default",), ("billing",), ("later",)]
    # And it can be restored in its turn.
    await restore(here, kept)
    async with serving(here) as store:
        assert "later" in await store.agents()
        await store.check_laws()


async def test_every_restore_has_an_epoch_of_its_own(here: Settings, tmp_path: Path) -> None:
    """The same file restored twice gives two lives."""
    copy = tmp_path / "copy.db"
    await backed_up(here, copy)
    epochs = []
    for _ in range(2):
        await restore(here, copy)
        async with serving(here) as store:
            epochs.append(await epoch_of(store))
    assert len(set(epochs)) == 2


async def test_a_restore_under_a_running_server_is_refused(here: Settings, tmp_path: Path) -> None:
    """The server must be stopped, and nothing is touched while it is not."""
    copy = tmp_path / "copy.db"
    await backed_up(here, copy)
    async with serving(here) as store:
        before = names(here.data_dir)
        with pytest.raises(StartupError, match="stop it"):
            await restore(here, copy)
        assert names(here.data_dir) == before
        assert "later" in await store.agents()


async def test_a_restore_into_an_empty_directory(here: Settings, tmp_path: Path) -> None:
    """On a new machine it must be asked for; backup and encryption key are all that is needed."""
    copy = tmp_path / "copy.db"
    then = await backed_up(here, copy)
    new = Settings(data_dir=tmp_path / "new", encryption_keys=SecretStr(KEY))
    with pytest.raises(StartupError, match="--create"):
        await restore(new, copy)
    assert not new.data_dir.exists(), "nothing is made in a place that may not be the one meant"
    assert len(await restore(new, copy, create=True)) == 1
    async with serving(new) as store:
        assert await store.agents() == then["agents"]
    assert "slm.db.before-restore-1" not in names(new.data_dir)


async def test_a_restore_mends_a_damaged_database(here: Settings, tmp_path: Path) -> None:
    """That is what it is for: a broken file, and what lay beside it, are put away."""
    copy = tmp_path / "copy.db"
    then = await backed_up(here, copy)
    (here.data_dir / "slm.db").write_bytes(b"not a database any more " * 500)
    (here.data_dir / "slm.db-wal").write_bytes(b"rubbish " * 500)
    await restore(here, copy)
    assert "slm.db-wal" not in names(here.data_dir)
    assert (here.data_dir / "slm.db.before-restore-1").read_bytes().startswith(b"not a database")
    async with serving(here) as store:
        assert await store.agents() == then["agents"]
        await store.check_laws()


async def test_a_crashed_servers_wal_is_part_of_its_database(
    here: Settings, tmp_path: Path
) -> None:
    """Files copied from under a server are restored with what its WAL holds."""
    async with serving(here) as store:
        await store.registry.create(new_agent(), who=Who("tester"))
        for name in ("slm.db", "slm.db-wal"):
            (tmp_path / name).write_bytes((here.data_dir / name).read_bytes())
    new = Settings(data_dir=tmp_path / "new", encryption_keys=SecretStr(KEY))
    await restore(new, tmp_path / "slm.db", create=True)
    async with serving(new) as store:
        assert "billing" in await store.agents()
        await store.check_laws()


async def test_a_missing_encryption_key_is_told(here: Settings, tmp_path: Path) -> None:
    """Restoring works, and the operator hears that the next start needs the key of then."""
    copy = tmp_path / "copy.db"
    await backed_up(here, copy)
    other = Settings(data_dir=tmp_path / "new", encryption_keys=SecretStr(OTHER_KEY))
    assert "encryption key" in " ".join(await restore(other, copy, create=True))


@pytest.mark.parametrize(
    "script",
    [None, "", "CREATE TABLE t (a)", MISSION, "CREATE TABLE alembic_version (version_num TEXT)"],
)
async def test_what_is_no_slm_database_is_refused(
    here: Settings, tmp_path: Path, script: str | None
) -> None:
    """A text, an empty or a foreign database: refused with its name, nothing is changed."""
    copy = tmp_path / "copy.db"
    if script is None:
        copy.write_text("this is not a database, whatever its name says " * 50)
    else:
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            connection.executescript(script)
    async with serving(here):
        pass
    before = names(here.data_dir)
    with pytest.raises(StartupError) as caught:
        await restore(here, copy)
    assert str(copy) in str(caught.value)
    assert names(here.data_dir) == before


async def test_a_damaged_or_newer_backup_is_refused(here: Settings, tmp_path: Path) -> None:
    """Half a file, or one of a newer version: refused, the database that is there stays."""
    copy = tmp_path / "copy.db"
    await backed_up(here, copy)
    half = tmp_path / "half.db"
    content = copy.read_bytes()
    half.write_bytes(content[: len(content) // 2])
    with pytest.raises(StartupError, match="damaged"):
        await restore(here, half)
    with contextlib.closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StartupError, match="newer version"):
        await restore(here, copy)
    with pytest.raises(StartupError, match="cannot be restored"):
        await restore(here, tmp_path / "none.db")
    async with serving(here) as store:
        assert "later" in await store.agents()
    assert not [name for name in names(here.data_dir) if "restore" in name or name[0] == "."]
