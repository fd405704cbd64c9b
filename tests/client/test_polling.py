"""Something lets no WebSocket through: what the client says, and how changes come all the same."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest

from slm import ClientStatus, SLMClient, Timings
from slm.client.transport.credentials import TokenSource
from slm.client.transport.http import Connection
from slm.client.transport.site import Site
from slm.errors import SLMError
from tests.support.faults.backends import TENTH
from tests.support.gateway import gateway
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually
from tests.support.ways import listening, raw, swallowing

QUICK = Timings(**(TENTH | {"poll_interval_seconds": 0.1}))


async def handshake_error(url: str, **timings: float) -> str:
    """Return what a handshake at this address ends with, as a sentence."""
    connection = Connection(Site((url,), TokenSource("slm_canary")), Timings(**timings))
    try:
        with pytest.raises(SLMError) as caught:
            await connection.open_stream()
    finally:
        await connection.close()
    assert "canary" not in repr(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            raw("200 OK", "<html>", Server="nginx"),
            r"the proxy at 127.* \(nginx\) answered 200 to a",
        ),
        (raw("400 Bad Request", Server="nginx"), "answered 400 to a WebSocket upgrade: it may not"),
        (raw("404 Not Found"), "the proxy at .* answered 404 to a WebSocket upgrade"),
        (
            raw("426 Upgrade Required"),
            "answered 426 to a WebSocket upgrade.*Upgrade and Connection",
        ),
        (raw("502 Bad Gateway", Server="nginx"), "answered 502 .*: it does not reach the SLM"),
        (raw("504 Gateway Time-out"), "answered 504 .*: it does not reach the SLM"),
        (raw("401 Unauthorized"), "the proxy at .* answered 401 to a WebSocket upgrade"),
        (raw("403 Forbidden"), "the proxy at .* answered 403 to a WebSocket upgrade"),
        (raw("503 Busy"), "the proxy at .* answered 503 to a WebSocket upgrade"),
        (raw("418 \x1b[2JTeapot", Server="\x1b[2Jslm_canary"), "answered 418 to a WebSocket"),
        (
            raw("301 Moved", Location="https://slm.internal/ws?x=1"),
            r"\(301\) to https://slm.internal,",
        ),
        (
            raw("302 Found", Location="/login"),
            r"a WebSocket upgrade with a redirect \(302\), which",
        ),
        (raw("101 Switching Protocols"), "in a wrong way.*invalid upgrade header"),
        (b"", "closed the connection without an answer to a WebSocket upgrade"),
        (b"\x15\x03\x01\x00\x02\x02\x50", "does not answer in HTTP: if it speaks TLS, write https"),
        (None, r"dropped a WebSocket upgrade \(the SLM answered 404\)"),
    ],
)
async def test_a_failed_handshake_says_what_failed(
    server: InLoopServer, answer: bytes | None, said: str
) -> None:
    """Each kind of equipment that lets no WebSocket through is told by what it did."""
    async with swallowing(server.url, answer) as url:
        sentence = await handshake_error(url)
    assert re.search(said, sentence), sentence
    assert sentence.isprintable()


async def test_tls_spoken_to_a_plain_port_is_not_called_a_wrong_certificate(
    server: InLoopServer,
) -> None:
    """https:// for a server without TLS: the sentence says so."""
    sentence = await handshake_error(server.url.replace("http://", "https://"))
    assert "does not speak TLS" in sentence
    assert "certificate" not in sentence


async def test_an_upgrade_that_is_swallowed_after_it_was_accepted() -> None:
    """A proxy that says 101 and passes nothing on: said, and not called an SLM that is away."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(handle) as port:
        sentence = await handshake_error(f"http://127.0.0.1:{port}", request_timeout_seconds=0.2)
    assert "no answer to a WebSocket upgrade" in sentence


@pytest.mark.parametrize("answer", [None, raw("200 OK", "<html>"), raw("503 Busy"), b""])
async def test_where_no_websocket_gets_through_changes_are_asked_for(
    server: InLoopServer, admin: Api, answer: bytes | None
) -> None:
    """Every few seconds rather than after the TTL; status, last_error and explain say so."""
    await admin.create("billing", llm_model="old", llm_provider="openai", llm_api_key="sk-one")
    async with (
        swallowing(server.url, answer) as url,
        SLMClient(url, token=server.backend_token, timings=QUICK) as client,
    ):
        first = await client.resolve("billing")
        assert (first.llm_model, first.stale) == ("old", False)
        await eventually(lambda: client.status is ClientStatus.POLLING)
        await admin.put("billing", llm_model="new", llm_api_key="sk-two")

        async def changed() -> bool:
            return (await client.resolve("billing")).llm_model == "new"

        await eventually(changed, timeout=5)
        config = await client.resolve("billing")
        assert config.llm_api_key is not None
        assert config.llm_api_key.get_secret_value() == "sk-two"
        assert not config.stale
        await admin.delete("billing")

        async def gone() -> bool:
            return (await client.resolve("billing")).step == "default"

        await eventually(gone, timeout=5)
        told = await client.explain("billing")
        assert told.status == "polling"
        assert client.last_error is not None
        assert "WebSocket upgrade" in client.last_error
        assert told.last_error == client.last_error


async def test_polling_serves_a_limited_token(server: InLoopServer, admin: Api) -> None:
    """What the token may not see neither comes nor keeps the rest from counting as current."""
    await admin.create("billing", llm_model="old")
    await admin.create("other", llm_model="never")
    body = {"name": "limited", "scopes": ["config:read", "key:read"], "agents": ["billing"]}
    made = await admin.call("POST", "/api/admin/tokens", json=body)
    async with (
        swallowing(server.url, raw("200 OK")) as url,
        SLMClient(url, token=made.json["token"], timings=QUICK) as client,
    ):
        assert (await client.resolve("billing")).llm_model == "old"
        await admin.put("other", llm_model="still never")
        await admin.put("billing", llm_model="new")

        async def changed() -> bool:
            return (await client.resolve("billing")).llm_model == "new"

        await eventually(changed, timeout=5)
        assert (await client.resolve("other")).step == "default"


async def test_nothing_new_costs_one_small_request(server: InLoopServer, admin: Api) -> None:
    """A snapshot, which is a key read of every agent, is taken only after a change."""
    await admin.create("billing", llm_model="m")
    async with gateway(server.url) as gate:
        gate.refuse = lambda path: 426 if path == "/ws" else None
        async with SLMClient(gate.url, token=server.backend_token, timings=QUICK) as client:
            await eventually(lambda: client.status is ClientStatus.POLLING)
            await eventually(lambda: gate.passed.count("/api/changes") >= 5)
            assert gate.passed.count("/api/snapshot") == 1
            assert not (await client.resolve("billing")).stale


async def test_the_stream_is_used_again_as_soon_as_it_works(
    server: InLoopServer, admin: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """Once upgrades get through the client is live, and asks no more."""
    caplog.set_level(logging.INFO, "slm.client")
    async with gateway(server.url) as gate:
        gate.refuse = lambda path: 502 if path == "/ws" else None
        async with SLMClient(gate.url, token=server.backend_token, timings=QUICK) as client:
            await eventually(lambda: client.status is ClientStatus.POLLING)
            gate.refuse = lambda _: None
            await eventually(lambda: client.status is ClientStatus.LIVE)
            assert client.last_error is None
            asked = gate.passed.count("/api/changes")
            answer = await admin.create("billing", llm_model="m")
            await eventually(lambda: client.revision >= answer.revision)
            assert gate.passed.count("/api/changes") == asked


async def test_a_token_that_polling_finds_refused_is_called_so(server: InLoopServer) -> None:
    """Behind such a proxy, too, a wrong token is told as a wrong token."""
    async with (
        swallowing(server.url, raw("200 OK")) as url,
        SLMClient(url, token="slm_wrong", timings=QUICK) as client,
    ):
        await eventually(lambda: client.status is ClientStatus.UNAUTHORIZED)


async def test_an_slm_that_is_away_is_not_polled() -> None:
    """Only a handshake that something answered is followed by a look over HTTP."""
    async with SLMClient(
        "http://127.0.0.1:9", token="slm_t", timings=QUICK, start_timeout=0.3
    ) as client:
        assert client.status is ClientStatus.DISCONNECTED
        assert client.last_error is not None
        assert "127.0.0.1:9" in client.last_error
