"""Every duration the client waits for, as one value; the defaults are those of the protocol.

Values only: docs/protocol.md section 5 explains each. Tests use a tenth of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from slm.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How long `SLMClient` waits, in seconds; for `SLMClient(…, timings=Timings(…))`.

    Attributes:
        backoff_initial_seconds: the maximum first wait before reconnecting; the maximum doubles
            with each attempt (full jitter: the wait is random between 0 and the maximum).
        backoff_max_seconds: the limit for the maximum wait.
        nobody_max_seconds: that limit while nothing listens at the SLM's address: a refused
            connection costs no server anything, and a restart is over sooner.
        healthy_seconds: how long a client must have been caught up for its connection to be
            considered healthy, which resets the backoff.
        refused_retry_seconds: how often the SLM is retried after it refused the token.
        retry_after_max_seconds: the longest Retry-After that is honoured.
        ping_interval_seconds: how long without a frame before the SLM is pinged; it has as long to
            answer, so a dead connection is detected within twice this time.
        request_timeout_seconds: for a handshake, and for one agent's config over HTTP.
        next_address_seconds: with several addresses, how long one may take to answer a handshake
            before the next is tried; if none answered, each gets `request_timeout_seconds`.
        poll_interval_seconds: how often to poll for changes while no WebSocket gets through.
        snapshot_timeout_seconds: for all agents' configs over HTTP.
        unknown_seconds: how long to remember that the SLM does not know an agent_id, or could not
            be asked, before asking again.
        save_interval_seconds: the shortest time between two writes of the snapshot file.
        ack_delay_seconds: how long a busy event loop may delay an ack, so that callbacks run first.
        ack_interval_seconds: the shortest time between two acks; an idle client acks at once. Grows
            with the size of the ack, up to ten times this.
        key_jitter_seconds: over how long fetching a changed key is spread, so that a thousand
            backends don't ask in the same millisecond. A call that waits for the key asks at once.
        key_pause_max_seconds: the longest pause between two key fetches from a busy SLM while more
            keys change.
        close_timeout_seconds: how long the SLM has to answer the closing of the stream.
    """

    backoff_initial_seconds: float = 0.5
    backoff_max_seconds: float = 30.0
    nobody_max_seconds: float = 4.0
    healthy_seconds: float = 2.0
    refused_retry_seconds: float = 180.0
    retry_after_max_seconds: float = 600.0
    ping_interval_seconds: float = 20.0
    request_timeout_seconds: float = 10.0
    next_address_seconds: float = 2.0
    poll_interval_seconds: float = 3.0
    snapshot_timeout_seconds: float = 60.0
    unknown_seconds: float = 5.0
    save_interval_seconds: float = 1.0
    ack_delay_seconds: float = 0.04
    ack_interval_seconds: float = 0.1
    key_jitter_seconds: float = 0.1
    key_pause_max_seconds: float = 4.0
    close_timeout_seconds: float = 1.0

    def __post_init__(self) -> None:
        for each in fields(self):
            check_seconds(each.name, getattr(self, each.name), positive=True)


def check_seconds(name: str, value: float, *, positive: bool = False) -> float:
    """Return the duration, or raise an error that names the invalid argument.

    Raises:
        ConfigurationError: it is negative, not finite, or 0 where it must be positive.
    """
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ConfigurationError(f"{name} must be a number of seconds, not {value!r}")
    return value
