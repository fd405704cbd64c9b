"""Every duration the client waits for, as one value; the defaults are the contract's.

Values only: docs/protocol.md section 5 says what each is for. Tests run at a tenth of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from slm.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How long `SLMClient` waits, in seconds; for `SLMClient(…, timings=Timings(…))`.

    Attributes:
        backoff_initial_seconds: the longest first wait before connecting again; each further one
            may be twice as long (full jitter: the wait is drawn between 0 and that).
        backoff_max_seconds: what the longest wait grows to.
        nobody_max_seconds: what it grows to while nobody listens at the SLM's address: being
            refused a connection costs no server anything, and a restart is over sooner.
        healthy_seconds: how long a client must have been caught up for its connection to count as
            healthy, so that backoff starts anew.
        refused_retry_seconds: how often the SLM is tried again after it refused the token.
        retry_after_max_seconds: the longest Retry-After that is honoured.
        ping_interval_seconds: after how long without a frame the SLM is pinged; it has as long to
            answer, so that a dead connection is found within twice this.
        request_timeout_seconds: for a handshake, and for one agent's config over HTTP.
        next_address_seconds: with several addresses, how long one may take to answer a handshake
            before the next is tried; once none of them did, each has `request_timeout_seconds`.
        poll_interval_seconds: how often changes are asked for while no WebSocket gets through.
        snapshot_timeout_seconds: for all agents' configs over HTTP.
        unknown_seconds: how long an agent_id that the SLM does not know, or an SLM that could not
            be asked, is remembered before it is asked again.
        save_interval_seconds: how often the snapshot file is written at most.
        ack_delay_seconds: how long a loop that is behind with its work may put an ack off, so that
            callbacks come before it.
        ack_interval_seconds: the shortest time between two acks; an idle client acks at once. It
            grows with what an ack has to name, up to ten times this.
        key_jitter_seconds: over how long the fetching of a changed key is spread: a thousand
            backends must not ask in one millisecond. A call that waits for the key asks at once.
        key_pause_max_seconds: the longest pause between two fetches of keys from a busy SLM, while
            further keys change.
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
    """Return the duration, or say which argument makes no sense.

    Raises:
        ConfigurationError: it is negative, not finite, or 0 where it must be positive.
    """
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ConfigurationError(f"{name} must be a number of seconds, not {value!r}")
    return value
