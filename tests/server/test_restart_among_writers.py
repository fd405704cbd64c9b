"""A replica that starts while others write must leave their revisions alone."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select

from slm.server.agents.schemas import AgentUpdate
from slm.server.db.tables import CHANGES, STATE
from slm.server.lifecycle.startup import prepare
from slm.server.security.audit import Who
from slm.server.settings import Settings
from tests.support.store import Store


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_starting_replicas_never_put_a_revision_back(
    store: Store, settings: Settings
) -> None:
    """Replicas start again and again under writes: no write fails, revisions have no gap."""
    done = asyncio.Event()

    async def write(number: int) -> int:
        for turn in range(60):
            update = AgentUpdate(llm_model=f"m{number}-{turn}")
            await store.registry.update("default", update, who=Who("test"))
        return 60

    async def restart() -> int:
        starts = 0
        while not done.is_set() or starts < 3:
            prepared = await prepare(settings)
            await prepared.database.close()
            starts += 1
        return starts

    restarting = asyncio.create_task(restart())
    written = sum(await asyncio.gather(*(write(number) for number in range(3))))
    done.set()
    assert await restarting >= 3
    revisions = await store.database.read(
        lambda c: list(c.execute(select(CHANGES.c.revision).order_by(CHANGES.c.revision)).scalars())
    )
    head = await store.database.read(lambda c: c.execute(select(STATE.c.revision)).scalar_one())
    assert revisions == list(range(1, 1 + written + 1))
    assert head == 1 + written
