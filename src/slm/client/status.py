"""The values of `SLMClient.status`. Values only."""

from __future__ import annotations

import enum


class ClientStatus(enum.StrEnum):
    """How `SLMClient` is connected; `SLMClient.last_error` explains any failure."""

    STARTING = "starting"
    """Not connected yet, and nothing has failed so far."""

    SYNCING = "syncing"
    """Subscribed and fetching a snapshot; known configurations are served as stale meanwhile."""

    LIVE = "live"
    """Every change arrives as it is made; nothing expires."""

    BEHIND = "behind"
    """Connected to an SLM that cannot read its database; changes may be missing."""

    POLLING = "polling"
    """No WebSocket gets through, as `last_error` says; polls for changes every few seconds."""

    DISCONNECTED = "disconnected"
    """No stream; retries with backoff. The cache or the chain's later steps are used."""

    UNAUTHORIZED = "unauthorized"
    """The SLM refuses the token or its scopes; retries every few minutes."""

    TLS_ERROR = "tls-error"
    """The SLM's certificate was not accepted, so nothing was sent; retries with backoff."""

    CLOSED = "closed"
    """`close()` was called; known configurations are still served, as stale."""
