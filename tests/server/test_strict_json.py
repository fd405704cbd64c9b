"""Strict JSON takes what `json.loads` takes, less what two readers could read differently."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.server.strict_json import MAX_INTEGER, NotStrictJSON, loads

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER - 1, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
)
keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner))


@given(values, st.booleans())
def test_every_sound_value_is_read_as_it_is(value: Any, escaped: bool) -> None:
    """Whatever JSON can carry comes back, with escapes or without."""
    text = json.dumps(value, ensure_ascii=escaped)
    again = loads(text.encode())
    assert again == value
    assert repr(again) == repr(value)


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """No bytes raise anything but the one error, and what is read can be written again."""
    try:
        value = loads(body)
    except NotStrictJSON:
        return
    json.dumps(value, allow_nan=False).encode()


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1, "a": 2}',
        b'[{"a": {"b": 1, "c": 2, "b": 1}}]',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"-1e999",
        str(MAX_INTEGER + 1).encode(),
        str(-MAX_INTEGER - 2).encode(),
        b"9" * 5000,
        rb'"\ud800"',
        rb'["\udc00\ud800"]',
        rb'{"\ud83d": 1}',
        rb'"\u0000"',
        b'"\x00"',
        b'\xef\xbb\xbf"bom"',
        '"utf-16"'.encode("utf-16"),
        b'"\xed\xa0\x80"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"",
        b"1 2",
    ],
)
def test_the_refused(body: bytes) -> None:
    """Each thing that plain `json.loads` or another reader would guess at is refused."""
    with pytest.raises(NotStrictJSON):
        loads(body)


@given(st.text(st.characters(categories=["Lu"]), min_size=12))
def test_the_error_tells_nothing_of_the_text(canary: str) -> None:
    """The message never holds what was sent."""
    for body in (f'{{"{canary}": 1, "{canary}": 2}}', f'"{canary}', f'["{canary}", NaN]'):
        with pytest.raises(NotStrictJSON) as refused:
            loads(body.encode())
        assert canary not in str(refused.value)
        assert refused.value.__cause__ is None
        assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_the_edges_are_in() -> None:
    """The largest integers, a surrogate pair and a very small number are sound."""
    assert loads(str(MAX_INTEGER).encode()) == MAX_INTEGER
    assert loads(str(-MAX_INTEGER - 1).encode()) == -MAX_INTEGER - 1
    assert loads(rb'"\ud83d\ude00"') == "😀"
    assert math.isclose(loads(b"1e-400"), 0.0)
