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

from slm.server.models import Base
from slm.server.prepare import MIGRATIONS
from slm.server.settings import Settings
from tests.server.store import KEY, Store, new_agent
from tests.server.test_adoption import MISSION

ROOT = Path(__file__).parents[2]


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
        " VALUES ('raw', 'Raw', 'openai', 'gpt-4')"
    )
    agent = await store.agent("raw")
    assert (agent.llm_timeout, agent.llm_temperature, agent.llm_max_tokens) == (30, 0.7, None)
    assert (agent.is_default, agent.is_active, agent.llm_options) == (False, True, {})


async def test_the_database_itself_refuses_a_second_default(store: Store) -> None:
    """Whoever writes, by whatever way: two defaults cannot be."""
    await store.registry.create(new_agent(), actor="tester")
    with pytest.raises(Exception, match=r"(?i)unique"):
        await store.sql("UPDATE agents SET is_default = TRUE WHERE agent_id = 'billing'")


async def test_migrating_again_changes_nothing(settings: Settings) -> None:
    """A second start finds the newest tables, the same epoch, and no work."""
    store = await Store.open(settings)
    await store.registry.create(new_agent(), actor="tester")
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
        "from slm.server.prepare import prepare\n"
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
