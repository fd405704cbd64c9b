"""The vault: keys encrypted, each bound to the one place it may be sent to."""

from __future__ import annotations

import string
import traceback

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from slm.errors import ConfigurationError, KeyUndecryptable
from slm.server.encryption.vault import KeyBinding, Vault, fingerprint, parse_keys
from tests.support.store import KEY, OTHER_KEY

PLACE = KeyBinding("billing", "openai", "https://api.openai.com:443")
SECRET = SecretStr("sk-canary-1")

bindings = st.builds(
    KeyBinding,
    agent_id=st.text(string.ascii_lowercase, max_size=3),
    provider=st.sampled_from(["openai", "anthropic"]),
    origin=st.sampled_from(["https://a:443", "https://b:443"]),
)


def test_a_key_comes_back_for_its_own_place() -> None:
    """What was encrypted for a place is decrypted for it."""
    vault = Vault([KEY])
    assert vault.decrypt(vault.encrypt(SECRET, PLACE), PLACE) == SECRET


@given(stored=bindings, asked=bindings)
def test_a_key_is_given_for_no_other_place(stored: KeyBinding, asked: KeyBinding) -> None:
    """Another agent, provider or origin never gets the key, however alike they are."""
    vault = Vault([KEY])
    token = vault.encrypt(SECRET, stored)
    if stored == asked:
        assert vault.decrypt(token, asked) == SECRET
    else:
        with pytest.raises(KeyUndecryptable):
            vault.decrypt(token, asked)


@given(data=st.data())
def test_a_changed_byte_gives_no_key(data: st.DataObject) -> None:
    """A token with any byte changed is refused."""
    vault = Vault([KEY])
    token = vault.encrypt(SECRET, PLACE)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda c: c != token[at]))
    changed = token[:at] + other + token[at + 1 :]
    if at >= len(token.rstrip("=")):
        return  # base64 reads padding loosely; the bytes inside are the same
    with pytest.raises(KeyUndecryptable):
        vault.decrypt(changed, PLACE)


def test_a_bare_token_is_refused_but_for_adoption() -> None:
    """A token that says nothing of where its key may go is read for adoption alone."""
    vault = Vault([KEY])
    bare = Fernet(KEY).encrypt(b"sk-canary-1").decode()
    with pytest.raises(KeyUndecryptable):
        vault.decrypt(bare, PLACE)
    assert vault.decrypt_unbound(bare) == SECRET


def test_a_bound_token_is_no_bare_one() -> None:
    """Adoption does not strip a token of the place that it is bound to."""
    vault = Vault([KEY])
    with pytest.raises(KeyUndecryptable):
        vault.decrypt_unbound(vault.encrypt(SECRET, PLACE))


@pytest.mark.parametrize("plain", [b"", b"\xff\xfe"])
def test_a_bare_token_without_text_is_refused(plain: bytes) -> None:
    """A token that holds nothing, or no text, is no key."""
    with pytest.raises(KeyUndecryptable):
        Vault([KEY]).decrypt_unbound(Fernet(KEY).encrypt(plain).decode())


@pytest.mark.parametrize("token", ["", "x", "gAAAA", "ключ", "\ud800", "=" * 100])
def test_what_is_no_token_is_undecryptable(token: str) -> None:
    """Whatever stands in the column, the answer is one error and never another."""
    with pytest.raises(KeyUndecryptable):
        Vault([KEY]).decrypt(token, PLACE)


def test_any_key_decrypts_and_the_first_encrypts() -> None:
    """With several keys all decrypt, and new tokens are made with the first."""
    old = Vault([OTHER_KEY]).encrypt(SECRET, PLACE)
    vault = Vault([KEY, SecretStr(OTHER_KEY)])
    assert vault.decrypt(old, PLACE) == SECRET
    assert Vault([KEY]).decrypt(vault.encrypt(SECRET, PLACE), PLACE) == SECRET


def test_a_check_tells_the_right_key() -> None:
    """A check token is opened by the key that made it and by no other."""
    maker = Vault([KEY])
    check = maker.make_check_of(maker.fingerprints[0])
    assert Vault([OTHER_KEY, KEY]).opens_check(check)
    assert not Vault([OTHER_KEY]).opens_check(check)
    assert not Vault([KEY]).opens_check(Vault([KEY]).encrypt(SECRET, PLACE))


@pytest.mark.parametrize("keys", [[], [""], ["canary-not-a-key"], [KEY, "canary-not-a-key"]])
def test_a_wrong_encryption_key_is_refused_unquoted(keys: list[str]) -> None:
    """What is no Fernet key is refused, and the message does not repeat it."""
    with pytest.raises(ConfigurationError) as caught:
        Vault(keys)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_nothing_shows_a_key() -> None:
    """The vault's repr names its keys by their fingerprints, and the fingerprint is no key."""
    vault = Vault([KEY])
    assert repr(vault) == f"<Vault {fingerprint(KEY)}>"
    assert fingerprint(KEY) not in KEY
    assert vault.fingerprints == (fingerprint(KEY),)


def test_keys_are_a_list_with_commas_or_lines() -> None:
    """SLM_ENCRYPTION_KEYS takes commas, and a key file may have one key a line."""
    assert parse_keys(f"{KEY}, {OTHER_KEY}\n") == [SecretStr(KEY), SecretStr(OTHER_KEY)]
    assert parse_keys(" ,\n") == []


def test_a_generated_key_is_usable_and_new() -> None:
    """Each generated key is another one."""
    first, second = Vault.generate_key(), Vault.generate_key()
    assert first != second
    assert Vault([first]).decrypt(Vault([first]).encrypt(SECRET, PLACE), PLACE) == SECRET
