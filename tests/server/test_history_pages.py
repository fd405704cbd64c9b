"""Pages of the history and of the audit: right, bounded in rows and bytes, each by an index."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    select,
)
from sqlalchemy.pool import StaticPool

from slm.schemas import Change
from slm.server.agents.history import ChangeFilter, History
from slm.server.db.pages import MAX_EXAMINED, MAX_PAGE_BYTES
from slm.server.security import agent_scope_sql as view_sql
from slm.server.security.agent_scope import View
from slm.server.security.audit import AuditLog, Who
from slm.server.security.audit_reader import AuditFilter
from slm.server.settings import Settings
from tests.support.store import Store, new_agent

ROWS = 20_000
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
LIMITED = View(("agent-19*", "agent-0_0", "[agent-000"))
NOTHING = View(("nothing-*", "nobody"))

_CHANGES = """
WITH RECURSIVE n(i) AS (SELECT CAST(:base AS BIGINT) + 1 UNION ALL SELECT i + 1 FROM n
                        WHERE i < :base + :rows)
INSERT INTO changes (revision, type, agent_id, agent, was_default, actor, comment, created_at{more})
SELECT i, 'agent_config_changed',
       CASE WHEN i % 2 = 0 THEN 'agent-000' ELSE 'agent-' || (100 + i % 100) END,
       agent, was_default,
       CASE WHEN i <= :base + 20 THEN 'early' WHEN i < :base + :rows / 2 THEN 'ci' ELSE 'admin' END,
       NULL, {time}{values} FROM n, (SELECT * FROM changes WHERE revision = :base) AS c
"""
_AUDIT = """
WITH RECURSIVE n(i) AS (SELECT CAST(:base AS BIGINT) + 1 UNION ALL SELECT i + 1 FROM n
                        WHERE i < :base + :rows)
INSERT INTO audit (seq, at, actor, action, agent_id, address, detail, hash)
SELECT i, '2026-01-01T00:00:00.000000Z',
       CASE WHEN i <= :base + 20 THEN 'early' WHEN i < :base + :rows / 2 THEN 'ci' ELSE 'admin' END,
       CASE WHEN i <= :base + 5 THEN 'token.revoke' WHEN i % 3 = 0 THEN 'agent.update'
            WHEN i % 997 = 0 THEN 'agent.create' ELSE 'key.read' END,
       'agent-' || (100 + i % 100), '192.0.2.1', '{}', '' FROM n
"""


@pytest.fixture
async def long(settings: Settings) -> AsyncIterator[Store]:
    """A database with a long history and a long audit, in which filters are unevenly spread."""
    store = await Store.open(settings)
    await store.registry.create(new_agent("agent-000"), who=Who("admin"))
    await _repeat_last_change(store, ROWS)
    [(head,)] = await store.sql("SELECT seq FROM audit_head")
    await store.sql(_AUDIT.replace("'{}'", "'{\"n\": 1}'"), base=head, rows=ROWS)
    await store.sql("UPDATE audit_head SET seq = :head", head=head + ROWS)
    yield store
    await store.close()


async def _repeat_last_change(store: Store, rows: int) -> None:
    """Lengthen the history by SQL, which is quicker than by writes."""
    [(base,)] = await store.sql("SELECT revision FROM state")
    sqlite = store.database.dialect == "sqlite"
    time = (
        f"strftime('%Y-%m-%d %H:%M:%f000', '{BEGIN:%Y-%m-%d}', '+' || i || ' seconds')"
        if sqlite
        else f"timestamptz '{BEGIN.isoformat()}' + i * interval '1 second'"
    )
    others = [name for name in await _columns(store) if f" {name}" not in _CHANGES]
    more = "".join(f", {name}" for name in others)
    statement = _CHANGES.format(time=time, more=more, values=more)
    await store.sql(statement, base=base, rows=rows)
    await store.sql("UPDATE state SET revision = :head", head=base + rows)


async def _columns(store: Store) -> list[str]:
    return await store.database.read(
        lambda connection: list(connection.exec_driver_sql("SELECT * FROM changes LIMIT 1").keys())
    )


# --- which agents a token sees ---

TEXT = st.text(st.sampled_from("abA%_[]?\\^!-.é😀 '\""), max_size=6)
PATTERN = st.text(st.sampled_from("abA%_[]?\\^!-.é😀*'\""), min_size=1, max_size=6)


@pytest.fixture(params=["sqlite", "postgresql"])
def ids_table(request: pytest.FixtureRequest) -> Iterator[tuple[Connection, Table]]:
    """A connection of each engine, with an empty table of agent_ids."""
    if request.param == "sqlite":
        engine = create_engine("sqlite://", poolclass=StaticPool)
    else:
        engine = create_engine(request.getfixturevalue("postgres_url"))
    table = Table("ids", MetaData(), Column("agent_id", String(64)), prefixes=["TEMPORARY"])
    with engine.connect() as connection:
        table.create(connection)
        yield connection, table
    engine.dispose()


@examples(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ids=st.sets(TEXT, max_size=12), patterns=st.lists(PATTERN, max_size=4), default=TEXT)
def test_a_view_means_the_same_in_sql(
    ids_table: tuple[Connection, Table], ids: set[str], patterns: list[str], default: str
) -> None:
    """What a limited token sees of a table is what its patterns say of each id, to the letter."""
    connection, table = ids_table
    view = View(tuple(patterns))
    ids |= {default, *(pattern.replace("*", "b%") for pattern in patterns)}
    connection.execute(table.delete())
    connection.execute(table.insert(), [{"agent_id": each} for each in sorted(ids)])
    condition = view_sql.sees(view, default, table.c.agent_id, connection.dialect.name)
    assert condition is not None
    found = set(connection.execute(select(table.c.agent_id).where(condition)).scalars())
    assert found == {each for each in ids if view.sees(each, each == default)}


# --- pages ---


def _filters() -> list[ChangeFilter]:
    """Every combination of what can be asked for."""
    middle = BEGIN + timedelta(seconds=ROWS // 2)
    return [
        ChangeFilter(agent_id, actor, since, upto, at, newest_first, view)
        for agent_id, actor, (since, upto), at, newest_first, view in itertools.product(
            (None, "agent-000", "agent-199", "none"),
            (None, "early", "ci", "nobody"),
            ((0, None), (ROWS // 3, 2 * ROWS // 3)),
            (None, middle),
            (False, True),
            (View(), LIMITED, NOTHING),
        )
    ]


def _audit_filters() -> list[AuditFilter]:
    return [
        AuditFilter(before, actor, agent_id, action)
        for before, actor, agent_id, action in itertools.product(
            (None, ROWS // 2),
            (None, "early", "ci", "nobody"),
            (None, "agent-177", "none"),
            (None, "token.revoke", "token.", "agent.", "Token.", "none"),
        )
    ]


async def test_pages_make_up_the_whole_history(long: Store) -> None:
    """Following `next` gives every change that fits, in order, each once, and nothing else."""
    history = History(long.database)
    every = (await _all_pages(history, ChangeFilter(), 1000))[0]
    assert [change.revision for change in every] == list(range(1, every[-1].revision + 1))
    for wanted in _filters()[::31]:
        found, empty = await _all_pages(history, wanted, 700)
        right = [change for change in every if _fits(change, wanted)]
        assert [change.revision for change in found] == [
            change.revision for change in (right[::-1] if wanted.newest_first else right)
        ], wanted
        assert right or not empty or wanted.view is not View()


def _fits(change: Change, wanted: ChangeFilter) -> bool:
    return (
        wanted.since < change.revision <= (wanted.upto or change.revision)
        and wanted.agent_id in (None, change.agent_id)
        and wanted.actor in (None, change.actor)
        and (wanted.at is None or change.created_at <= wanted.at)
        and wanted.view.sees(change.agent_id, change.agent_id == "default")
    )


async def _all_pages(
    history: History, wanted: ChangeFilter, limit: int
) -> tuple[list[Change], int]:
    """Follow `next` to the end; return all changes, and how many pages had none."""
    found: list[Change] = []
    empty = 0
    while True:
        page = await history.changes(wanted, limit)
        found += page.changes
        if page.next is None:
            return found, empty
        empty += not page.changes
        bound = "upto" if wanted.newest_first else "since"
        wanted = ChangeFilter(**vars(wanted) | {bound: page.next})


async def test_pages_make_up_the_whole_audit(long: Store) -> None:
    """The same holds for the audit and each of its filters, also for the beginning of an action."""
    log = AuditLog(long.database)

    async def all_pages(wanted: AuditFilter, limit: int) -> list[Any]:
        found: list[Any] = []
        while True:
            page = await log.page(wanted, limit)
            found += page.entries
            if page.following is None:
                return found
            wanted = AuditFilter(**vars(wanted) | {"before": page.following})

    every = await all_pages(AuditFilter(), 1000)
    assert [entry.seq for entry in every] == list(range(every[0].seq, 0, -1))
    for wanted in _audit_filters()[::11]:
        right = [
            entry
            for entry in every
            if (wanted.before is None or entry.seq < wanted.before)
            and wanted.actor in (None, entry.actor)
            and wanted.agent_id in (None, entry.agent_id)
            and (
                wanted.action in (None, entry.action)
                or (wanted.action.endswith(".") and entry.action.startswith(wanted.action))
            )
        ]
        assert await all_pages(wanted, 400) == right, wanted


async def test_a_page_ends_where_it_gets_large(store: Store) -> None:
    """Long descriptions are not answered by the thousand: the page is cut, and has a next one."""
    await store.registry.create(new_agent(description="x" * 16_384), who=Who("admin"))
    await _repeat_last_change(store, 600)
    history = History(store.database)
    page = await history.changes(ChangeFilter(), 1000)
    assert sum(len(change.agent.description or "") for change in page.changes) <= MAX_PAGE_BYTES
    found, _ = await _all_pages(history, ChangeFilter(), 1000)
    assert len(found) == page.revision


async def test_every_page_is_read_by_an_index(long: Store) -> None:
    """No filter makes a page scan the table, or sort or look at more rows than allowed."""
    history, log = History(long.database), AuditLog(long.database)
    # PostgreSQL plans by its statistics, which a database that was just restored has not.
    for analyzed in (False, True):
        if analyzed and long.database.dialect == "postgresql":
            await long.sql("ANALYZE")
        # Strides that meet every pair of values; all combinations would take a minute.
        some = slice(0, None, 5) if analyzed else slice(1, None, 7)
        for wanted in _filters()[some]:
            async with _judged(long, str(wanted)):
                await history.changes(wanted, 1000 if wanted.since else 100)
        for entries in _audit_filters()[some]:
            async with _judged(long, str(entries)):
                await log.page(entries, 1000 if entries.before else 100)


@pytest.mark.parametrize("newest_first", [False, True])
async def test_a_page_ends_at_its_bounds(long: Store, newest_first: bool) -> None:
    """However much there is of an agent or an actor, what is outside the bounds is not walked."""
    history = History(long.database)
    middle = ROWS // 2
    for since, upto in ((0, 10), (ROWS - 10, None), (middle, middle + 10)):
        for agent_id, actor in (("agent-000", None), (None, "ci"), (None, "admin")):
            wanted = ChangeFilter(agent_id, actor, since, upto, None, newest_first)
            async with _judged(long, str(wanted), examined=20):
                await history.changes(wanted, 100)


@contextlib.asynccontextmanager
async def _judged(store: Store, what: str, examined: int = MAX_EXAMINED) -> AsyncIterator[None]:
    """Explain what the block ran on the two tables, and count the rows that it looked at."""
    run: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if "FROM changes" in statement or "FROM audit " in statement + " ":
            run.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    look: Callable[[Connection, str, Any], int] = (
        _sqlite_steps if store.database.dialect == "sqlite" else _postgresql_rows
    )
    seen = await store.database.read(lambda c: sum(look(c, *each) for each in run))
    # A search by time looks at a row for each half, and finding the actions at one for each.
    assert seen <= examined + len(run) + 100, what


OWN = ("SCAN bounds", "SCAN actions", "SCAN CONSTANT ROW")


def _sqlite_steps(connection: Connection, statement: str, parameters: Any) -> int:
    """Return the rows that the statement looked at, by the instructions that it took."""
    driver: sqlite3.Connection = connection.connection.dbapi_connection  # type: ignore[assignment]
    plan = [row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    # Steps of a recursive query, which reads what it found itself, are no table of ours.
    reads = [line for line in plan if line.startswith(("SEARCH", "SCAN")) and line not in OWN]
    assert all(" INDEX " in line for line in reads), (plan, statement)
    assert not any("B-TREE" in line for line in plan), (plan, statement)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    driver.set_progress_handler(count, 60)
    try:
        driver.execute(statement, parameters).fetchall()
    finally:
        driver.set_progress_handler(None, 60)
    return steps


def _postgresql_rows(connection: Connection, statement: str, parameters: Any) -> int:
    """Return the rows that the plan's lowest nodes looked at, and check where they looked."""
    connection.exec_driver_sql("SET LOCAL enable_sort = off")  # as for the page itself
    explain = f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {statement}"
    found = connection.exec_driver_sql(explain, parameters).scalar_one()
    nodes = [(found if isinstance(found, list) else json.loads(found))[0]["Plan"]]
    seen = 0
    for node in nodes:
        nodes += node.get("Plans", [])
        assert node["Node Type"] not in ("Seq Scan", "Sort", "Bitmap Heap Scan"), statement
        if "Index" in node["Node Type"]:
            loops = node["Actual Loops"]
            rows = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * loops
            # An index that is walked beyond the last row shows in its blocks alone.
            blocks = node["Shared Hit Blocks"] + node["Shared Read Blocks"]
            assert blocks <= 2 * rows + 5 * loops + 20, (blocks, rows, statement)
            seen += rows
    return int(seen)
