"""The connection to an SLM: its address, its token, and what an answer other than right means."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from aiohttp import web
from pydantic import SecretStr

from slm.client.timings import Timings
from slm.client.transport.answers import NobodyListens
from slm.client.transport.http import Connection, EpochChanged, TokenSource, normalised_url
from slm.client.transport.site import Site
from slm.client.transport.tls import TlsFiles
from slm.errors import (
    AgentInactive,
    AgentNotFound,
    BadRequest,
    Behind,
    ConfigurationError,
    Forbidden,
    InternalError,
    InvalidRequest,
    KeyUndecryptable,
    NotFound,
    ProblemError,
    ProtocolError,
    SLMError,
    SLMUnavailable,
    TlsRequired,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)

CANARY = "sk-canary-http"
TOKEN = "slm_canary-token"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def answering(handler: Handler) -> AsyncIterator[str]:
    """Run a server that answers everything with one handler."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def connection(url: str, timings: Timings | None = None) -> AsyncIterator[Connection]:
    site = Site((normalised_url(url),), TokenSource(TOKEN))
    opened = Connection(site, timings or Timings())
    try:
        yield opened
    finally:
        await opened.close()


def row(agent_id: str, **fields: object) -> dict[str, object]:
    return {
        "agent_id": agent_id,
        "revision": 5,
        "llm_provider": "openai",
        "llm_model": "m",
    } | fields


# --- the address ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://slm.internal", "https://slm.internal"),
        ("https://slm.internal/", "https://slm.internal"),
        ("wss://slm.internal:8760", "https://slm.internal:8760"),
        ("WSS://slm.internal/behind/a/path/", "https://slm.internal/behind/a/path"),
        ("http://localhost:8760", "http://localhost:8760"),
        ("ws://127.0.0.1:8760", "http://127.0.0.1:8760"),
        ("http://127.8.9.1", "http://127.8.9.1"),
        ("http://[::1]:8760", "http://[::1]:8760"),
    ],
)
def test_http_and_ws_addresses_are_the_same(given: str, expected: str) -> None:
    """An SLM is named by an http(s) or a ws(s) URL, as one likes."""
    assert normalised_url(given) == expected


@pytest.mark.parametrize(
    "url",
    [
        "http://slm.internal",
        "ws://10.0.0.7:8760",
        "http://0.0.0.0:8760",
        "http://127.0.0.1.evil.io",
    ],
)
def test_over_plain_http_nothing_leaves_this_machine(url: str) -> None:
    """Without TLS the token would be there for all to read: refused before anything is sent."""
    with pytest.raises(ConfigurationError, match="https"):
        normalised_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "slm.internal",
        "ftp://slm.internal",
        "https://",
        "https://canary:canary@slm.internal",
        "https://slm.internal/?token=canary",
        "https://slm.internal:port",
        "https://[::1",
    ],
)
def test_what_is_no_address_is_named_without_being_repeated(url: str) -> None:
    """The message says what is expected; the URL may hold a password by mistake."""
    with pytest.raises(ConfigurationError, match="slm_url") as caught:
        normalised_url(url)
    assert "canary" not in str(caught.value)


# --- the token ---


def test_the_token_has_four_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, file argument, SLM_TOKEN, SLM_TOKEN_FILE; the first that is there."""
    file, other = tmp_path / "a.token", tmp_path / "b.token"
    file.write_text("slm_file\n")
    other.write_text("slm_other")
    monkeypatch.setenv("SLM_TOKEN_FILE", str(other))
    assert TokenSource().headers() == {"Authorization": "Bearer slm_other"}
    monkeypatch.setenv("SLM_TOKEN", "slm_env")
    assert TokenSource().headers() == {"Authorization": "Bearer slm_env"}
    assert TokenSource(None, file).headers() == {"Authorization": "Bearer slm_file"}
    assert TokenSource("slm_arg", file).headers() == {"Authorization": "Bearer slm_arg"}
    assert TokenSource(SecretStr("slm_s")).headers() == {"Authorization": "Bearer slm_s"}


def test_a_token_file_may_be_replaced_while_running(tmp_path: Path) -> None:
    """The next request uses the new token; a file that is gone for a moment costs nothing."""
    file = tmp_path / "token"
    file.write_text("slm_one")
    source = TokenSource(token_file=file)
    file.write_text("slm_two")
    assert source.headers() == {"Authorization": "Bearer slm_two"}
    file.unlink()
    assert source.headers() == {"Authorization": "Bearer slm_two"}


def test_no_token_is_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every connection needs a token; the message names every way to give one."""
    monkeypatch.delenv("SLM_TOKEN", raising=False)
    monkeypatch.delenv("SLM_TOKEN_FILE", raising=False)
    with pytest.raises(ConfigurationError, match="SLM_TOKEN_FILE"):
        TokenSource()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        TokenSource(token_file=tmp_path / "none")
    for text in ("", "two words", "line\nbreak", "slm_ümlaut"):
        with pytest.raises(ConfigurationError, match="token") as caught:
            TokenSource(text)
        assert text == "" or text not in str(caught.value)


# --- answers ---


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (404, {"code": "agent-not-found"}, AgentNotFound),
        (404, {"code": "agent-inactive"}, AgentInactive),
        (404, None, NotFound),
        (409, {"code": "key-undecryptable"}, KeyUndecryptable),
        (401, {"code": "unauthorized"}, Unauthorized),
        (401, None, Unauthorized),
        (403, {"code": "tls-required"}, TlsRequired),
        (403, None, Forbidden),
        (422, {"code": "invalid-request", "errors": []}, InvalidRequest),
        (400, None, BadRequest),
        (408, None, BadRequest),
        (429, None, TooManyRequests),
        (500, {"code": "agent-not-found"}, InternalError),
        (502, None, InternalError),
        (503, {"code": "behind"}, Behind),
        (503, None, Unavailable),
        (418, {"code": ["odd"]}, BadRequest),
    ],
)
async def test_a_status_becomes_the_error_of_its_code(
    status: int, body: object, expected: type[ProblemError]
) -> None:
    """The code tells what happened where it fits the status, else the status does."""

    async def handler(_: web.Request) -> web.Response:
        if body is None:
            return web.Response(status=status, text="<html>a proxy's page</html>")
        return web.json_response(body, status=status, headers={"Retry-After": "7"})

    async with answering(handler) as url, connection(url) as slm:
        with pytest.raises(SLMError) as caught:
            await slm.get_llm("a", min_revision=0, epoch=None)
    assert type(caught.value) is expected
    if body is not None and expected is not InvalidRequest:
        assert caught.value.retry_after_seconds == 7


async def test_retry_after_as_a_date_counts_from_the_answers_own_clock() -> None:
    """Our wall clock may be a day off; the server's two dates are of one clock."""

    async def handler(_: web.Request) -> web.Response:
        headers = {
            "Date": "Sun, 22 Nov 2015 10:00:00 GMT",
            "Retry-After": "Sun, 22 Nov 2015 10:00:12 GMT",
        }
        return web.Response(status=503, headers=headers)

    async with answering(handler) as url, connection(url) as slm:
        with pytest.raises(Unavailable) as caught:
            await slm.get_snapshot(min_revision=0)
    assert caught.value.retry_after_seconds == 12


async def test_an_answer_about_another_agent_is_refused() -> None:
    """A client refuses an answer whose agent_id is not the one it asked for."""

    async def handler(_: web.Request) -> web.Response:
        return web.json_response(row("default", llm_api_key=CANARY))

    async with answering(handler) as url, connection(url) as slm:
        with pytest.raises(ProtocolError):
            await slm.get_llm("billing", min_revision=0, epoch=None)


@pytest.mark.parametrize("agent_id", ["a/b", "Ümlaut", "50%", "a?b#c", "a b", "%2e%2e"])
async def test_an_agent_id_is_taken_literally(agent_id: str) -> None:
    """Whatever an adopted row is called, its path names that row and no other place."""
    paths = []

    async def handler(request: web.Request) -> web.Response:
        paths.append(request.raw_path)
        return web.json_response(row(agent_id))

    async with answering(handler) as url, connection(url) as slm:
        agent = await slm.get_llm(agent_id, min_revision=3, epoch=None)
    assert agent.agent_id == agent_id
    assert paths[0].startswith("/api/agents/")
    assert paths[0].endswith("/llm?min_revision=3")
    assert paths[0].count("/") == 4


async def test_another_epoch_is_told_whatever_the_answer() -> None:
    """A 503 of a restored database says "behind" for ever; its epoch says why."""

    async def handler(_: web.Request) -> web.Response:
        return web.json_response(
            {"code": "behind"}, status=503, headers={"SLM-Epoch": "e2", "SLM-Revision": "1"}
        )

    async with answering(handler) as url, connection(url) as slm:
        with pytest.raises(EpochChanged):
            await slm.get_llm("a", min_revision=9, epoch="e1")
        with pytest.raises(Behind):
            await slm.get_llm("a", min_revision=9, epoch=None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        json.dumps(row("a", llm_timeout=CANARY)).encode(),
        json.dumps({"agent_id": "a", "llm_api_key": CANARY}).encode(),
    ],
)
async def test_an_answer_of_the_wrong_shape_is_not_told_with_its_text(body: bytes) -> None:
    """The error names the path alone, and carries no other error that knows the body."""

    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=body)

    async with answering(handler) as url, connection(url) as slm:
        with pytest.raises(ProtocolError) as caught:
            await slm.get_llm("a", min_revision=0, epoch=None)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(status: int) -> None:
    """Neither a request nor the stream's handshake takes the token to another place."""
    seen = []

    async def elsewhere(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response(row("a"))

    async with answering(elsewhere) as other:

        async def handler(_: web.Request) -> web.Response:
            return web.Response(status=status, headers={"Location": f"{other}/x"})

        async with answering(handler) as url, connection(url) as slm:
            with pytest.raises(SLMUnavailable, match="redirect"):
                await slm.get_llm("a", min_revision=0, epoch=None)
            with pytest.raises(SLMUnavailable, match="redirect"):
                await slm.open_stream()
    assert seen == []


async def test_no_proxy_or_netrc_of_the_environment_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the environment says, the token goes to the SLM, and no other one does."""
    hostile, honest = [], []

    async def proxy(request: web.Request) -> web.Response:
        hostile.append(request.raw_path)
        return web.Response(status=502)

    async def handler(request: web.Request) -> web.Response:
        honest.append(request.headers["Authorization"])
        return web.json_response(row("a"))

    netrc = tmp_path / "netrc"
    netrc.write_text("default login a password canary\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with answering(proxy) as proxy_url, answering(handler) as url:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "WS_PROXY"):
            monkeypatch.setenv(name, proxy_url)
        monkeypatch.setenv("NO_PROXY", "")
        async with connection(url) as slm:
            await slm.get_llm("a", min_revision=0, epoch=None)
            with pytest.raises(SLMError):
                await slm.open_stream()
    assert hostile == []
    assert honest == [f"Bearer {TOKEN}"] * 2


async def test_a_failure_does_not_carry_the_token() -> None:
    """The HTTP library's exceptions know the request's headers: none of them is kept."""

    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=500)

    async with answering(handler) as url, connection(url) as slm:
        with pytest.raises(SLMError) as refused:
            await slm.open_stream()
    async with connection("http://127.0.0.1:9") as slm:
        with pytest.raises(SLMUnavailable) as away:
            await slm.get_snapshot(min_revision=0)
    for error in (refused.value, away.value):
        assert error.__context__ is None
        assert error.__cause__ is None
        assert TOKEN not in repr(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_refused_connection_is_told_from_a_bad_answer(host: str) -> None:
    """Where no server is at all one may ask again soon; one that answers badly is left alone."""

    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=502)

    async with connection(f"http://{host}:9") as slm:
        with pytest.raises(NobodyListens):
            await slm.open_stream()
        with pytest.raises(NobodyListens):
            await slm.get_snapshot(min_revision=0)
    async with answering(handler) as url, connection(url) as slm:
        with pytest.raises(SLMError) as answered:
            await slm.open_stream()
    assert not isinstance(answered.value, NobodyListens)


async def test_a_silent_slm_is_given_up() -> None:
    """No answer within the time limit is an error like any other."""
    timings = Timings(snapshot_timeout_seconds=0.1)

    async def handler(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    async with answering(handler) as url, connection(url, timings) as slm:
        with pytest.raises(SLMUnavailable, match=r"within 0\.1 s"):
            await slm.get_snapshot(min_revision=0)


def test_a_ca_file_that_is_none_is_named(tmp_path: Path) -> None:
    """A wrong path or a file without a certificate is told before the first connection."""
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing\n")
    for path in (empty, tmp_path / "none.pem"):
        with pytest.raises(ConfigurationError, match="ca_file"):
            TlsFiles(path).context()
    good = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(good)
    TlsFiles(good).context()
