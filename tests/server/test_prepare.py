"""The first start and every later one: what is made, where, and when it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pwd
import sqlite3
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from slm.errors import StartupError
from slm.server.encryption.vault import fingerprint
from slm.server.security import tokens
from slm.server.security.audit import Who
from slm.server.settings import Settings
from tests.support.postgres import connect
from tests.support.store import KEY, OTHER_KEY, Store, new_agent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data directory that is not there yet."""
    return tmp_path / "deep" / "data"


@pytest.fixture
def made_folder(folder: Path) -> Path:
    """An empty data directory."""
    folder.mkdir(parents=True)
    return folder


def plain(folder: Path, *keys: str, **fields: Any) -> Settings:
    """Settings of a SQLite database in the folder, with these encryption keys given."""
    given = SecretStr(",".join(keys)) if keys else None
    return Settings(data_dir=folder, encryption_keys=given, lock_timeout_seconds=0.2, **fields)


def files(folder: Path) -> dict[str, int]:
    """Return the names and modes of a folder's files."""
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


def secrets_in(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files that hold a secret."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".db"}


async def start(settings: Settings) -> list[str]:
    """Start once, and return what was said."""
    store = await Store.open(settings)
    await store.close()
    return store.notes


async def refusal(settings: Settings) -> str:
    """Return why a start is refused: one sentence that holds no canary."""
    with pytest.raises(StartupError) as caught:
        await start(settings)
    sentence = str(caught.value)
    assert sentence
    assert "\n" not in sentence
    assert "canary" not in sentence
    return sentence


# --- an empty data directory ---


async def test_an_empty_directory_gets_everything(folder: Path) -> None:
    """Database, encryption key and the two tokens: made for us alone, and the default seeded."""
    store = await Store.open(plain(folder))
    agent = await store.agent("default")
    assert (agent.name, agent.llm_provider, agent.llm_model, agent.is_default) == (
        "Default Agent",
        "ollama",
        "mistral:7b-instruct",
        True,
    )
    assert (agent.revision, await store.head()) == (1, 1)
    await store.check_laws()
    await store.close()
    assert files(folder.parent) == {"data": 0o700}
    names = ("admin.token", "backend.token", "encryption.key", "slm.db")
    assert files(folder) == dict.fromkeys(names, 0o600)


async def test_notes_say_where_and_not_what(folder: Path) -> None:
    """Each secret's file is named, and no secret is."""
    notes = "\n".join(await start(plain(folder)))
    for name in ("encryption.key", "admin.token", "backend.token"):
        assert str(folder / name) in notes
        assert (folder / name).read_text().strip() not in notes
    assert await start(plain(folder)) == []


async def test_the_tokens_have_their_scopes(folder: Path) -> None:
    """The admin's reads no key, the backend's writes nothing; of both only the digest is stored."""
    store = await Store.open(plain(folder))
    rows = await store.sql(
        "SELECT name, digest, scopes, agents, revoked_at FROM tokens ORDER BY id"
    )
    await store.close()
    admin = (folder / "admin.token").read_text().strip()
    backend = (folder / "backend.token").read_text().strip()
    assert [tuple(row) for row in rows] == [
        ("admin", tokens.digest(admin), "config:read,agents:write,admin", None, None),
        ("backend", tokens.digest(backend), "config:read,key:read", None, None),
    ]
    stored = (folder / "slm.db").read_bytes()
    assert admin.encode() not in stored
    assert backend.encode() not in stored


async def test_what_was_made_is_used_again(folder: Path) -> None:
    """The next start has the same epoch, tokens and encryption key."""
    store = await Store.open(plain(folder))
    created = await store.registry.create(new_agent(llm_api_key="sk-kept"), who=Who("tester"))
    await store.close()
    before = secrets_in(folder)
    assert len(before) == 3
    store = await Store.open(plain(folder))
    config, revision, epoch = await store.reads.llm("billing")
    await store.close()
    assert config.llm_api_key == SecretStr("sk-kept")
    assert (revision, epoch) == (created.revision, created.epoch)
    assert secrets_in(folder) == before


async def test_every_database_has_an_epoch_of_its_own(tmp_path: Path) -> None:
    """Two first starts, two epochs."""
    epochs = set()
    for name in ("a", "b"):
        store = await Store.open(plain(tmp_path / name))
        epochs.add((await store.sql("SELECT epoch FROM state"))[0][0])
        await store.close()
    assert len(epochs) == 2
    assert all(len(epoch) == 16 for epoch in epochs)


async def test_tokens_in_the_directory_outlive_their_database(folder: Path) -> None:
    """A database made anew takes the tokens that are there: backends keep working."""
    await start(plain(folder))
    admin = (folder / "admin.token").read_text()
    (folder / "slm.db").unlink()
    store = await Store.open(plain(folder))
    digests = [digest for (digest,) in await store.sql("SELECT digest FROM tokens")]
    await store.close()
    assert (folder / "admin.token").read_text() == admin
    assert tokens.digest(admin.strip()) in digests


async def test_a_start_that_failed_is_made_good_by_the_next(made_folder: Path) -> None:
    """Refused half way, for one broken file: the next start finishes with what is there."""
    (made_folder / "backend.token").write_text("canary")
    assert "backend.token" in await refusal(plain(made_folder))
    key, admin = ((made_folder / name).read_text() for name in ("encryption.key", "admin.token"))
    (made_folder / "backend.token").unlink()
    store = await Store.open(plain(made_folder))
    assert tokens.digest(admin.strip()) in repr(await store.sql("SELECT digest FROM tokens"))
    await store.check_laws()
    await store.close()
    assert (made_folder / "encryption.key").read_text() == key


# --- encryption keys ---


async def test_a_given_key_is_used_and_none_is_made(folder: Path) -> None:
    """With SLM_ENCRYPTION_KEYS no key is written to disk."""
    await start(plain(folder, KEY))
    assert "encryption.key" not in files(folder)


async def test_the_wrong_key_is_told_at_the_start(folder: Path) -> None:
    """The database names its key by fingerprint; another one is refused before anything runs."""
    await start(plain(folder, KEY))
    sentence = await refusal(plain(folder, OTHER_KEY))
    assert fingerprint(KEY) in sentence
    assert fingerprint(OTHER_KEY) in sentence
    assert KEY not in sentence
    assert OTHER_KEY not in sentence
    await start(plain(folder, KEY))


async def test_the_lists_order_counts_at_the_first_start_only(folder: Path) -> None:
    """The database names the active key; a list in another order changes nothing."""
    store = await Store.open(plain(folder, KEY, OTHER_KEY))
    assert store.vault.fingerprints[0] == fingerprint(KEY)
    await store.close()
    store = await Store.open(plain(folder, OTHER_KEY, KEY))
    assert store.vault.fingerprints == (fingerprint(KEY), fingerprint(OTHER_KEY))
    await store.close()


async def test_a_lost_key_file_is_no_problem_while_nothing_needs_it(folder: Path) -> None:
    """No API key stored: a new encryption key is made."""
    await start(plain(folder))
    (folder / "encryption.key").unlink()
    assert any("encryption.key" in note for note in await start(plain(folder)))
    await start(plain(folder))


async def test_a_lost_key_file_is_told_when_something_needs_it(folder: Path) -> None:
    """An API key is stored: a new encryption key would not open it, so none is made."""
    store = await Store.open(plain(folder))
    await store.registry.create(new_agent(llm_api_key="sk-canary"), who=Who("tester"))
    await store.close()
    key = (folder / "encryption.key").read_text()
    (folder / "encryption.key").unlink()
    assert "encryption.key" in await refusal(plain(folder))
    assert "encryption.key" not in files(folder)
    (folder / "encryption.key").write_text(key)
    await start(plain(folder))


@pytest.mark.parametrize("content", [b"canary", b"", b"\xff\xfe", KEY.encode()[:-4]])
async def test_a_broken_key_file_is_told(made_folder: Path, content: bytes) -> None:
    """What is no Fernet key is named with its file, is not repeated and not replaced."""
    (made_folder / "encryption.key").write_bytes(content)
    assert "encryption.key" in await refusal(plain(made_folder))
    assert (made_folder / "encryption.key").read_bytes() == content


@pytest.mark.parametrize("keys", ["canary", f"{KEY},canary", ",", " "])
async def test_broken_given_keys_are_told(folder: Path, keys: str) -> None:
    """SLM_ENCRYPTION_KEYS that hold no key are named and not repeated."""
    sentence = await refusal(plain(folder, keys))
    assert "SLM_ENCRYPTION_KEYS" in sentence
    assert KEY not in sentence


async def test_a_key_file_that_others_can_read_is_told(folder: Path) -> None:
    """It still works, and the operator hears of it at each start."""
    await start(plain(folder))
    (folder / "encryption.key").chmod(0o644)
    (note,) = await start(plain(folder))
    assert "chmod 600" in note


async def test_a_damaged_check_is_told(folder: Path) -> None:
    """A check row that the named key does not open stops the start."""
    store = await Store.open(plain(folder, KEY))
    other = Fernet(OTHER_KEY).encrypt(b"x").decode()
    await store.sql("UPDATE encryption_keys SET check_token = :other", other=other)
    await store.close()
    assert "check" in await refusal(plain(folder, KEY))


# --- databases that cannot be served ---


async def test_a_newer_database_is_refused(folder: Path) -> None:
    """A revision of the tables that this version does not know: nothing is touched."""
    await start(plain(folder))
    with contextlib.closing(sqlite3.connect(folder / "slm.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert "newer version" in await refusal(plain(folder))


async def test_a_held_database_is_refused(folder: Path) -> None:
    """A second server on one data directory is told so, and leaves everything as it is."""
    store = await Store.open(plain(folder))
    before = files(folder)
    assert "Another process holds" in await refusal(plain(folder))
    assert files(folder) == before
    await store.check_laws()
    await store.close()


async def test_a_file_in_the_directorys_place_is_told(tmp_path: Path) -> None:
    """The data directory is a file, or lies below one."""
    (tmp_path / "file").write_text("")
    assert "not a folder" in await refusal(plain(tmp_path / "file"))
    assert "cannot be made" in await refusal(plain(tmp_path / "file" / "data"))


def as_ordinary_user(settings: Settings) -> str:
    """Return why a start is refused to a user who is not root."""

    def child(pipe: Pipe) -> None:
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
        pipe.send(asyncio.run(refusal(settings)))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return str(ours.recv())
    finally:
        process.join()


def give_to_ordinary_user(*paths: Path) -> None:
    """Give files to the user that `as_ordinary_user` runs as, and open the way to them."""
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        for path in paths:
            os.chown(path, user.pw_uid, user.pw_gid)
        for parent in paths[0].parents:
            if parent.owner() == "root" and not parent.stat().st_mode & 0o001:
                parent.chmod(0o711)


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """Read-only, or not to be entered: one sentence with the path."""
    folder = tmp_path / "data"
    folder.mkdir()
    give_to_ordinary_user(folder)
    for mode in (0o500, 0o000):
        folder.chmod(mode)
        assert str(folder) in as_ordinary_user(plain(folder))
        assert "cannot be made" in as_ordinary_user(plain(folder / "below"))
    folder.chmod(0o700)


def test_files_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    """A database or a key that this user may not open is named."""
    folder = tmp_path / "data"
    folder.mkdir()
    database, key = folder / "slm.db", folder / "encryption.key"
    database.touch(0o600)
    key.touch(0o000)
    give_to_ordinary_user(folder, database, key)
    assert str(key) in as_ordinary_user(plain(folder))
    key.unlink()
    database.chmod(0o400)
    assert str(database) in as_ordinary_user(plain(folder))


# --- PostgreSQL ---


async def test_postgresql_needs_a_given_key(postgres_url: str, made_folder: Path) -> None:
    """Servers that share a database share its key: none is made, nor taken from the directory."""
    (made_folder / "encryption.key").write_text(KEY)
    settings = Settings(data_dir=made_folder, database_url=SecretStr(postgres_url))
    assert "SLM_ENCRYPTION_KEYS" in await refusal(settings)


async def test_postgresql_gets_its_first_tokens_from_who_migrates_it(
    postgres_url: str, tmp_path: Path
) -> None:
    """The first server writes the two tokens; the next one, elsewhere, makes none."""
    for name in ("first", "second"):
        settings = Settings(
            data_dir=tmp_path / name,
            database_url=SecretStr(postgres_url),
            encryption_keys=SecretStr(KEY),
        )
        await start(settings)
    assert sorted(files(tmp_path / "first")) == ["admin.token", "backend.token"]
    assert not (tmp_path / "second").exists()


async def test_three_starts_at_once_on_an_empty_postgresql(
    postgres_url: str, tmp_path: Path
) -> None:
    """One migrates, the others wait for it, and all of them serve the same database."""
    stores = await asyncio.gather(
        *(
            Store.open(
                Settings(
                    data_dir=tmp_path / str(n),
                    database_url=SecretStr(postgres_url),
                    encryption_keys=SecretStr(KEY),
                )
            )
            for n in range(3)
        )
    )
    for n, store in enumerate(stores):
        written = await store.registry.create(new_agent(f"a{n}"), who=Who("tester"))
        assert written.revision == n + 2
        await store.check_laws()
    for store in stores:
        await store.close()
    assert sum("admin.token" in files(tmp_path / name) for name in files(tmp_path)) == 1


async def test_a_table_of_the_missions_in_postgresql_is_taken_over(
    postgres_url: str, tmp_path: Path
) -> None:
    """The mission's table is adopted on PostgreSQL too, and llm_model is widened there."""
    with connect(postgres_url) as connection:
        connection.execute(
            "CREATE TABLE agents (id SERIAL PRIMARY KEY, agent_id VARCHAR(64) UNIQUE NOT NULL,"
            " name VARCHAR(128) NOT NULL, description TEXT, llm_provider VARCHAR(32) NOT NULL,"
            " llm_endpoint VARCHAR(256), llm_model VARCHAR(64) NOT NULL,"
            " llm_api_key_encrypted TEXT, llm_timeout INTEGER DEFAULT 30,"
            " llm_temperature FLOAT DEFAULT 0.7, llm_max_tokens INTEGER,"
            " is_default BOOLEAN DEFAULT FALSE, is_active BOOLEAN DEFAULT TRUE,"
            " created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,"
            " updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP)"
        )
        for name in ("a", "b"):
            connection.execute(
                "INSERT INTO agents (agent_id, name, llm_provider, llm_model, is_default,"
                " llm_timeout, llm_api_key_encrypted) VALUES (%s, 'A', 'openai', 'm', true, null,"
                " %s)",
                (name, Fernet(OTHER_KEY).encrypt(f"sk-{name}".encode()).decode()),
            )
    settings = Settings(
        data_dir=tmp_path,
        database_url=SecretStr(postgres_url),
        encryption_keys=SecretStr(f"{KEY},{OTHER_KEY}"),
    )
    store = await Store.open(settings)
    try:
        agent = await store.agent("a")
        assert (agent.is_default, agent.llm_timeout) == (True, 30)
        assert not (await store.agent("b")).is_default
        assert (await store.reads.llm("b"))[0].llm_api_key == SecretStr("sk-b")
        await store.registry.create(new_agent(llm_model="m" * 256), who=Who("tester"))
        await store.check_laws()
    finally:
        await store.close()
