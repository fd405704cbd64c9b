"""Files of another account: nothing that it owns, can write or could have put there is used.

As root the files are given to another user id; as an ordinary user, who cannot give files away,
the process takes itself for another one. The rules are the same for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from slm.cli import target as connection
from slm.client.transport.http import TokenSource
from slm.client.transport.tls import TlsFiles
from slm.common import files
from slm.errors import ConfigurationError, SLMError, StartupError
from slm.server.encryption.keyring import read_keys
from slm.server.lifecycle.startup import prepare
from slm.server.settings import Settings, load_settings
from slm.server.transport.tls import ServerTls
from tests.support.command import slm
from tests.support.store import KEY, Store

EVIL = 23002
SHARED_GROUP = 23010
TOKEN = "slm_" + "A" * 43

GiveAway = Callable[[Path], None]


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> GiveAway:
    """Gives a file to another account."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, EVIL, EVIL, follow_symlinks=False)
        else:
            us = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: us + 1)

    return give


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data directory that is ours."""
    path = tmp_path / "data"
    path.mkdir(0o700)
    return path


async def refusal(folder: Path) -> str:
    """Return why a server does not start on this folder; it must not."""
    with pytest.raises(StartupError) as caught:
        await prepare(Settings(data_dir=folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the data directory and what is in it ---


async def test_a_data_directory_that_another_account_made_is_refused(
    folder: Path, give_away: GiveAway
) -> None:
    """An admin token and an encryption key that another account left are not used, even by root."""
    for name, text in (("admin.token", TOKEN), ("encryption.key", KEY)):
        (folder / name).write_text(text)
    give_away(folder)
    assert "belongs to another account" in await refusal(folder)
    assert not (folder / "slm.db").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
async def test_a_data_directory_that_others_can_write_is_refused(folder: Path, mode: int) -> None:
    """Whoever can write into it could have left a token there."""
    os.chmod(folder, mode)  # noqa: PTH101
    assert "can be written by another user" in await refusal(folder)


@pytest.mark.parametrize("name", ["admin.token", "backend.token", "encryption.key", "slm.db"])
async def test_a_file_of_another_account_in_it_is_refused(
    folder: Path, name: str, give_away: GiveAway
) -> None:
    """Each file that the server trusts must be its own."""
    file = folder / name
    file.write_text("" if name == "slm.db" else KEY if name == "encryption.key" else TOKEN)
    file.chmod(0o600)
    give_away(file)
    assert "belongs to another account" in await refusal(folder)


@pytest.mark.parametrize("name", ["admin.token", "encryption.key", "slm.db", "slm.db-wal"])
@pytest.mark.parametrize("how", ["group", "world", "fifo", "folder", "device"])
async def test_a_file_that_others_can_write_or_that_is_none_is_refused(
    folder: Path, name: str, how: str
) -> None:
    """Nothing hangs on a FIFO, and nothing is read from what anybody could change."""
    file = folder / name
    if how == "fifo":
        os.mkfifo(file, 0o600)
    elif how == "folder":
        file.mkdir(0o700)
    elif how == "device":
        file.symlink_to("/dev/null")
    else:
        file.write_text(KEY if name == "encryption.key" else TOKEN)
        file.chmod(0o620 if how == "group" else 0o602)
    async with asyncio.timeout(20):
        assert "cannot be used" in await refusal(folder)


async def test_a_link_of_another_account_is_not_followed(
    tmp_path: Path, folder: Path, give_away: GiveAway
) -> None:
    """A link is refused as the data directory and on the way to it; our own is followed."""
    ours = tmp_path / "ours"
    ours.symlink_to(folder)
    store = await Store.open(Settings(data_dir=ours / "deep"))
    await store.close()
    assert (folder / "deep" / "slm.db").exists()

    theirs = tmp_path / "theirs"
    theirs.symlink_to(folder)
    give_away(theirs)
    for path in (theirs, theirs / "deep"):
        assert "another account" in await refusal(path)


@pytest.mark.parametrize("mode", [0o777, 0o775])
async def test_a_parent_in_which_others_can_exchange_it_is_refused(
    tmp_path: Path, mode: int
) -> None:
    """Whoever can rename the data directory could replace it; in a sticky folder they cannot."""
    parent = tmp_path / "parent"
    parent.mkdir()
    if os.geteuid() == 0:
        os.chown(parent, -1, SHARED_GROUP)
    parent.chmod(mode)
    if os.geteuid() == 0 or mode == 0o777:
        assert "can be written by another user" in await refusal(parent / "data")
    parent.chmod(mode | stat.S_ISVTX)
    store = await Store.open(Settings(data_dir=parent / "data"))
    await store.close()
    assert stat.S_IMODE((parent / "data").stat().st_mode) == 0o700


async def test_a_volume_of_kubernetes_takes_a_directory_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parent that is root's and our group's is taken; the volume itself is not the directory."""
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o2775)
    if os.geteuid() == 0:
        os.chown(volume, 0, SHARED_GROUP)
        assert "can be written by another user" in await refusal(volume / "slm")
        monkeypatch.setattr(os, "getgroups", lambda: [SHARED_GROUP])
        store = await Store.open(Settings(data_dir=volume / "slm"))
        await store.close()
    status = volume.stat()
    faked = os.stat_result((status.st_mode, 0, 0, 1, 0, os.getegid(), 0, 0, 0, 0))
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    files._judge_on_the_way(faked, "/volume")
    with pytest.raises(files.NotTrusted, match="/volume/slm"):
        files._judge_own_folder(faked, "/volume")


# --- what is only read ---


def _readers(path: Path) -> list[Callable[[], object]]:
    return [
        lambda: files.read_given(path),
        lambda: TokenSource(token_file=path),
        lambda: connection.read_token(path),
        lambda: TlsFiles(ca_file=path).context(),
        lambda: TlsFiles(client_cert=path).context(),
        lambda: ServerTls(path, path).context(),
    ]


@pytest.mark.parametrize("how", ["another's", "group", "world", "fifo", "large"])
def test_a_token_or_certificate_that_others_could_change_is_refused(
    tmp_path: Path, how: str, give_away: GiveAway
) -> None:
    """The SDK, the command line and the server judge such a file alike, and say what to do."""
    file = tmp_path / "file"
    if how == "fifo":
        os.mkfifo(file, 0o600)
    else:
        file.write_text("x" * 5_000_000 if how == "large" else TOKEN)
        file.chmod({"group": 0o620, "world": 0o602}.get(how, 0o600))
    if how == "another's":
        give_away(file)
    for read in _readers(file):
        with pytest.raises(SLMError) as caught:
            read()
        assert str(file) in str(caught.value)


def test_a_token_may_be_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orchestrator mounts secrets as root's files, behind root's links."""
    assert files.read_given("/etc/passwd")  # root's on every system
    file = tmp_path / "..data"
    file.write_text(TOKEN)
    (tmp_path / "token").symlink_to("..data")
    assert TokenSource(token_file=tmp_path / "token").headers()["Authorization"].endswith(TOKEN)
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    with pytest.raises(files.NotTrusted, match="belongs to another account"):
        files.read_own("/etc/passwd")


def test_a_second_name_of_our_file_in_an_open_folder_is_refused(tmp_path: Path) -> None:
    """In /tmp anybody may link a file of ours to the name that we read."""
    secret = tmp_path / "secret"
    secret.write_text(TOKEN)
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o1777)
    os.link(secret, place / "token")
    with pytest.raises(files.NotTrusted, match="hard link"):
        files.read_given(place / "token")


def test_a_descriptor_that_was_handed_down_is_read(tmp_path: Path) -> None:
    """`--token-file <(command)` is a pipe of the shell's."""
    reader, writer = os.pipe()
    os.write(writer, TOKEN.encode())
    os.close(writer)
    assert connection.read_token(Path(f"/dev/fd/{reader}")) == TOKEN
    os.close(reader)


# --- the command line ---


@pytest.mark.parametrize(
    ("folder_mode", "file_mode", "whose"),
    [
        (0o755, 0o644, "another's file"),
        (0o755, 0o644, "another's folder"),
        (0o770, 0o660, "ours"),
        (0o2775, 0o664, "ours"),
        (0o700, 0o664, "ours"),
        (0o777, 0o644, "ours"),
    ],
)
async def test_no_token_goes_to_an_address_that_another_account_could_have_left(
    tmp_path: Path, folder: Path, folder_mode: int, file_mode: int, whose: str
) -> None:
    """`server.url` counts only where nobody else could have written it; so for root."""
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1000))
        writer.close()

    listener = await asyncio.start_server(hear, "127.0.0.1", 0)
    file = folder / "server.url"
    file.write_text(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}\n")
    file.chmod(file_mode)
    if os.geteuid() == 0:
        os.chown(folder, -1, SHARED_GROUP)
        os.chown(file, -1, SHARED_GROUP)
    elif whose != "ours":
        file_mode = 0o646  # as near as an ordinary user comes to it
        file.chmod(file_mode)
    os.chmod(folder, folder_mode)  # noqa: PTH101
    if os.geteuid() == 0 and whose != "ours":
        os.chown(file if "file" in whose else folder, EVIL, EVIL)
    done = await slm("agents", "list", data=folder, SLM_TOKEN=TOKEN)
    listener.close()
    assert heard == []
    assert done.code == 1
    assert "--url" in done.error


async def test_the_server_leaves_its_address_for_itself_alone(folder: Path) -> None:
    """With umask 0, too: a command would not use it otherwise."""
    from tests.support.servers import ServerProcess

    before = os.umask(0)
    try:
        server = ServerProcess(folder.parent / "served")
        await server.start()
    finally:
        os.umask(before)
    try:
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in server.data_dir.iterdir()}
        assert set(modes.values()) == {0o600}
        assert "server.url" in modes
        assert (await slm("agents", "list", data=server.data_dir)).code == 0
    finally:
        await server.terminate()


# --- the command that prints encryption keys ---


def test_the_key_command_gets_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variable of SLM, no other secret, and those that the operator names."""
    seen = tmp_path / "seen"
    command = tmp_path / "command"
    command.write_text(f"#!/bin/sh\nenv > {seen}\necho {KEY}\n")
    command.chmod(0o700)
    for name in ("SLM_METRICS_TOKEN", "SLM_TOKEN", "AUTOBOT_LLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "sk-canary")
    monkeypatch.setenv("VAULT_ADDR", "https://vault.example")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    settings = load_settings(
        encryption_key_command=str(command), encryption_key_command_env="VAULT_ADDR, AWS_*"
    )
    assert [key.get_secret_value() for key in read_keys(settings).keys] == [KEY]
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert {"PATH", "VAULT_ADDR", "AWS_REGION"} <= names
    assert "canary" not in seen.read_text()
    with pytest.raises(ConfigurationError):
        load_settings(encryption_key_command_env="PATH,slm_token")


# --- a SQLite file from somebody else ---

_HOSTILE = {
    "trigger": "CREATE TRIGGER t AFTER UPDATE ON state BEGIN DELETE FROM audit; END",
    "trigger on an index": "CREATE TRIGGER t AFTER INSERT ON audit BEGIN DELETE FROM tokens; END",
    "view": "CREATE VIEW v AS SELECT * FROM tokens",
    "virtual table": "CREATE VIRTUAL TABLE v USING fts5(a)",
    "generated column": "ALTER TABLE agents ADD COLUMN g TEXT AS (upper(name)) VIRTUAL",
    "expression": "CREATE INDEX i ON tokens (lower(name))",
    "foreign key": "ALTER TABLE audit ADD COLUMN f INTEGER REFERENCES tokens(id) ON DELETE CASCADE",
}


@pytest.mark.parametrize("what", _HOSTILE)
async def test_a_file_whose_schema_acts_by_itself_is_refused(
    tmp_path: Path, folder: Path, what: str
) -> None:
    """At a start and at a restore: one sentence, and nothing was changed."""
    hostile = tmp_path / "hostile"
    for place in (hostile, folder):
        store = await Store.open(Settings(data_dir=place))
        await store.close()
    with contextlib.closing(sqlite3.connect(hostile / "slm.db")) as database, database:
        database.execute(_HOSTILE[what])
    before = (hostile / "slm.db").read_bytes()
    assert "SLM did not make" in await refusal(hostile)
    assert (hostile / "slm.db").read_bytes() == before
    done = await slm("db", "restore", str(hostile / "slm.db"), "--yes", data=folder)
    assert (done.code, "SLM did not make" in done.error) == (1, True)
    store = await Store.open(Settings(data_dir=folder))
    await store.close()


async def test_a_table_of_ours_beside_an_adopted_one_is_refused(folder: Path) -> None:
    """A file that brings its own tokens is not taken over."""
    with contextlib.closing(sqlite3.connect(folder / "slm.db")) as database, database:
        database.execute("CREATE TABLE Tokens (id INTEGER PRIMARY KEY, name, digest, scopes)")
    (folder / "slm.db").chmod(0o600)
    assert "a table 'tokens'" in await refusal(folder)
