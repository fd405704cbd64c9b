"""The audit's chain: what was written stays as it was, or it shows."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, func, select, text, update

from slm.errors import InsufficientStorage
from slm.server.db.database import Database
from slm.server.db.tables import AUDIT, AUDIT_HEAD
from slm.server.lifecycle.startup import prepare
from slm.server.security.audit import GENESIS, AuditEvent, AuditLog, Who, append
from slm.server.settings import Settings

ADA = Who("ada", "192.0.2.7")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    prepared = await prepare(Settings(data_dir=tmp_path / "data"))
    yield prepared.database
    await prepared.database.close()


async def _fill(database: Database, count: int) -> AuditLog:
    log = AuditLog(database)
    for number in range(count):
        await log.record(
            AuditEvent(ADA, "agent.update", f"agent-{number}", {"fields": ["llm_model"]})
        )
    return log


async def test_a_chain_left_alone_is_whole(database: Database) -> None:
    """Entries come newest first, page by page, and the chain holds."""
    log = await _fill(database, 25)
    before = (await log.verify()).rows - 25
    newest = await log.entries(limit=10)
    assert [e.agent_id for e in newest] == [f"agent-{n}" for n in range(24, 14, -1)]
    assert (newest[0].actor, newest[0].address) == ("ada", "192.0.2.7")
    assert newest[0].at.endswith("Z")
    following = await log.entries(limit=3, before=newest[-1].seq)
    assert [e.seq for e in following] == [newest[-1].seq - n for n in (1, 2, 3)]
    assert [e.agent_id for e in await log.entries(agent_id="agent-3")] == ["agent-3"]
    assert len(await log.entries(action="agent.", actor="ada")) == 25
    assert await log.entries(action="agent_", actor="ada") == []
    verdict = await log.verify()
    assert (verdict.whole, verdict.rows) == (True, before + 25)


@pytest.mark.parametrize(
    "tampering",
    [
        update(AUDIT).where(AUDIT.c.seq == 12).values(actor="somebody else"),
        update(AUDIT).where(AUDIT.c.seq == 12).values(at="2020-01-01T00:00:00.000000Z"),
        update(AUDIT).where(AUDIT.c.seq == 12).values(address=None),
        update(AUDIT).where(AUDIT.c.seq == 12).values(agent_id="agent-99"),
        update(AUDIT).where(AUDIT.c.seq == 12).values(detail="{}"),
        update(AUDIT).where(AUDIT.c.seq == 12).values(hash=GENESIS),
        update(AUDIT).where(AUDIT.c.seq == 12).values(seq=1000),
        delete(AUDIT).where(AUDIT.c.seq == 12),
        delete(AUDIT).where(AUDIT.c.seq > 12),
        delete(AUDIT),
        update(AUDIT_HEAD).values(seq=12),
    ],
    ids=str,
)
async def test_any_alteration_shows(database: Database, tampering: object) -> None:
    """A row changed, moved or taken away is found, and which."""
    log = await _fill(database, 25)
    await database.run(lambda c: c.execute(tampering) and None)  # type: ignore[call-overload]
    verdict = await log.verify()
    assert not verdict.whole
    assert verdict.broken_at is not None
    assert verdict.reason


async def test_a_chain_written_anew_shows_against_a_head_that_was_noted(
    database: Database,
) -> None:
    """Whoever rewrites everything, hashes too, is found by the head that was kept elsewhere."""
    log = await _fill(database, 25)
    noted = (await log.verify()).head
    assert (await log.verify(noted)).whole
    await log.record(AuditEvent(ADA, "key.read", "agent-1"))
    assert (await log.verify(noted)).whole, "a chain that grew still holds the old head"

    def rewrite(connection: Connection) -> None:
        connection.execute(delete(AUDIT))
        connection.execute(update(AUDIT_HEAD).values(seq=0, hash=GENESIS))
        for _ in range(40):
            append(connection, AuditEvent(Who("mallory"), "agent.update", "harmless"))

    await database.run(rewrite)
    assert (await log.verify()).whole
    assert not (await log.verify(noted)).whole
    for nonsense in ("", "1", "x:y", "99999:abc", "-1:abc"):
        assert not (await log.verify(nonsense)).whole


async def test_what_cannot_be_recorded_does_not_happen(database: Database) -> None:
    """With the disk full in the middle of a transaction its other work is undone, too."""
    log = await _fill(database, 1)
    before = (await log.verify()).rows

    def work(connection: Connection) -> None:
        connection.execute(text("UPDATE agents SET name = 'changed'"))
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        for _ in range(1000):
            append(connection, AuditEvent(ADA, "agent.update", "x" * 60))

    with pytest.raises(InsufficientStorage):
        await database.run(work)
    names = await database.read(
        lambda c: c.execute(text("SELECT count(*) FROM agents WHERE name = 'changed'")).scalar_one()
    )
    assert names == 0
    verdict = await log.verify()
    assert (verdict.whole, verdict.rows) == (True, before)


async def test_appends_from_many_tasks_make_one_chain(database: Database) -> None:
    """However many append at once, no number is missing or given twice."""
    log = AuditLog(database)
    before = (await log.verify()).rows
    await asyncio.gather(
        *(log.record(AuditEvent(Who(f"token-{n}"), "key.read", "a")) for n in range(200))
    )
    verdict = await log.verify()
    assert (verdict.whole, verdict.rows) == (True, before + 200)
    rows = await database.read(
        lambda c: c.execute(select(func.count()).select_from(AUDIT)).scalar_one()
    )
    assert rows == before + 200
