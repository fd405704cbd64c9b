"""Hot GETs: the list compressed once a revision, entity tags, and the way around FastAPI."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDictProxy

from tests.support.raw import Api
from tests.support.servers import InLoopServer, reads_keys


async def _raw(
    server: InLoopServer, path: str, token: str | None = None, **headers: str
) -> tuple[int, bytes, CIMultiDictProxy[str]]:
    """GET without the client's own decompression."""
    token = token or (server.backend_token if reads_keys(path) else server.admin_token)
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.get(
            server.url + path, headers={"Authorization": f"Bearer {token}", **headers}
        ) as answer,
    ):
        return answer.status, await answer.read(), answer.headers


async def test_the_list_comes_compressed_to_who_takes_it(admin: Api, server: InLoopServer) -> None:
    """With Accept-Encoding: gzip the same list comes compressed, under a tag of its own."""
    await admin.create("alpha")
    _, plain, plain_headers = await _raw(server, "/api/agents", **{"Accept-Encoding": "identity"})
    status, packed, headers = await _raw(server, "/api/agents", **{"Accept-Encoding": "br, gzip"})
    assert status == 200
    assert headers["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(packed)) == json.loads(plain)
    assert headers["ETag"] != plain_headers["ETag"]
    assert headers["Vary"] == plain_headers["Vary"] == "accept-encoding"
    assert "Content-Encoding" not in plain_headers
    again = {"Accept-Encoding": "gzip", "If-None-Match": headers["ETag"]}
    assert (await _raw(server, "/api/agents", **again))[:2] == (304, b"")


async def test_a_compressed_list_is_never_an_older_one(admin: Api, server: InLoopServer) -> None:
    """After a write the compressed list holds it, as the plain one does."""
    for number in range(3):
        await admin.create(f"agent-{number}")
        _, packed, headers = await _raw(server, "/api/agents", **{"Accept-Encoding": "gzip"})
        listed = json.loads(gzip.decompress(packed))
        assert listed["agents"][-1]["agent_id"] == f"agent-{number}"
        assert str(listed["revision"]) == headers["SLM-Revision"]


async def test_the_list_is_compressed_once_a_revision(
    admin: Api, server: InLoopServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many ask for the compressed list, at once or one by one, a change costs one gzip."""
    compress = gzip.compress
    compressed: list[bytes] = []

    def counting(data: bytes, *args: Any, **kwargs: Any) -> bytes:
        compressed.append(data)
        return compress(data, *args, **kwargs)

    monkeypatch.setattr(gzip, "compress", counting)

    async def get() -> bytes:
        status, packed, headers = await _raw(server, "/api/agents", **{"Accept-Encoding": "gzip"})
        assert (status, headers["Content-Encoding"]) == (200, "gzip")
        return packed

    for revision in (2, 3):
        await admin.create(f"agent-{revision}")
        compressed.clear()
        bodies = [*await asyncio.gather(get(), get(), get()), await get(), await get()]
        assert len(compressed) == 1
        assert set(bodies) == {bodies[0]}
        assert json.loads(gzip.decompress(bodies[0]))["revision"] == revision


async def test_what_holds_a_key_is_never_compressed(admin: Api, server: InLoopServer) -> None:
    """Keyed answers come plain and not to be kept, whatever the client takes."""
    await admin.create("alpha", llm_provider="openai", llm_api_key="sk-canary-plain")
    for path in ("/api/agents/alpha/llm", "/api/snapshot"):
        status, body, headers = await _raw(server, path, **{"Accept-Encoding": "gzip"})
        assert (status, headers["Cache-Control"]) == (200, "no-store")
        assert "Content-Encoding" not in headers
        assert "ETag" not in headers
        assert b"sk-canary-plain" in body


async def test_gzip_refused_by_weight_is_not_sent(server: InLoopServer) -> None:
    """A weight of 0 means "not that"."""
    for header in ("gzip;q=0", "gzip; q=0.0, identity", "deflate", ""):
        _, body, headers = await _raw(server, "/api/agents", **{"Accept-Encoding": header})
        assert "Content-Encoding" not in headers
        assert json.loads(body)["total"] == 1


async def test_a_read_answers_alike_with_and_without_a_query(admin: Api) -> None:
    """The short way that plain reads take gives the same answer as the way through FastAPI."""
    await admin.create("alpha")
    for path in ("/api/agents/alpha", "/api/agents/default", "/api/agents"):
        plain = {"headers": {"Accept-Encoding": "identity"}}
        short = await admin.get(path, **plain)
        long = await admin.get(f"{path}?min_revision=1", **plain)
        assert (short.status, short.json) == (200, long.json)
        kept = {"Date"}
        assert {k: v for k, v in short.headers.items() if k not in kept} == {
            k: v for k, v in long.headers.items() if k not in kept
        }
    missing = await admin.get("/api/agents/no-such")
    assert (missing.status, missing.json["code"]) == (404, "agent-not-found")
    assert (await admin.get("/api/agents/a%00b")).status == 404
