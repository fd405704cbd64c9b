"""What `SLMClient.status` can say. Values only."""

from __future__ import annotations

import enum


class ClientStatus(enum.StrEnum):
    """How `SLMClient` stands to its SLM; `SLMClient.last_error` says why where something failed."""

    STARTING = "starting"
    """Not connected yet, and nothing has failed so far."""

    SYNCING = "syncing"
    """Subscribed, and fetching a snapshot; what is known is served as stale meanwhile."""

    LIVE = "live"
    """Every change arrives as it is made; nothing expires."""

    BEHIND = "behind"
    """Connected to an SLM that has lost sight of its database; changes may be missing."""

    POLLING = "polling"
    """No WebSocket gets through, as `last_error` says; changes are asked for every few seconds."""

    DISCONNECTED = "disconnected"
    """No stream; trying again with backoff. The cache, or the chain's next steps, answer."""

    UNAUTHORIZED = "unauthorized"
    """The SLM refuses the token, or its scopes; trying again every few minutes."""

    TLS_ERROR = "tls-error"
    """The SLM's certificate was not accepted, so nothing was sent; trying again with backoff."""

    CLOSED = "closed"
    """`close()` was called; what is known is still served, as stale."""
