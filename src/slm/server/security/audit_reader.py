"""Reads the audit: pages of it by filter, and the walk along its whole chain.

Knows the tables; `audit_chain` defines what a chain is. Writes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, func, select

from slm.errors import Conflict
from slm.server.db.pages import MAX_EXAMINED, Window, opaque, read_page
from slm.server.db.tables import AUDIT, AUDIT_HEAD
from slm.server.security.audit_chain import ChainEntry, Link, parse_link
from slm.server.strict_json import MAX_INTEGER

EXPORTED: Final = "audit.export"
"""The action of the row that records an export."""

WALK_PAGE: Final = 500
"""How many rows are read and hashed at once when the chain is checked."""

READ_ALL: Final = "key.read_all"
"""The action of a snapshot with keys; its detail lists the agents whose keys it contained."""

_COLUMNS: Final = [AUDIT.c[name] for name in ChainEntry.__dataclass_fields__]
_MAX_ACTIONS: Final = 100
"""How many different actions are tried for a prefix; the server writes about twenty."""


@dataclass(frozen=True)
class AuditFilter:
    """Which entries to return.

    Attributes:
        before: only entries with a lower seq; None: from the newest.
        actor: only what this token did.
        agent_id: only what concerned this agent, including snapshots that contained its key.
        action: only this action, or with a trailing dot every action that starts with it.
    """

    before: int | None = None
    actor: str | None = None
    agent_id: str | None = None
    action: str | None = None


class EntryPage(NamedTuple):
    """Entries, newest first, and the `before` of the next page; None if there is none."""

    entries: list[ChainEntry]
    following: int | None


class Ends(NamedTuple):
    """Where the chain currently begins and ends, and the seal of its beginning."""

    cut: Link
    head: Link
    seal: str | None


def entry_page(connection: Connection, wanted: AuditFilter, limit: int) -> EntryPage:
    """Return one page; it may be short, even empty, and still have a following one."""
    upto = MAX_INTEGER if wanted.before is None else wanted.before - 1
    windows = _windows(connection, wanted, upto)
    examined = MAX_EXAMINED // max(len(windows), 1)
    each = min(limit, examined)
    rows: list[Row[Any]] = []
    edge = 0
    for window in windows:
        page = read_page(connection, window, each, _characters, examined)
        rows += page.rows
        edge = max(edge, page.last or 0)
    # Below the point where one window ended, another of its rows may come first.
    rows = sorted((row for row in rows if row.seq >= edge), key=lambda row: -row.seq)
    if len(rows) > limit:
        rows = rows[:limit]
        edge = rows[-1].seq
    return EntryPage([_entry(row) for row in rows], edge or None)


class ExportedPage(NamedTuple):
    """Entries in order: the link before them, the audit's head, and the next page's `after`."""

    after: Link
    entries: list[ChainEntry]
    head: Link
    following: int | None


def exported_upto(connection: Connection) -> Link | None:
    """Return the last row that was exported, by the newest export; None if there was none."""
    for entry in entry_page(connection, AuditFilter(action=EXPORTED), 1).entries:
        try:
            return parse_link(str(json.loads(entry.detail)["head"]))
        except (ValueError, TypeError, KeyError):
            return None
    return None


def export_page(
    connection: Connection, after: int | None, upto: int | None, *, everything: bool
) -> ExportedPage:
    """Return the entries after a row, or by default after the end of the last export.

    Raises:
        Conflict: the audit has no such row, or no longer has it.
    """
    cut, head, _ = ends(connection)
    if after is not None:
        start = link_at(connection, after)
    elif everything:
        start = cut
    else:
        start = exported_upto(connection) or cut
    if start is None or start.seq < cut.seq:
        raise Conflict("The audit has no such entry, or no longer has it.")
    last = head.seq if upto is None else min(upto, head.seq)
    entries = entries_after(connection, start.seq, last, WALK_PAGE)
    more = entries and entries[-1].seq < last
    return ExportedPage(start, entries, head, entries[-1].seq if more else None)


def ends(connection: Connection) -> Ends:
    """Return where the chain begins and ends."""
    head = connection.execute(select(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1)).one()
    return Ends(_link(head.cut_seq, head.cut_hash), _link(head.seq, head.hash), head.cut_seal)


def _link(seq: object, digest: object) -> Link:
    """Return a link; if someone altered its type, a link that no chain has."""
    if isinstance(seq, int) and isinstance(digest, str):
        return Link(seq, digest)
    return Link(-1, "")


def link_at(connection: Connection, seq: int) -> Link | None:
    """Return the row with this number, or the cut; None if neither exists."""
    cut = ends(connection).cut
    if seq == cut.seq:
        return cut
    found = connection.execute(select(AUDIT.c.hash).where(AUDIT.c.seq == seq)).scalar_one_or_none()
    return None if found is None else Link(seq, found)


def entries_after(connection: Connection, seq: int, upto: int, limit: int) -> list[ChainEntry]:
    """Return the next rows of the chain, in order; at least one if there is one."""
    window = Window(AUDIT, AUDIT.c.seq, seq, upto)
    return [_entry(row) for row in read_page(connection, window, limit, _characters).rows]


def _windows(connection: Connection, wanted: AuditFilter, upto: int) -> list[Window]:
    """Return the windows to read: one, or for the start of an action one for each action."""
    columns = AUDIT.c
    given: list[tuple[ColumnElement[str], str]] = [
        (column, value)
        for column, value in (
            (columns.agent_id, wanted.agent_id),
            (columns.actor, wanted.actor),
            (columns.action, wanted.action),
        )
        if value is not None
    ]
    if not given:
        return [_window(upto, None)]
    (first, value), *others = given
    if first is columns.action and value.endswith("."):
        found = _actions(connection)
        return [_window(upto, (first, name)) for name in found if name.startswith(value)]
    filters = [_filter(column, text) for column, text in others]
    windows = [_window(upto, (first, value), *filters)]
    if wanted.agent_id is not None and _includes(wanted.action, READ_ALL):
        # A snapshot's row names its agents in its detail.
        named = _names(connection, wanted.agent_id)
        windows.append(_window(upto, (columns.action, READ_ALL), *filters, named))
    return windows


def _window(
    upto: int, equal: tuple[ColumnElement[str], str] | None, *filters: ColumnElement[bool]
) -> Window:
    return Window(AUDIT, AUDIT.c.seq, 0, upto, newest_first=True, equal=equal, filters=filters)


def _includes(wanted: str | None, action: str) -> bool:
    """Return whether a filter by action includes this one."""
    if wanted is None or wanted == action:
        return True
    return wanted.endswith(".") and action.startswith(wanted)


def _names(connection: Connection, agent_id: str) -> ColumnElement[bool]:
    """Whether the detail has this agent in a list: its name without a colon after it."""
    find = func.strpos if connection.dialect.name == "postgresql" else func.instr
    name = json.dumps(agent_id, ensure_ascii=True)
    return (find(AUDIT.c.detail, f"{name},") > 0) | (find(AUDIT.c.detail, f"{name}]") > 0)


def _filter(column: ColumnElement[str], value: str) -> ColumnElement[bool]:
    if column is AUDIT.c.action and value.endswith("."):
        # Not LIKE: in SQLite it matches `a` with `A`.
        return func.substr(column, 1, len(value)) == value
    return opaque(column) == value


def _actions(connection: Connection) -> list[str]:
    """Return every action in the audit, each by one step in the index."""
    least = select(func.min(AUDIT.c.action))
    actions = select(least.scalar_subquery().label("action")).cte("actions", recursive=True)
    more = least.where(AUDIT.c.action > actions.c.action).scalar_subquery()
    actions = actions.union_all(select(more).where(actions.c.action.is_not(None)))
    found = connection.execute(select(actions.c.action).limit(_MAX_ACTIONS)).scalars()
    return [name for name in found if isinstance(name, str)]


def _entry(row: Row[Any]) -> ChainEntry:
    return ChainEntry(*(row._mapping[column] for column in _COLUMNS))


def _characters(row: Row[Any]) -> int:
    return len(row.detail) + len(row.agent_id or "")
