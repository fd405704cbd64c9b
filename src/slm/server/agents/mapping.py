"""Reads a row of the table `agents`, whatever another program may have stored there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast

from sqlalchemy import Row

from slm import schemas
from slm.server.db.column_types import EPOCH_START, UNREADABLE, text_of, time_of
from slm.server.strict_json import MAX_INTEGER

T = TypeVar("T")


def agent_of(row: Row[*tuple[Any, ...]] | Mapping[str, Any]) -> schemas.Agent:
    """Return the agent to serve for a row of `SELECT_AGENTS`.

    Tolerant: our rules apply on write, and a row that breaks them is still served
    (docs/protocol.md section 1). What cannot be read at all is treated as not set.
    """
    value = cast("Mapping[str, Any]", row._mapping) if isinstance(row, Row) else row
    return schemas.Agent(
        id=_read(_whole, value["id"], 0),
        agent_id=text_of(value["agent_id"]),
        name=text_of(value["name"]),
        description=None if value["description"] is None else text_of(value["description"]),
        llm_provider=text_of(value["llm_provider"]),
        llm_endpoint=text_of(value["llm_endpoint"] or "") or None,
        llm_model=text_of(value["llm_model"]),
        llm_timeout=_read(_whole, value["llm_timeout"], 30),
        llm_temperature=_read(_number, value["llm_temperature"], None),
        llm_max_tokens=_read(_whole, value["llm_max_tokens"], None),
        llm_options=_read(_options, value["llm_options"], dict[str, Any]()),
        is_default=_read(_flag, value["is_default"], False),
        is_active=_read(_flag, value["is_active"], True),
        created_at=_read(time_of, value["created_at"], EPOCH_START),
        updated_at=_read(time_of, value["updated_at"], EPOCH_START),
        revision=_read(_whole, value["revision"], 0),
        has_api_key=bool(value["llm_api_key_encrypted"]),
        api_key_revision=_read(_whole, value["api_key_revision"], None),
    )


def _read(reader: Callable[[Any], T], value: Any, otherwise: T) -> T:
    if value is None:
        return otherwise
    try:
        return reader(value)
    except UNREADABLE:
        return otherwise


def _whole(value: Any) -> int:
    number = value if type(value) is int else int(float(value))
    if abs(number) > MAX_INTEGER:
        raise OverflowError
    return number


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _flag(value: Any) -> bool:
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("true", "t", "yes", "y", "on"):
            return True
        if word in ("false", "f", "no", "n", "off", ""):
            return False
        value = float(word)
    return bool(value)


def _options(value: Any) -> dict[str, Any]:
    options = value if isinstance(value, dict) else _JSON.decode(text_of(value))
    if not isinstance(options, dict):
        raise TypeError
    return options


def _no_constant(_: str) -> None:
    """Refuse NaN and Infinity, which a JSON response cannot contain."""
    raise ValueError


# Built once: json.loads would build one for every row.
_JSON: Final = json.JSONDecoder(parse_constant=_no_constant)
