"""`slm db`: upgrade, a backup of a running server, and the way back."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

from tests.support.command import CANARY, slm
from tests.support.servers import ServerProcess, running_server


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_backup_and_restore(tmp_path: Path) -> None:
    """What was there at the backup is there after the restore, keys usable; the rest is not."""
    data, copy = tmp_path / "data", tmp_path / "copy.db"
    async with ServerProcess(data) as server:
        create = ("agents", "create", "kept", "--provider", "openai", "--model", "m")
        assert (await slm(*create, "--api-key-stdin", stdin=CANARY, data=data)).code == 0
        made = await slm("db", "backup", str(copy), data=data)
        assert (made.code, made.err) == (0, "")
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert names_in(tmp_path) == {"copy.db", "data", "data.log"}
        assert CANARY.encode() not in copy.read_bytes()

        later = ("agents", "create", "later", "--provider", "openai", "--model", "m")
        assert (await slm(*later, data=data)).code == 0
        before = (await slm("agents", "list", "--json", data=data)).json

        running = await slm("db", "restore", str(copy), "--yes", data=data)
        assert (running.code, "stop it" in running.error) == (1, True)
        await server.terminate()
        restored = await slm("db", "restore", str(copy), "--yes", data=data)
        assert (restored.code, restored.err) == (0, "")

        await server.start()
        after = (await slm("agents", "list", "--json", data=data)).json
        assert [agent["agent_id"] for agent in after["agents"]] == ["default", "kept"]
        assert after["agents"][1]["has_api_key"] is True
        assert after["epoch"] != before["epoch"]


async def test_a_backup_never_replaces_a_file(tmp_path: Path) -> None:
    """A file of that name is left as it is, and so is a name that cannot be written."""
    (tmp_path / "there").write_text("mine")
    async with running_server(tmp_path / "data") as server:
        (server.data_dir / "server.url").write_text(server.url)
        for name, said in (("there", "is there already"), ("no/where", "cannot be written")):
            done = await slm("db", "backup", str(tmp_path / name), data=server.data_dir)
            assert (done.code, said in done.error) == (1, True), done.err
        assert (tmp_path / "there").read_text() == "mine"
        whole = await slm("db", "backup", str(tmp_path / "new.db"), "--json", data=server.data_dir)
        assert whole.json == {
            "file": str(tmp_path / "new.db"),
            "bytes": (tmp_path / "new.db").stat().st_size,
        }


async def test_restore_asks(tmp_path: Path) -> None:
    """Without a terminal to ask at it wants --yes, and does nothing."""
    (tmp_path / "some.db").write_text("x")
    done = await slm("db", "restore", str(tmp_path / "some.db"), data=tmp_path / "data")
    assert (done.code, "--yes" in done.error) == (2, True)
    assert not (tmp_path / "data").exists()


async def test_restore_refuses_a_place_without_a_database(tmp_path: Path) -> None:
    """Without --data it finds no database, says so, and makes none; --create makes one."""
    data, copy = tmp_path / "data", tmp_path / "copy.db"
    assert (await slm("db", "upgrade", data=data)).code == 0
    copy.write_bytes((data / "slm.db").read_bytes())
    elsewhere = tmp_path / "elsewhere"
    refused = await slm("db", "restore", str(copy), "--yes", data=elsewhere)
    assert refused.code == 1
    assert str(elsewhere / "slm.db") in refused.error
    assert "--data" in refused.error
    assert not elsewhere.exists()
    made = await slm("db", "restore", str(copy), "--yes", "--create", data=elsewhere)
    assert made.code == 0, made.err
    assert (elsewhere / "slm.db").exists()


async def test_what_is_no_backup_is_refused(tmp_path: Path) -> None:
    """A file that is no database of ours is refused and the one in place stays."""
    data = tmp_path / "data"
    assert (await slm("db", "upgrade", data=data)).code == 0
    (tmp_path / "text").write_text("not a database, though it is long enough to be one" * 100)
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE something (id INTEGER)")
    foreign.commit()
    foreign.close()
    before = (data / "slm.db").read_bytes()
    for name in ("text", "foreign.db"):
        done = await slm("db", "restore", str(tmp_path / name), "--yes", data=data)
        assert done.code == 1, done.out
        assert done.error
    assert (data / "slm.db").read_bytes() == before


async def test_upgrade_makes_a_directory_ready(tmp_path: Path) -> None:
    """`db upgrade` makes database, key and tokens, says where they are, and can be run again."""
    data = tmp_path / "data"
    first = await slm("db", "upgrade", data=data)
    assert (first.code, first.err) == (0, "")
    assert str(data / "admin.token") in first.out
    again = await slm("db", "upgrade", data=data)
    assert again.out == "The database is of this version.\n"
    async with ServerProcess(data):
        busy = await slm("db", "upgrade", data=data)
        assert (busy.code, "Another process holds" in busy.error) == (1, True)
