"""Text kept in memory encrypted under a random key of this process.

A core dump, a heap dump or a swapped-out page shows ciphertext, except in the moment of a
response. Knows no database and no agent.
"""

from __future__ import annotations

import itertools
import os
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAX_BYTES: Final = 32 * 1024 * 1024
_NONCE_BYTES: Final = 12
_ENTRY_BYTES: Final = 300
"""What an entry takes besides its text, in bytes: two objects and its place in the table."""


class Sealer:
    """Seals bytes under a key that this process generated and that is gone when it ends."""

    def __init__(self) -> None:
        self._cipher = AESGCM(os.urandom(32))
        # Only this object uses the key, so a number that never repeats is enough.
        self._numbers = itertools.count()

    def seal(self, plain: bytes, name: bytes) -> bytes:
        """Return it sealed; it can only be opened under the same name."""
        nonce = next(self._numbers).to_bytes(_NONCE_BYTES, "big")
        return nonce + self._cipher.encrypt(nonce, plain, name)

    def open(self, sealed: bytes, name: bytes) -> bytes:
        """Return what was sealed under this name.

        Raises:
            InvalidTag: it was sealed under another name, or altered.
        """
        return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], name)


class SealedTexts:
    """A table of sealed texts, limited in bytes: when it is full it starts again from empty.

    Args:
        max_bytes: the most bytes it may take.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._sealer = Sealer()
        self._max_bytes = max_bytes
        self._texts: dict[bytes, bytes] = {}
        self.bytes_held = 0

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, name: bytes) -> str | None:
        """Return the text with this name, or None."""
        sealed = self._texts.get(name)
        return None if sealed is None else self._sealer.open(sealed, name).decode()

    def put(self, name: bytes, text: str) -> None:
        """Store a text; one that is larger than the table is not stored."""
        sealed = self._sealer.seal(text.encode(), name)
        size = len(sealed) + _ENTRY_BYTES
        if size > self._max_bytes:
            return
        if self.bytes_held + size > self._max_bytes:
            self._texts, self.bytes_held = {}, 0
        self._texts[name] = sealed
        self.bytes_held += size
