"""Fault 16: an older database is restored: a new epoch, and nobody keeps what is not there."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from sqlalchemy import Connection, text

from slm.server.lifecycle.backup import backup, restore
from slm.server.settings import Settings
from tests.support.faults.backends import backends, believes, is_live
from tests.support.faults.network import proxied
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually


@pytest.mark.history(resyncs=["epoch", "ahead"], committed=False)
async def test_restored_from_a_backup(
    sqlite_site: Site, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    """Backed up while it serves, changed, stopped, restored: all clients are as the backup was.

    The restored one even gets as far as the old one had: a position there means nothing any more.
    """
    server = sqlite_site.in_loop()
    await server.start()
    try:
        operator = Operator(http, server.url, sqlite_site.admin_token)
        await operator.create("kept", llm_model="kept")
        changed = await operator.create("changed", llm_model="old")
        copy = tmp_path / "backup.db"
        async with (
            subscribers(5, server.url, sqlite_site.backend_token) as subs,
            proxied(server.url) as proxy,
            backends(3, proxy.url, sqlite_site.backend_token) as clients,
        ):
            await eventually(lambda: all(s.reached(changed) for s in subs))
            await eventually(lambda: all(map(is_live, clients)))
            await backup(server.running.services.database, copy)
            await operator.set("changed", llm_model="new")
            await operator.create("made-later", llm_model="x")
            last = await operator.set("kept", llm_timeout=99)
            await eventually(lambda: all(s.reached(last) for s in subs))
            await eventually(lambda: all(c.revision >= last for c in clients))
            old_epoch = server.running.services.feed.epoch
            await server.stop()
            await restore(Settings(**server._settings), copy)
            await server.start()

            new_epoch = server.running.services.feed.epoch
            assert new_epoch != old_epoch
            for n in range(last - changed + 3):
                after = await operator.set("changed", llm_timeout=100 + n)
            assert after > last
            await eventually(lambda: all(s.epoch == new_epoch and s.reached(after) for s in subs))
            await eventually(lambda: all(c.revision >= after and is_live(c) for c in clients))
            truth = await operator.agents()
            assert truth.keys() == {"default", "kept", "changed"}
            assert truth["changed"]["llm_model"] == "old"
            assert all(s.agents == truth for s in subs)
            for client in clients:
                assert await believes(client, truth)
                assert (await client.resolve("made-later")).step == "default"
    finally:
        await server.stop()


@pytest.mark.history(resyncs=["epoch", "ahead"], committed=False)
async def test_the_revision_falls_under_a_running_server(
    site: Site, http: aiohttp.ClientSession
) -> None:
    """Somebody puts an older state back without telling: the feed makes a new epoch by itself."""
    server = site.in_loop()
    await server.start()
    try:
        operator = Operator(http, server.url, site.admin_token)
        await operator.create("kept")
        old = await operator.set("kept", llm_model="old")
        async with (
            subscribers(5, server.url, site.backend_token) as subs,
            backends(2, server.url, site.backend_token) as clients,
        ):
            await operator.set("kept", llm_model="new")
            last = await operator.create("made-later")
            await eventually(lambda: all(s.reached(last) for s in subs))
            await eventually(lambda: all(c.revision >= last for c in clients))

            def put_back(connection: Connection) -> None:
                for statement in (
                    "DELETE FROM agents WHERE agent_id = 'made-later'",
                    f"UPDATE agents SET llm_model = 'old', revision = {old}"
                    " WHERE agent_id = 'kept'",
                    f"DELETE FROM changes WHERE revision > {old}",
                    f"UPDATE state SET revision = {old}",
                ):
                    connection.execute(text(statement))

            epoch = server.running.services.feed.epoch
            await server.running.services.database.run(put_back)
            await eventually(lambda: server.running.services.feed.epoch != epoch)
            await eventually(lambda: all(s.epoch != epoch for s in subs))
            after = await operator.set("kept", llm_timeout=77)
            await eventually(lambda: all(s.reached(after) for s in subs))
            await eventually(lambda: all(is_live(c) and c.revision == after for c in clients))
            truth = await operator.agents()
            assert truth.keys() == {"default", "kept"}
            assert truth["kept"]["llm_model"] == "old"
            assert all(s.agents == truth for s in subs)
            for client in clients:
                assert await believes(client, truth)
                assert (await client.resolve("made-later")).step == "default"
    finally:
        await server.stop()
