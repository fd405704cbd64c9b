"""Bearer tokens: how they are made, what is stored of them, and which scopes exist.

Pure: knows no database and no HTTP. Only the digest of a token is ever stored.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final

from pydantic import SecretStr

SCOPES: Final = ("config:read", "key:read", "agents:write", "admin")
"""Every scope that a token can have (docs/protocol.md section 3)."""

BACKEND_SCOPES: Final = ("config:read", "key:read")
"""What a backend needs, and nothing more."""

OPERATOR_SCOPES: Final = ("config:read", "agents:write", "admin")
"""What the first start's admin.token has: everything but reading keys."""

PREFIX: Final = "slm_"
_FORM: Final = re.compile(r"slm_[A-Za-z0-9_-]{43}")


def mint() -> SecretStr:
    """Return a new token: `slm_` and 256 random bits."""
    return SecretStr(PREFIX + secrets.token_urlsafe(32))


def is_well_formed(token: str) -> bool:
    """Return whether the text looks like a token from `mint`."""
    return _FORM.fullmatch(token) is not None


def digest(token: str) -> str:
    """Return what is stored of a token: its SHA-256 in hexadecimal.

    A plain hash is enough: with 256 random bits there is nothing to guess. Text that cannot be a
    token, including lone surrogates, has a digest too, but one that no stored token has.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
