"""Between a cache and its file: what is worth saving, and how a cache starts from a saved file.

Reads and writes no file; `snapshot_file` does.
"""

from __future__ import annotations

import time

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.snapshot_file import Contents, Loaded


def contents_of(cache: AgentConfigCache) -> Contents | None:
    """Return what to save; None between two epochs, when nothing can be resumed from."""
    if cache.position.epoch is None or not cache.position.synced:
        return None
    entries = [
        (newest, known.is_default, known.is_active)
        for _, known in cache.agents.items()
        # Include refused configs: a client that resumes from there does not receive them again.
        if (newest := known.newest) is not None
        and (known.pending is None or known.unjudged)
        and known.key_error is None
    ]
    complete = not cache.keys_awaited()
    revision, change_id = cache.position.heard
    since = time.time() - (cache.clock() - cache.position.epoch_since)
    return Contents(entries, cache.position.epoch, revision, complete, change_id, since)


def restore(cache: AgentConfigCache, loaded: Loaded) -> None:
    """Fill an empty cache, all of it stale; entries that lack their key are left out."""
    cache.begin(loaded.epoch, loaded.revision, loaded.change_id)
    cache.position.epoch_since = cache.clock() - loaded.epoch_age_seconds
    confirmed_at = cache.clock() - loaded.age_seconds
    complete = loaded.complete
    for agent in loaded.agents:
        if agent.llm_api_key is None and agent.api_key_revision is not None:
            complete = False
            continue
        cache.apply_fetched(agent, "file")
        if (known := cache.find(agent.agent_id)) is not None:
            known.freshness.confirmed_at, known.freshness.from_file = confirmed_at, True
    cache.position.synced = complete
    cache.position.revision = loaded.revision if complete else 0
