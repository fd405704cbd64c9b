"""The vault encrypts API keys, each bound to the one place that it may be sent to.

Knows no database: it is given tokens and bindings and keeps neither. Fernet has no associated data,
so the binding of a key is part of the plaintext and is checked on decryption
(docs/protocol.md section 3, "A key is bound to where it may be sent").
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import SecretStr

from slm.common.environment import tidied
from slm.errors import ConfigurationError, KeyUndecryptable
from slm.server.encryption.sealed import SealedTexts

# Starts with a control character, which no API key has: a bare key never looks like a bound one.
_BOUND: Final = b"\x01slm-key-1\x01"
_CHECK: Final = b"\x01slm-check-1\x01"
_SEAL: Final = b"\x01slm-seal-1\x01"


@dataclass(frozen=True)
class KeyBinding:
    """The one place a key may be sent to.

    Attributes:
        agent_id: the agent that the key belongs to.
        provider: its `llm_provider`.
        origin: `slm.endpoints.origin` of provider and endpoint.
    """

    agent_id: str
    provider: str
    origin: str


class Vault:
    """Encrypts with the first key, decrypts with any.

    Its keys can be changed while it is in use (`replace`, `activate`): a call sees either all the
    old ones or all the new ones.

    A stored key that was decrypted once is kept in memory, sealed under a key of this process, only
    for this ciphertext and binding: a thousand backends that fetch it cost one Fernet decryption.

    Args:
        keys: Fernet keys (32 bytes in URL-safe base64), the active one first.

    Raises:
        ConfigurationError: there is no key, or one is not a Fernet key.
    """

    def __init__(self, keys: Sequence[SecretStr | str]) -> None:
        self._ring = _ring_of(keys)
        self._opened = SealedTexts()

    def __repr__(self) -> str:
        return f"<Vault {', '.join(self.fingerprints)}>"

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """One fingerprint for each key, in order; the first is the active key's."""
        return tuple(self._ring)

    def replace(self, keys: Sequence[SecretStr | str]) -> None:
        """Use these keys from now on; the active one stays active if it is among them.

        Raises:
            ConfigurationError: there is no key, or one is not a Fernet key; nothing has changed.
        """
        ring, active = _ring_of(keys), self.fingerprints[0]
        self._ring = _with_first(ring, active) if active in ring else ring
        # After the ring: an earlier call still writes what it decrypts to the table dropped here.
        self._opened = SealedTexts()

    def activate(self, name: str) -> bool:
        """Encrypt with the key of this fingerprint from now on; return whether it is here."""
        if name not in self._ring:
            return False
        self._ring = _with_first(self._ring, name)
        return True

    def has(self, keys: Sequence[SecretStr | str]) -> bool:
        """Return whether these are the keys it has, in any order."""
        return {fingerprint(_text(key)) for key in keys} == set(self._ring)

    @staticmethod
    def generate_key() -> SecretStr:
        """Return a new Fernet key."""
        return SecretStr(Fernet.generate_key().decode())

    def encrypt(self, key: SecretStr, binding: KeyBinding) -> str:
        """Return a ciphertext that can only be decrypted for this binding."""
        plain = {
            "agent_id": binding.agent_id,
            "provider": binding.provider,
            "origin": binding.origin,
            "key": key.get_secret_value(),
        }
        return self._active.encrypt(_BOUND + json.dumps(plain).encode()).decode()

    def decrypt(self, ciphertext: str, binding: KeyBinding) -> SecretStr:
        """Return the key of a bound ciphertext.

        Raises:
            KeyUndecryptable: no key of this vault decrypts it, or it is unbound or bound elsewhere.
        """
        opened = self._opened
        name = hashlib.sha256(
            "\0".join((ciphertext, binding.agent_id, binding.provider, binding.origin)).encode(
                "utf-8", "surrogatepass"
            )
        ).digest()
        known = opened.get(name)
        if known is not None:
            return SecretStr(known)
        key = self._bound_key(ciphertext, binding)
        opened.put(name, key)
        return SecretStr(key)

    def _bound_key(self, ciphertext: str, binding: KeyBinding) -> str:
        plain = self._plaintext(ciphertext)
        if not plain.startswith(_BOUND):
            _refuse("The stored key is not bound to an agent and an endpoint. Set it again.")
        data = json.loads(plain[len(_BOUND) :])
        if KeyBinding(data["agent_id"], data["provider"], data["origin"]) != binding:
            _refuse("The stored key belongs to another agent, provider or endpoint. Set it again.")
        return str(data["key"])

    def decrypt_unbound(self, ciphertext: str) -> SecretStr:
        """Return the key of a ciphertext that contains the bare key, as in a table not made by us.

        For adoption only (docs/protocol.md section 1): such a ciphertext does not say where its key
        may be sent, so serving it would let anyone who edits an endpoint collect the key.

        Raises:
            KeyUndecryptable: no key of this vault decrypts it, or it is not a bare key.
        """
        plain = self._plaintext(ciphertext)
        if plain.startswith((_BOUND, _CHECK, _SEAL)):
            _refuse("The stored key is bound already.")
        try:
            text = plain.decode()
        except UnicodeDecodeError:
            text = ""
        if not text:
            _refuse("The stored key is not text.")
        return SecretStr(text)

    def seal(self, text: str) -> str:
        """Return a ciphertext of this text, which only the active key can make."""
        return self._active.encrypt(_SEAL + text.encode()).decode()

    def unseal(self, ciphertext: str) -> str | None:
        """Return the text of such a ciphertext; None if no key of this vault made it."""
        try:
            plain = self._plaintext(ciphertext)
        except KeyUndecryptable:
            return None
        return plain[len(_SEAL) :].decode() if plain.startswith(_SEAL) else None

    def make_check_of(self, name: str) -> str:
        """Return a ciphertext that shows later whether the key with this fingerprint is here."""
        return self._ring[name].encrypt(_CHECK).decode()

    def opens_check(self, ciphertext: str) -> bool:
        """Return whether one of the keys made this check ciphertext."""
        try:
            return hmac.compare_digest(self._plaintext(ciphertext), _CHECK)
        except KeyUndecryptable:
            return False

    def key_of(self, ciphertext: str) -> str | None:
        """Return the fingerprint of the key that a bound ciphertext or a seal needs, if it is here.

        Any other ciphertext needs none: it is refused whatever key decrypts it.
        """
        for name, fernet in self._ring.items():
            try:
                plain = fernet.decrypt(ciphertext.encode())
            except (InvalidToken, ValueError, TypeError):
                continue
            return name if plain.startswith((_BOUND, _SEAL)) else None
        return None

    def reencrypt(self, ciphertext: str) -> str | None:
        """Return the same plaintext, including its binding, encrypted under the active key.

        None if there is nothing to do: it is under the active key, is not bound, or no key of this
        vault decrypts it.
        """
        if self.key_of(ciphertext) in (None, self.fingerprints[0]):
            return None
        return self._active.encrypt(self._plaintext(ciphertext)).decode()

    @property
    def _active(self) -> Fernet:
        return next(iter(self._ring.values()))

    def _plaintext(self, ciphertext: str) -> bytes:
        try:
            return MultiFernet(self._ring.values()).decrypt(ciphertext.encode())
        except (InvalidToken, ValueError, TypeError):
            _refuse("The stored key was encrypted with a key that this server does not have.")


def _ring_of(keys: Sequence[SecretStr | str]) -> dict[str, Fernet]:
    """Return the keys by fingerprint, in order; replaced as a whole, never modified."""
    if not keys:
        raise ConfigurationError("an encryption key is needed")
    try:
        return {fingerprint(_text(key)): Fernet(_text(key)) for key in keys}
    except (ValueError, TypeError):
        # The library's message may quote the key.
        raise ConfigurationError(
            "an encryption key is not a Fernet key (32 bytes in URL-safe base64)"
        ) from None


def _with_first(ring: dict[str, Fernet], name: str) -> dict[str, Fernet]:
    return {name: ring[name]} | ring


def _text(key: SecretStr | str) -> str:
    return key.get_secret_value() if isinstance(key, SecretStr) else key


def fingerprint(key: str) -> str:
    """Return a short name for a Fernet key that reveals nothing about it."""
    return hashlib.sha256(b"slm fernet key:" + key.strip().encode()).hexdigest()[:16]


def parse_keys(text: str) -> list[SecretStr]:
    """Return the keys in a list separated by commas or white space, as in SLM_ENCRYPTION_KEYS."""
    return [SecretStr(tidied(part)) for part in text.replace(",", " ").split()]


def _refuse(why: str) -> NoReturn:
    raise KeyUndecryptable(why) from None
