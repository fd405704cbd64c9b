"""Old entries of the audit are removed once exported, and nobody else can cut the chain."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, delete, func, select, update

from slm.cli.commands.audit_export import check
from slm.errors import ConfigurationError, Conflict
from slm.server.db.database import Database
from slm.server.db.tables import AUDIT, AUDIT_HEAD, utc_now
from slm.server.encryption.keyring import Keyring
from slm.server.encryption.vault import Vault
from slm.server.lifecycle.audit_retention import note_exported, trim
from slm.server.lifecycle.startup import prepare
from slm.server.security import audit
from slm.server.security.audit import GENESIS, AuditEvent, AuditLog, Who, append_all
from slm.server.security.audit_reader import ends
from slm.server.settings import Settings
from tests.support.command import slm
from tests.support.http import Caller, agent
from tests.support.servers import InLoopServer, eventually
from tests.support.store import KEY

ADA = Who("ada", "192.0.2.7")
OLD, NEW = 1200, 5


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = None
    if request.param == "postgresql":
        url = SecretStr(request.getfixturevalue("postgres_url"))
    prepared = await prepare(
        Settings(data_dir=tmp_path / "data", database_url=url, encryption_keys=SecretStr(KEY))
    )
    yield prepared.database
    await prepared.database.close()


@pytest.fixture
def vault() -> Vault:
    return Vault([KEY])


@pytest.fixture
def keyring(vault: Vault) -> Keyring:
    return Keyring(vault, lambda: [SecretStr(KEY)])


@pytest.fixture
async def log(database: Database, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> AuditLog:
    """An audit with entries of long ago and of today."""

    def fill(connection: Connection) -> None:
        events = [AuditEvent(ADA, "key.read", f"agent-{number}") for number in range(OLD + NEW)]
        append_all(connection, events[:OLD])
        monkeypatch.undo()
        append_all(connection, events[OLD:])

    await database.run(_forget)
    long_ago = utc_now() - timedelta(days=100)
    monkeypatch.setattr(audit, "utc_now", lambda: long_ago)
    await database.run(fill)
    return AuditLog(database, vault.unseal)


def _forget(connection: Connection) -> None:
    connection.execute(delete(AUDIT))
    connection.execute(update(AUDIT_HEAD).values(seq=0, hash=GENESIS))


async def _count(database: Database) -> int:
    return await database.read(
        lambda c: c.execute(select(func.count()).select_from(AUDIT)).scalar_one()
    )


async def _export(database: Database, seq: int | None = None) -> None:
    def note(connection: Connection) -> None:
        head = ends(connection).head
        if seq is not None:
            found = connection.execute(select(AUDIT.c.hash).where(AUDIT.c.seq == seq))
            head = type(head)(seq, found.scalar_one())
        note_exported(connection, head, ADA)

    await database.run(note)


async def test_only_what_is_old_and_exported_goes(
    log: AuditLog, database: Database, keyring: Keyring
) -> None:
    """Without an export nothing goes; then what it has and is old; the rest is still whole."""
    assert await trim(database, keyring, keep_days=30) == 0
    await _export(database, 700)
    assert await trim(database, keyring, keep_days=365) == 0
    assert await trim(database, keyring, keep_days=30) == 700
    noted = (await log.verify()).head
    await _export(database)
    assert await trim(database, keyring, keep_days=30) == OLD - 700
    assert await trim(database, keyring, keep_days=30) == 0
    verdict = await log.verify(noted)
    cut = (await database.read(ends)).cut
    assert (verdict.whole, verdict.cut, cut.seq) == (True, str(cut), OLD)
    # Two exports and two cuts were recorded as well.
    assert verdict.rows == await _count(database) == NEW + 4
    assert [e.action for e in await log.entries(action="audit.")] == [
        "audit.cut",
        "audit.export",
        "audit.cut",
        "audit.export",
    ]


async def test_a_cut_that_another_made_shows(
    log: AuditLog, database: Database, keyring: Keyring
) -> None:
    """Without the encryption key nobody can remove the beginning of the chain unnoticed."""
    entries = await log.entries(limit=3)
    start = entries[-1]

    def cut(connection: Connection, seal: str | None) -> None:
        connection.execute(delete(AUDIT).where(AUDIT.c.seq <= start.seq))
        connection.execute(
            update(AUDIT_HEAD).values(cut_seq=start.seq, cut_hash=start.hash, cut_seal=seal)
        )

    assert (await log.verify()).whole
    forged = Vault([Vault.generate_key()])
    vault = keyring.vault
    seals = [None, "", "x", forged.seal(f"{start.seq}:{start.hash}")]
    seals += [vault.seal("1:" + "0" * 64), vault.make_check_of(vault.fingerprints[0])]
    for seal in seals:
        await database.run(lambda c, seal=seal: cut(c, seal))  # type: ignore[misc]
        verdict = await log.verify()
        assert not verdict.whole
        assert "encryption key" in verdict.reason
    await database.run(lambda c: c.execute(update(AUDIT_HEAD).values(cut_seq=0)) and None)
    assert not (await log.verify()).whole


async def test_what_was_altered_is_not_removed(
    log: AuditLog, database: Database, keyring: Keyring
) -> None:
    """An old entry that was altered stays, with all that follow it: it is evidence."""
    await _export(database)
    altered = update(AUDIT).where(AUDIT.c.seq == 600).values(actor="eve")
    await database.run(lambda c: c.execute(altered) and None)
    with pytest.raises(Conflict, match="entry 600: the row was altered"):
        await trim(database, keyring, keep_days=30)
    verdict = await log.verify()
    assert (verdict.whole, verdict.broken_at) == (False, 600)
    assert await _count(database) > OLD + NEW - 600


async def test_the_cut_outlives_a_rotation(ask: Caller, server: InLoopServer) -> None:
    """Another encryption key seals the cut anew, and the one of before is not pruned until then."""
    services = server.running.services
    await ask("POST", "/api/agents", agent("a"))
    head = (await ask("GET", "/api/admin/audit/verify")).body["head"]
    assert (await ask("POST", "/api/admin/audit/exported", {"head": head})).status == 200
    database, keyring = services.database, services.keyring
    assert await trim(database, keyring, keep_days=-1) == int(head.partition(":")[0])
    await ask("POST", "/api/admin/keys")
    await ask("POST", "/api/admin/keys/rotate", {})
    assert (await ask("POST", "/api/admin/keys/prune")).status == 409
    await ask("POST", "/api/admin/keys/reencrypt")
    assert (await ask("POST", "/api/admin/keys/prune")).status == 200
    assert len(keyring.vault.fingerprints) == 1
    assert (await ask("GET", "/api/admin/audit/verify")).body["whole"]


async def test_an_export_that_is_not_of_this_audit_is_refused(ask: Caller) -> None:
    """Entries that do not exist, or are different, cannot be marked as exported."""
    head = (await ask("GET", "/api/admin/audit/verify")).body["head"]
    seq, _, digest = head.partition(":")
    for wrong in (f"{seq}:{'0' * 64}", f"{int(seq) + 1}:{digest}", f"{2**63 - 1}:{digest}"):
        answer = await ask("POST", "/api/admin/audit/exported", {"head": wrong})
        assert (answer.status, answer.code) == (409, "conflict")
    for nonsense in ("x", "1:2", f"{'9' * 30}:{digest}", 5, None):
        answer = await ask("POST", "/api/admin/audit/exported", {"head": nonsense})
        assert answer.status == 422


async def test_the_command_exports_and_checks(
    ask: Caller, server: InLoopServer, tmp_path: Path
) -> None:
    """Two exports make one chain that is checked without a server; an edited line shows."""
    where: dict[str, Any] = {"data": server.data_dir, "env": {"SLM_URL": server.url}}
    first, second, whole = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "all"))
    await ask("POST", "/api/agents", agent("a"))
    done = await slm("audit", "export", str(first), **where)
    assert done.code == 0, done.err
    assert first.stat().st_mode & 0o777 == 0o600
    await ask("PUT", "/api/agents/a", {"llm_model": "n"})
    assert (await slm("audit", "export", str(second), **where)).code == 0
    assert (await slm("audit", "export", str(whole), "--all", **where)).code == 0
    both = await slm("audit", "verify", str(first), str(second))
    assert (both.code, both.out.startswith("Whole: ")) == (0, True)
    verdict, alone = check([first, second]), check([whole])
    assert (verdict["whole"], alone["whole"]) == (True, True)
    # The second export is itself an entry of the third.
    assert alone["rows"] == verdict["rows"] + 1
    assert check([second], verdict["head"])["whole"]
    assert not check([first], verdict["head"])["whole"]
    assert "does not go on" in check([second, first])["reason"]
    for edited in _edits(first.read_text()):
        first.write_text(edited)
        with contextlib.suppress(ConfigurationError):
            assert not check([first])["whole"], edited


def _edits(text: str) -> list[str]:
    lines = text.splitlines(keepends=True)
    middle: dict[str, Any] = json.loads(lines[1]) | {"actor": "eve"}
    return [
        "".join([lines[0], json.dumps(middle) + "\n", *lines[2:]]),
        "".join([lines[0], *lines[2:]]),
        "".join(lines[:-1]),
        "".join([*lines[:-2], lines[-1]]),
        "".join([*lines, lines[1]]),
        "",
        "[]\n",
    ]


async def test_the_server_trims_by_itself(ask: Caller, server: InLoopServer) -> None:
    """With SLM_AUDIT_KEEP_DAYS the exported entries go once they are old enough, and no others."""

    def age(connection: Connection) -> None:
        _forget(connection)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(audit, "utc_now", lambda: utc_now() - timedelta(days=3))
            events = [AuditEvent(ADA, "key.read", f"agent-{number}") for number in range(10)]
            append_all(connection, events)
        note_exported(connection, ends(connection).head, ADA)

    await server.running.services.database.run(age)
    await server.stop()
    await server.start(audit_keep_days=2, audit_trim_seconds=0.05)

    async def trimmed() -> bool:
        cut: str | None = (await ask("GET", "/api/admin/audit/verify")).body["cut"]
        return cut is not None and cut.startswith("10:")

    await eventually(trimmed)
    assert (await ask("GET", "/api/admin/audit/verify")).body["whole"]
