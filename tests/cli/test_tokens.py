"""`slm tokens revoke`, where another server has not confirmed the revocation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from tests.support.command import slm

REVOKED = {"id": 7, "name": "victim", "revoked_at": "2026-11-27T23:55:10Z"}


@pytest.fixture
async def answers() -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The URL of a server that answers every revocation with this."""
    body: dict[str, Any] = dict(REVOKED)

    async def revoke(_request: web.Request) -> web.Response:
        return web.json_response(body, headers={"SLM-Revision": "1", "SLM-Epoch": "e"})

    app = web.Application()
    app.router.add_route("DELETE", "/api/admin/tokens/7", revoke)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", body
    await runner.cleanup()


async def test_a_server_that_has_not_confirmed_is_named(
    answers: tuple[str, dict[str, Any]],
) -> None:
    """The token is revoked, the servers that may still accept it are named, and the exit is 1."""
    url, body = answers
    for unconfirmed, code, said in (
        (["slm-2:17"], 1, "not confirmed yet by slm-2:17"),
        (None, 1, "could not be asked"),
        ([], 0, ""),
    ):
        body["unconfirmed"] = unconfirmed
        done = await slm("tokens", "revoke", "7", "--url", url, SLM_TOKEN="slm_x")
        assert (done.code, "Revoked token 7 'victim'." in done.out) == (code, True), done
        assert said in " ".join(done.err.split())
