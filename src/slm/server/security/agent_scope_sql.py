"""A token's view as a condition in SQL, equal to `View.sees` on both engines.

Knows the two engines' patterns; which agents a view covers is `agent_scope`'s rule.
"""

from __future__ import annotations

import re

from sqlalchemy import ColumnElement, collate, false, or_

from slm.server.db.pages import opaque
from slm.server.security.agent_scope import View

_GLOB_SPECIAL = re.compile(r"[\[?]")
_LIKE_SPECIAL = re.compile(r"[\\%_]")


def sees(
    view: View, default_id: str | None, column: ColumnElement[str], dialect: str
) -> ColumnElement[bool] | None:
    """Return the condition that a row's agent may be seen; None if every agent may.

    Args:
        view: the token's view.
        default_id: the current default agent.
        column: the row's agent_id.
        dialect: `sqlite` or `postgresql`.
    """
    if view.patterns is None:
        return None
    literal = {pattern for pattern in view.patterns if "*" not in pattern}
    if default_id is not None:
        literal.add(default_id)
    text = opaque(column)
    if dialect == "postgresql":
        text = collate(text, "C")
    conditions = [text.in_(sorted(literal))] if literal else []
    for pattern in view.patterns:
        if "*" not in pattern:
            continue
        if dialect == "postgresql":
            conditions.append(text.like(like(pattern), escape="\\"))
        else:
            # SQLite's LIKE matches `a` with `A`.
            conditions.append(text.op("GLOB", is_comparison=True)(glob(pattern)))
    return or_(*conditions) if conditions else false()


def glob(pattern: str) -> str:
    """Return a pattern for SQLite's GLOB, where `?` and `[` are special too."""
    return _GLOB_SPECIAL.sub(r"[\g<0>]", pattern)


def like(pattern: str) -> str:
    r"""Return a pattern for LIKE … ESCAPE '\'."""
    return _LIKE_SPECIAL.sub(r"\\\g<0>", pattern).replace("*", "%")
