"""Brings one subscriber from its `subscribe` message into the live stream.

Replays the missed changes page by page, waiting for the socket to drain after each write, and then
joins the hub in one step of the event loop, without a second buffer (docs/protocol.md section 4,
points 1 and 4).
"""

from __future__ import annotations

import logging

from slm.errors import ProblemError
from slm.protocol import Subscribe
from slm.server.agents.changes import Position
from slm.server.settings import Settings
from slm.server.stream.change_reader import ChangePage
from slm.server.stream.encoding import in_writes
from slm.server.stream.feed import ChangeFeed
from slm.server.stream.hub import Hub
from slm.server.stream.outbox import ResyncReason
from slm.server.stream.subscriber import Subscriber

logger = logging.getLogger(__name__)


async def open_stream(
    subscriber: Subscriber, wanted: Subscribe, *, hub: Hub, feed: ChangeFeed, settings: Settings
) -> None:
    """Answer `subscribed` and bring the subscriber into the live stream.

    If that is not possible, the connection is closed with 1013 so that the client reconnects.
    """
    subscriber.client = wanted.client
    try:
        await _open(subscriber, wanted, hub, feed, settings)
    except ProblemError:
        # The database is unavailable, so the missed changes cannot be replayed now.
        subscriber.sink.end(1013, "the changes cannot be read now")
    except Exception as error:
        logger.error("a stream failed with %s", type(error).__name__)
        subscriber.sink.end(1011, "internal error")


async def _open(
    subscriber: Subscriber, wanted: Subscribe, hub: Hub, feed: ChangeFeed, settings: Settings
) -> None:
    if wanted.since is None or wanted.epoch is None:
        hub.begin(subscriber, hub.head, hub.epoch)
        hub.join(subscriber)
        return
    at = Position(wanted.since, wanted.epoch, wanted.change_id)
    seconds = settings.min_revision_wait_seconds
    while not hub.is_at(*at):
        # Read before sending `subscribed`: only then do we know where the stream can start.
        # Never past the head: frames must not be ahead of the catalog.
        upto = hub.head
        page = await feed.read(at.revision, settings.replay_page, upto=upto)
        reason = _not_resumable(at, page, upto, feed.replay_limit)
        if reason is not None:
            if reason not in ("compacted", "far-behind"):
                # This replica may not have noticed yet; the resync must name a position that
                # exists.
                await feed.look_again(seconds)
                await hub.reached(feed.position, feed.epoch, seconds)
            hub.resync(subscriber, reason)
            return
        if hub.epoch != at.epoch or not page.changes:
            # The database has that position, so this replica will reach it too.
            feed.wake()
            if not await hub.can_go_on(at, seconds):
                subscriber.sink.end(1013, "this replica is behind")
                return
            continue
        if not subscriber.epoch:
            hub.counts.replays += 1
            hub.begin(subscriber, at.revision, at.epoch, page.id_here or at.change_id or "")
        for frames in in_writes(page.changes, subscriber.view, feed.hides):
            if not hub.send(subscriber, frames):
                return
            await subscriber.sink.drained()
        at = Position(subscriber.position, subscriber.epoch, subscriber.change_id)
    if not subscriber.epoch:
        hub.begin(subscriber, at.revision, at.epoch)
    hub.join(subscriber)


def _not_resumable(at: Position, page: ChangePage, upto: int, limit: int) -> ResyncReason | None:
    """Return why the database cannot resume from this position, or None if it can."""
    horizon = page.horizon
    if horizon.epoch != at.epoch:
        return "epoch"
    if at.revision > horizon.revision:
        return "ahead"
    if horizon.lost(at, page.id_here):
        return "forked"
    hole = not page.changes and at.revision < min(upto, horizon.revision)
    if hole or not page.continues(at.revision):
        return "compacted"
    return "far-behind" if horizon.revision - at.revision > limit else None
