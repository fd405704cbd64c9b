"""The way of one subscriber from its `subscribe` to the live stream.

Replays what it missed, page by page, each waiting for its socket to drain, then joins the hub in
one step of the loop with no second buffer (docs/protocol.md section 4, points 1 and 4).
"""

from __future__ import annotations

import logging

from slm.errors import ProblemError
from slm.protocol import Subscribe
from slm.server.feed import ChangeFeed
from slm.server.frames import encode_change, in_writes
from slm.server.hub import Hub, ResyncReason, Subscriber
from slm.server.settings import Settings

logger = logging.getLogger(__name__)


async def open_stream(
    subscriber: Subscriber, wanted: Subscribe, *, hub: Hub, feed: ChangeFeed, settings: Settings
) -> None:
    """Answer `subscribed` and bring the subscriber into the live stream.

    Where that cannot be done the connection is closed with 1013, so that the client comes back.
    """
    subscriber.client = wanted.client
    try:
        await _open(subscriber, wanted, hub, feed, settings)
    except ProblemError:
        # The database is away: what was missed cannot be told now.
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
    if (wanted.since, wanted.epoch) != (hub.head, hub.epoch):
        reason = await _not_resumable(wanted.since, wanted.epoch, feed)
        if reason is not None:
            hub.resync(subscriber, reason)
            return
        # The database has it, so this replica will too.
        feed.wake()
        seconds = settings.min_revision_wait_seconds
        if not await hub.reached(wanted.since, wanted.epoch, seconds):
            subscriber.sink.end(1013, "this replica is behind")
            return
    hub.begin(subscriber, wanted.since, wanted.epoch)
    await _replay(subscriber, hub, feed, settings.replay_page)


async def _not_resumable(since: int, epoch: str, feed: ChangeFeed) -> ResyncReason | None:
    """Say why the database itself cannot resume there, or None where it can."""
    horizon = await feed.horizon()
    if horizon.epoch != epoch:
        return "epoch"
    if since > horizon.revision:
        return "ahead"
    return "compacted" if since < horizon.floor else None


async def _replay(subscriber: Subscriber, hub: Hub, feed: ChangeFeed, page_size: int) -> None:
    if hub.join(subscriber):
        return
    hub.counts.replays += 1
    while not hub.join(subscriber):
        since = subscriber.position
        if subscriber.epoch != hub.epoch or since > hub.head:
            hub.resync(subscriber, "epoch")
            return
        # Not beyond the head: frames never go ahead of the catalog.
        page = await feed.read(since, page_size, upto=hub.head)
        if page.horizon.epoch != subscriber.epoch:
            feed.wake()
            hub.resync(subscriber, "epoch")
            return
        if not page.changes or not page.continues(since):
            hub.resync(subscriber, "compacted")
            return
        view = subscriber.view
        for frames in in_writes(
            (
                change.revision,
                encode_change(change, view, hidden_today=feed.hides(view, change.agent.agent_id)),
            )
            for change in page.changes
        ):
            if not hub.send(subscriber, frames):
                return
            await subscriber.sink.drained()
