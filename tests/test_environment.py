"""How values of the environment and of small files are read, whatever wrote them."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.common.environment import decoded, flag, is_service_link, listed, tidied, variable
from slm.errors import ConfigurationError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://slm.internal", "https://slm.internal"),
        ('"https://slm.internal"', "https://slm.internal"),
        ("'https://slm.internal'\r\n", "https://slm.internal"),
        ("  \t\"' slm '\"  ", "slm"),
        ("\ufeffslm\u200b", "slm"),
        ("\u201cslm\u201d", "slm"),
        ("\u2018slm\u2019", "slm"),
        ("`slm`", "slm"),
        ('"', '"'),
        ('""', ""),
        ("''", ""),
        (' " " ', ""),
        ('"slm', '"slm'),
        ("slm\"'", "slm\"'"),
        ('"sh" -c "x"', '"sh" -c "x"'),
        ("vault read -field='key'", "vault read -field='key'"),
        ("two words", "two words"),
    ],
)
def test_what_is_around_a_value_is_no_part_of_it(written: str, meant: str) -> None:
    """Blanks, invisible characters and one pair of quotes around a value are dropped."""
    assert tidied(written) == meant


@given(st.text(max_size=40))
def test_tidying_twice_changes_nothing_more(text: str) -> None:
    """A tidied value is tidy, and nothing is added to it or changed inside."""
    once = tidied(text)
    assert tidied(once) == once
    assert once in text


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=40))
def test_a_file_is_read_in_the_encoding_that_its_mark_names(text: str) -> None:
    """Windows editors and PowerShell write a byte order mark, in UTF-8 or UTF-16."""
    for mark, encoding in (
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ):
        assert decoded(mark + text.encode(encoding) + "\r\n".encode(encoding)) == tidied(text)


def test_what_is_no_text_is_not_read_as_such() -> None:
    """A file of another encoding is refused rather than guessed at."""
    with pytest.raises(UnicodeDecodeError):
        decoded(b"\xff\xff\x00")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a", ["a"]),
        ("a, b ,,c,", ["a", "b", "c"]),
        ("\"a\",'b'", ["a", "b"]),
        ('"a,b"', ["a", "b"]),
        (" , ", []),
    ],
)
def test_a_list_is_separated_by_commas(written: str, meant: list[str]) -> None:
    """Each value of a list may be in quotes, and so may the whole."""
    assert listed(written) == meant


def test_a_variable_that_holds_nothing_is_not_set() -> None:
    """An empty variable, or one of blanks or quotes alone, counts as missing."""
    environ = {"A": "", "B": '""', "C": " ", "D": " d\n"}
    assert [variable(name, environ) for name in "ABCDE"] == [None, None, None, "d", None]


def test_a_flag_is_1_or_0() -> None:
    """Flags take the usual spellings; anything else is an error that names the variable."""
    for text in ("1", "true", "Yes", '"on"'):
        assert flag("SLM_X", {"SLM_X": text})
    for text in ("", "0", "false", "NO", "off"):
        assert not flag("SLM_X", {"SLM_X": text})
    with pytest.raises(ConfigurationError, match="SLM_X must be 1 or 0"):
        flag("SLM_X", {"SLM_X": "canary"})


def test_what_kubernetes_sets_for_a_service_is_known() -> None:
    """A Service named `slm` sets SLM_PORT=tcp://…, which is nobody's setting."""
    assert is_service_link("tcp://10.96.0.12:8760")
    assert is_service_link(' "UDP://10.96.0.12:53"')
    assert not is_service_link("8760")
    assert not is_service_link("https://tcp.example")
