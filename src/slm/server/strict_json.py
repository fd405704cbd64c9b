"""JSON in request bodies: what RFC 8259 leaves open to interpretation is refused, not guessed at.

Pure. Plain `json.loads` accepts duplicate keys, NaN, Infinity, lone surrogates, NUL, UTF-16, a byte
order mark and numbers of any size, so that two readers could see different values.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from slm.schemas import check_storable

MAX_INTEGER: Final = 2**63 - 1
_MAX_INTEGER_DIGITS: Final = 20


class NotStrictJSON(ValueError):
    """The text is not strict JSON; the message never contains any of it."""


def loads(body: bytes) -> Any:
    """Parse a body.

    Raises:
        NotStrictJSON: it is not UTF-8, not JSON, has a duplicate key, a number that is not finite
            or beyond 64 bits, NUL, a lone surrogate, or is nested too deep.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise NotStrictJSON("is not UTF-8") from None
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        # Its message is one of a fixed set and its position a number; the text is left out.
        raise NotStrictJSON(f"is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise NotStrictJSON("is nested too deep") from None
    if "\\u" in text:
        # Only an escape can introduce what the text itself cannot contain.
        _refuse_unstorable(value)
    return value


def whole_number(text: str) -> int | None:
    """Return the number written in decimal digits, or None if the text is anything else.

    Only ASCII digits: `str.isdigit` accepts "²", which `int` refuses, and `int` accepts "٣".
    """
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_INTEGER_DIGITS:
        return None
    value = int(text)
    return value if value <= MAX_INTEGER else None


def _refuse_unstorable(value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            try:
                check_storable(item)
            except ValueError as error:
                raise NotStrictJSON(str(error)) from None
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise NotStrictJSON("has the same key twice in one object")
    return value


def _constant(_: str) -> Any:
    raise NotStrictJSON("holds NaN or Infinity, which JSON has not")


def _integer(digits: str) -> int:
    # Check the length first: converting thousands of digits is slow, and Python refuses it.
    if len(digits) <= _MAX_INTEGER_DIGITS:
        value = int(digits)
        if -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
            return value
    raise NotStrictJSON("holds an integer beyond 64 bits")


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise NotStrictJSON("holds a number too large")
    return value


_decoder: Final = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_constant=_constant,
    parse_int=_integer,
    parse_float=_number,
)
