"""A secret is taken out of somebody else's words, in whatever encoding they repeat it."""

from __future__ import annotations

import base64
import html
import json
import string
import time
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.common.scrub import PIECE, scrubbed

KEYS = st.text("".join(map(chr, range(0x21, 0x7F))), min_size=12, max_size=80)
USUAL = st.text(string.ascii_letters + string.digits + "-_", min_size=16, max_size=60)


def _each(spell: Callable[[int], str]) -> Callable[[str], str]:
    return lambda key: "".join(spell(ord(char)) for char in key)


ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper case": str.upper,
    "lower case": str.lower,
    "a header": lambda key: f"Authorization: Bearer {key}",
    "URL": lambda key: quote(key, safe=""),
    "URL, lower case": lambda key: quote(key, safe="").lower(),
    "URL, every character": _each(lambda code: f"%{code:02x}"),
    "URL, twice": lambda key: quote(quote(key, safe=""), safe=""),
    "JSON": json.dumps,
    "JSON, every character": _each(lambda code: f"\\u{code:04x}"),
    "JSON, every character, upper case": _each(lambda code: f"\\u{code:04X}"),
    "JSON in JSON": lambda key: json.dumps(json.dumps({"key": key})),
    "HTML": html.escape,
    "HTML, decimal": _each(lambda code: f"&#{code};"),
    "HTML, hexadecimal": _each(lambda code: f"&#x{code:02X};"),
    "repr": repr,
    "repr of bytes": lambda key: repr(key.encode()),
    "Python": _each(lambda code: f"\\x{code:02x}"),
    "octal": _each(lambda code: f"\\{code:03o}"),
    "hexadecimal": lambda key: key.encode().hex(),
    "hexadecimal, upper case": lambda key: key.encode().hex().upper(),
    "hexadecimal, spaced": lambda key: key.encode().hex(" "),
    "hexadecimal, colons": lambda key: key.encode().hex(":"),
    "hexadecimal, a list": lambda key: ", ".join(f"0x{byte:02x}" for byte in key.encode()),
    "quoted-printable": lambda key: "".join(f"={byte:02X}" for byte in key.encode()),
    "numbers": lambda key: str(list(key.encode())),
    "numbers, close": lambda key: ",".join(map(str, key.encode())),
    "UTF-16": lambda key: key.encode("utf-16-le").decode("latin-1"),
    "line breaks": lambda key: "\r\n\t".join(key[at : at + 5] for at in range(0, len(key), 5)),
    "line breaks in JSON": lambda key: "\\n".join(key[at : at + 5] for at in range(0, len(key), 5)),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 of user and key": lambda key: base64.b64encode(f"u:{key}".encode()).decode(),
    "base64 of a header": lambda key: base64.b64encode(f"Bearer {key}!".encode()).decode(),
    "base64url": lambda key: base64.urlsafe_b64encode(f"xyz{key}".encode()).decode(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=12, deadline=None)
@given(key=KEYS)
def test_in_every_encoding(encoding: str, key: str) -> None:
    """What is left of an echo holds no 8 characters of it in a row."""
    spelled = ENCODINGS[encoding](key)
    left = scrubbed(f"Incorrect API key: <{spelled}>, see the docs", key)
    assert left.startswith("Incorrect API key: <")
    assert left.endswith(">, see the docs")
    if encoding == "plain":
        assert left == "Incorrect API key: <***>, see the docs"
    rest = left[len("Incorrect API key: <") : -len(">, see the docs")]
    assert spelled not in left
    # Of base64, the characters that depend on what stands beside the key as well.
    assert len(rest.replace("***", "")) <= max(24, len(spelled) // 4)


@settings(max_examples=60, deadline=None)
@given(key=USUAL, data=st.data())
def test_cut_at_either_end(key: str, data: st.DataObject) -> None:
    """A piece of 8 or more characters is hidden, wherever a limit cut the key, in base64 too."""
    start = data.draw(st.integers(0, len(key) - PIECE))
    end = data.draw(st.integers(start + PIECE, len(key)))
    assert scrubbed(f"no such key: {key[start:end]}", key) == "no such key: ***"
    assert scrubbed(f"no such key: {key[start:end]}... ({key[:8]})", key).endswith("***... (***)")
    code = base64.b64encode(key.encode()).decode()
    assert code[4:20] not in scrubbed(f"no such key: {code[: max(20, end)]}", key)


@settings(max_examples=60, deadline=None)
@given(key=st.text("".join(map(chr, range(0x21, 0x7F))), min_size=1, max_size=7))
def test_a_short_key_takes_no_text_apart(key: str) -> None:
    """A key of a few characters is hidden as a word of its own, and no text is lost for it."""
    text = "The model that was asked for is not loaded; try again in a minute"
    words = scrubbed(text, key).split(" ")
    kept = [word for word, was in zip(words, text.split(" "), strict=True) if word == was]
    assert len(kept) >= 11
    assert scrubbed(f'Bearer {key} / "{key}"', key).count("***") >= 1


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["L"]), max_size=100),
    key=st.text(string.ascii_letters, min_size=16, max_size=60),
)
def test_nothing_else_is_changed(text: str, key: str) -> None:
    """A text without the key stays as it is, whatever else it holds."""
    assert scrubbed(text, key) == text
    assert scrubbed(text, "") == text


@settings(max_examples=60, deadline=None)
@given(text=st.text("%\\ux0123456789abcdef&#;n ", max_size=200), key=KEYS)
def test_no_text_makes_it_fail(text: str, key: str) -> None:
    """Half an escape, or one of nothing, is text like any other."""
    assert key not in scrubbed(text + key + text, key)


def test_a_long_text_takes_no_time() -> None:
    """A megabyte is searched for the plain key, and its end for all the rest."""
    key = "sk-" + "0123456789abcdef" * 4
    text = f"{'x' * 500_000}{key.upper()}{'%41' * 100_000}{base64.b64encode(key.encode()).decode()}"
    begun = time.perf_counter()
    left = scrubbed(text, key)
    assert time.perf_counter() - begun < 1
    assert left.count("***") == 2
