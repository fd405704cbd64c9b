"""Tokens: how one is made and what is kept of it."""

from __future__ import annotations

import base64
import hashlib

import pytest

from slm.server.security import tokens


def test_a_token_is_256_random_bits() -> None:
    """A token is `slm_` and 32 random bytes, each time others, and shows itself to nobody."""
    token = tokens.mint()
    text = token.get_secret_value()
    assert text.startswith("slm_")
    assert len(base64.urlsafe_b64decode(text.removeprefix("slm_") + "=")) == 32
    assert tokens.is_well_formed(text)
    assert text != tokens.mint().get_secret_value()
    assert text not in repr(token)


def test_only_the_hash_is_kept() -> None:
    """The digest is the SHA-256 of the token."""
    assert tokens.digest("slm_x") == hashlib.sha256(b"slm_x").hexdigest()


@pytest.mark.parametrize("text", ["", "\x00", "\ud800", "'; DROP TABLE tokens; --", "ключ"])
def test_any_text_has_a_digest(text: str) -> None:
    """Whatever comes in a header is looked up like any other text, and is no token."""
    assert len(tokens.digest(text)) == 64
    assert not tokens.is_well_formed(text)


def test_scopes_are_those_of_the_contract() -> None:
    """The four scopes of the contract, and the two that a backend gets."""
    assert tokens.SCOPES == ("config:read", "key:read", "agents:write", "admin")
    assert tokens.BACKEND_SCOPES == ("config:read", "key:read")
    assert tokens.OPERATOR_SCOPES == ("config:read", "agents:write", "admin")
