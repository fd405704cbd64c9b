"""What a limited token may see: patterns over literal agent_ids."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.server.security.agent_scope import EVERYTHING, View, matches, parse_patterns

TEXT = st.text(alphabet="ab*[?.-", max_size=12)


@given(pattern=TEXT, agent_id=TEXT)
def test_only_the_asterisk_has_a_meaning(pattern: str, agent_id: str) -> None:
    """A pattern matches exactly what the regular expression with `.*` for each `*` matches."""
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    assert matches(pattern, agent_id) == bool(re.fullmatch(expression, agent_id, re.DOTALL))


def test_a_pattern_made_to_be_slow_is_not() -> None:
    """Thousands of asterisks over a long id take no time worth speaking of."""
    assert not matches("*a" * 2000 + "b", "a" * 100_000)


def test_the_default_is_always_seen_but_not_always_written() -> None:
    """A limited token reads the current default, and writes only what its patterns name."""
    view = parse_patterns(["code-*", "billing"])
    assert view.sees("anything", is_default=True)
    assert not view.covers("anything")
    assert view.sees("code-review", is_default=False)
    assert view.covers("billing")
    assert not view.sees("billing-2", is_default=False)
    assert not view.sees("Code-review", is_default=False)


def test_a_stored_view_comes_back_and_a_damaged_one_sees_next_to_nothing() -> None:
    """What is stored is read back the same; what cannot be read never counts as no limit."""
    view = View(("a*", "b,c"))
    assert View.from_text(view.to_text()) == view
    assert View.from_text(None) == EVERYTHING
    assert EVERYTHING.to_text() is None
    for damaged in ("", "null", "{", '"*"', "[1]", '{"*": 1}'):
        assert View.from_text(damaged) == View(())
        assert not View.from_text(damaged).covers("a")


@pytest.mark.parametrize("texts", [[], [""], ["a,b"], ["a\n"], ["x" * 129], ["a"] * 65])
def test_patterns_that_make_no_sense_are_refused(texts: list[str]) -> None:
    """No pattern at all, an empty one, one with a comma or a control character."""
    with pytest.raises(ValueError, match="pattern"):
        parse_patterns(texts)
