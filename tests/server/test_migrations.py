"""The migrations: they make the tables that the models declare, from wherever they start."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy import Connection, inspect

from slm.server.agents.schemas import AgentUpdate
from slm.server.db.database import Database
from slm.server.db.tables import Base
from slm.server.lifecycle.startup import MIGRATIONS, migrate
from slm.server.security.audit import AuditLog, Who
from slm.server.settings import Settings
from tests.server.test_adoption import MISSION
from tests.support.postgres import connect
from tests.support.store import KEY, OTHER_KEY, Store, new_agent

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "fixtures" / "9a5197c"
SINCE_OLD = [
    revision.revision
    for revision in reversed(list(ScriptDirectory(str(MIGRATIONS)).walk_revisions()))
    if revision.revision > "0003"
]


async def test_the_migrated_tables_are_the_declared_ones(store: Store) -> None:
    """Nothing is declared that no migration makes, and nothing made that is not declared."""

    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))

    assert await store.database.run(differences) == []


async def test_the_missions_columns_are_as_it_has_them(store: Store) -> None:
    """The first fifteen columns of `agents` are the mission's, in its order."""

    def look(connection: Connection) -> dict[str, bool]:
        columns = inspect(connection).get_columns("agents")
        return {column["name"]: column["nullable"] for column in columns}

    columns = await store.database.run(look)
    with contextlib.closing(sqlite3.connect(":memory:")) as plain:
        plain.executescript(MISSION)
        info = plain.execute("PRAGMA table_info(agents)").fetchall()
    assert list(columns)[:15] == [name for _, name, *_ in info]
    for _, name, _, not_null, _, is_key in info:
        assert columns[name] is not (not_null or is_key)


async def test_a_row_of_the_missions_sql_works_here_too(store: Store) -> None:
    """An INSERT that names only what the mission needs takes its defaults."""
    await store.sql(
        "INSERT INTO agents (agent_id, name, llm_provider, llm_model)"
        " VALUES ('raw', 'Raw', 'openai', 'gpt-6.1-sol')"
    )
    agent = await store.agent("raw")
    assert (agent.llm_timeout, agent.llm_temperature, agent.llm_max_tokens) == (30, 0.7, None)
    assert (agent.is_default, agent.is_active, agent.llm_options) == (False, True, {})


async def test_the_database_itself_refuses_a_second_default(store: Store) -> None:
    """Whoever writes, by whatever way: two defaults cannot be."""
    await store.registry.create(new_agent(), who=Who("tester"))
    with pytest.raises(Exception, match=r"(?i)unique"):
        await store.sql("UPDATE agents SET is_default = TRUE WHERE agent_id = 'billing'")


async def test_migrating_again_changes_nothing(settings: Settings) -> None:
    """A second start finds the newest tables, the same epoch, and no work."""
    store = await Store.open(settings)
    await store.registry.create(new_agent(), who=Who("tester"))
    before = await store.sql("SELECT * FROM state"), await store.changes()
    await store.close()
    store = await Store.open(settings)
    assert (await store.sql("SELECT * FROM state"), await store.changes()) == before
    await store.close()


def test_migrations_are_one_line_without_batches() -> None:
    """One head, and never batch_alter_table: it lost UNIQUE and AUTOINCREMENT."""
    script = ScriptDirectory(str(MIGRATIONS))
    assert len(script.get_heads()) == 1
    for revision in script.walk_revisions():
        assert "batch_alter_table(" not in Path(revision.path).read_text()


def test_the_wheel_brings_its_migrations(tmp_path: Path) -> None:
    """Installed from a wheel, with no source tree and no alembic.ini, a database is migrated."""
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import asyncio, slm, pathlib\n"
        "from slm.server.lifecycle.startup import prepare\n"
        "from slm.server.settings import Settings\n"
        "assert pathlib.Path(slm.__file__).is_relative_to(pathlib.Path('site').absolute())\n"
        "async def main():\n"
        "    prepared = await prepare(Settings(data_dir='data'))\n"
        "    await prepared.database.close()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "slm.db")) as connection:
        assert connection.execute("SELECT agent_id FROM agents").fetchall() == [("default",)]


async def test_migrations_of_a_path_with_any_name(tmp_path: Path) -> None:
    """A percent sign or a space in a path is no part of a template."""
    folder = tmp_path / "100% data?x=1"
    store = await Store.open(Settings(data_dir=folder, encryption_keys=SecretStr(KEY)))
    await store.check_laws()
    await store.close()
    assert (folder / "slm.db").exists()


# --- from a database that a server of 9a5197c made ---


def load_old(url: str, path: Path) -> None:
    """Make the database of 9a5197c as its dump has it."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript((OLD / "sqlite.sql").read_text())
        path.chmod(0o600)
    else:
        with connect(url) as connection_:
            connection_.execute((OLD / "postgresql.sql").read_text().encode())


async def rows(store: Store, table: str, columns: str, order: str) -> list[tuple[Any, ...]]:
    """Return a table's rows."""
    statement = f"SELECT {columns} FROM {table} ORDER BY {order}"
    return [tuple(row) for row in await store.sql(statement)]


@pytest.mark.parametrize("revision", SINCE_OLD)
async def test_every_migration_keeps_what_an_old_database_holds(
    database_url: str, tmp_path: Path, revision: str
) -> None:
    """Agents, keys, history, tokens and the audit's chain are whole, from 9a5197c on.

    The database is brought to this migration, closed, and opened by this version.
    """
    load_old(database_url, tmp_path / "test.db")
    database = Database(database_url)
    await database.open()
    await database.run(lambda connection: migrate(connection, revision))
    await database.close()
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=SecretStr(database_url),
        encryption_keys=SecretStr(f"{KEY},{OTHER_KEY}"),
    )
    store = await Store.open(settings)
    try:
        agents = await store.agents()
        assert set(agents) == {"default", "billing", "support", "local", "asleep"}
        assert [each for each, agent in agents.items() if agent.is_default] == ["support"]
        assert agents["billing"].description == "Zürich 日本 🎉"
        assert agents["billing"].llm_temperature == agents["default"].llm_temperature == 0.7
        assert agents["support"].llm_options == {"top_p": 0.5, "stop": ["ENDE"]}
        local = agents["local"]
        assert (local.llm_model, local.llm_timeout, local.llm_max_tokens) == ("llama3.1", 7, 99)
        assert not agents["asleep"].is_active
        for agent_id, key in (("billing", "billing"), ("support", "support-2")):
            found = (await store.reads.llm(agent_id))[0].llm_api_key
            assert found == SecretStr(f"sk-fixture-{key}")
        await store.reads.check()
        assert not store.reads.undecryptable
        told = await rows(store, "changes", "revision, type, agent_id", "revision")
        assert [revision for revision, *_ in told] == list(range(1, await store.head() + 1))
        assert [(kind, agent) for _, kind, agent in told if agent == "gone"] == [
            ("agent_created", "gone"),
            ("agent_deleted", "gone"),
        ]
        await store.check_laws()
        tokens = await rows(store, "tokens", "name, agents, revoked_at IS NULL", "id")
        assert [(name, agents) for name, agents, _ in tokens] == [
            *(("admin", None), ("backend", None), ("limited", '["bill*", "local"]')),
            *(("revoked", None), ("brief", None)),
        ]
        assert [bool(counts) for *_, counts in tokens] == [True, True, True, False, True]
        verdict = await AuditLog(store.database).verify()
        assert (verdict.whole, verdict.reason) == (True, "")
        [(hashed,)] = await rows(store, "audit WHERE seq = 19", "hash", "seq")
        assert hashed in (OLD / f"{store.database.dialect}.sql").read_text()
        written = await store.registry.create(new_agent("later"), who=Who("tester"))
        assert written.revision == len(told) + 1
        await store.check_laws()
    finally:
        await store.close()


async def test_an_upgrade_changes_no_temperature(database_url: str, tmp_path: Path) -> None:
    """What was served with 0.7 keeps it, a NULL too; from now on a NULL means that none is sent."""
    load_old(database_url, tmp_path / "test.db")
    database = Database(database_url)
    await database.open()
    await database.run(lambda connection: migrate(connection, "0007"))
    await database.run(
        lambda connection: connection.exec_driver_sql(
            "UPDATE agents SET llm_temperature = NULL WHERE agent_id = 'billing'"
        )
    )
    await database.close()
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=SecretStr(database_url),
        encryption_keys=SecretStr(f"{KEY},{OTHER_KEY}"),
    )
    store = await Store.open(settings)
    try:
        assert (await store.agent("billing")).llm_temperature == 0.7
        await store.registry.update("billing", AgentUpdate(llm_temperature=None), who=Who("tester"))
        await store.registry.create(new_agent("later"), who=Who("tester"))
        for agent_id in ("billing", "later"):
            assert (await store.agent(agent_id)).llm_temperature is None
        await store.check_laws()
        await store.close()
        store = await Store.open(settings)
        assert (await store.agent("billing")).llm_temperature is None, "a second start keeps it"
    finally:
        await store.close()
