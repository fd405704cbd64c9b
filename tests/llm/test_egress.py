"""Ways out: proxies and headers that code names, and none that only the environment names."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from slm.errors import ConfigurationError, LLMAuthError, LLMUnavailable
from slm.llm import TransportSettings
from tests.support.llm.providers import (
    CANARY,
    Answer,
    Dialect,
    Received,
    RecordingServer,
    answering,
)
from tests.support.llm.reach import reaches
from tests.support.llm.talking import completion, says, talking

NOWHERE = "http://llm.corp.invalid/v1"


@contextlib.asynccontextmanager
async def proxy(dialect: Dialect) -> AsyncIterator[RecordingServer]:
    """Yield a proxy that answers for everybody, as the providers are not there."""
    async with RecordingServer(answering(dialect)).running() as server:
        yield server


async def test_an_explicit_proxy_is_used(dialect: Dialect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider whose name only the proxy resolves is reached by argument or variable."""
    async with proxy(dialect) as out, talking(dialect.provider, says({})) as talk:
        ways = [TransportSettings(proxy=out.url.replace("//", "//user:pw@"))]
        monkeypatch.setenv("SLM_PROVIDER_PROXY", out.url)
        ways.append(TransportSettings())
        for transport in ways:
            async with talking(
                dialect.provider, says({}), transport=transport, llm_endpoint=NOWHERE
            ) as talk:
                for streamed in (False, True):
                    assert (await talk.ask(streamed=streamed)).text.startswith("Hello")
    assert all(request.path.startswith("http://llm.corp.invalid/") for request in out.received)
    login = base64.b64encode(b"user:pw").decode()
    assert out.received[0].headers["proxy-authorization"] == f"Basic {login}"
    assert out.received[0].headers["authorization"] == f"Bearer {CANARY}"
    assert "proxy-authorization" not in out.received[-1].headers


async def test_https_goes_through_a_tunnel(dialect: Dialect) -> None:
    """To an https endpoint a proxy sees host and port alone: no key, no prompt."""

    async def refuse(request: Received, answer: Answer) -> None:
        await answer.whole(b"no", status=403)

    endpoint = NOWHERE.replace("http", "https")
    async with RecordingServer(refuse).running() as out:
        transport = TransportSettings(proxy=out.url.replace("//", "//user:secret-password@"))
        async with talking(
            dialect.provider, says({}), transport=transport, llm_endpoint=endpoint
        ) as talk:
            error = await talk.fails()
    assert isinstance(error, LLMUnavailable)
    assert "the proxy refuses the request with 403" in error.detail
    assert not reaches(error, "secret-password")
    assert "secret-password" not in repr(transport)
    assert (out.received[0].method, out.received[0].path) == ("CONNECT", "llm.corp.invalid:443")
    assert CANARY.encode() not in b"".join(request.raw for request in out.received)


@pytest.mark.parametrize("trust", [False, True])
async def test_the_environments_proxy_is_used_only_where_it_is_trusted(
    dialect: Dialect, trust: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY decides where keys go, so it has to be asked for; NO_PROXY is kept to then."""
    async with proxy(dialect) as out:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, out.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        transport = TransportSettings(trust_env=trust)
        async with talking(
            dialect.provider, says({}), transport=transport, llm_endpoint=NOWHERE
        ) as talk:
            if trust:
                assert (await talk.ask()).text == "Hello there"
            else:
                assert "cannot be resolved" in str(await talk.fails())
        async with talking(dialect.provider, answering(dialect), transport=transport) as direct:
            await direct.ask()
    assert len(out.received) == int(trust)


async def test_a_proxy_that_is_none_is_not_gone_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SOCKS proxy in a trusted environment ends the call: nothing goes straight out instead."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    transport = TransportSettings(trust_env=True)
    async with talking("openai", says(completion()), transport=transport) as talk:
        assert "not an HTTP proxy" in str(await talk.fails())
        assert talk.server.connections == 0


HEADERS: list[tuple[str, dict[str, str | None], dict[str, str | None]]] = [
    ("Azure", {"api-key": "{key}"}, {"api-key": CANARY, "authorization": None}),
    (
        "API Management",
        {"Ocp-Apim-Subscription-Key": "subscription"},
        {"ocp-apim-subscription-key": "subscription", "authorization": f"Bearer {CANARY}"},
    ),
    (
        "Cloudflare Access",
        {"CF-Access-Client-Id": "id", "CF-Access-Client-Secret": "secret"},
        {"cf-access-client-secret": "secret", "authorization": f"Bearer {CANARY}"},
    ),
    ("another scheme", {"Authorization": "Token {key}"}, {"authorization": f"Token {CANARY}"}),
    ("none at all", {"authorization": None}, {"authorization": None}),
    ("our own name", {"User-Agent": "billing/1"}, {"user-agent": "billing/1"}),
]


@pytest.mark.parametrize("case", HEADERS, ids=[each[0] for each in HEADERS])
async def test_headers_of_an_origin(dialect: Dialect, case: Any) -> None:
    """Code says which header carries the key at an origin, and which others go along."""
    _, given, wanted = case
    async with RecordingServer(answering(dialect)).running() as server:
        transport = TransportSettings(headers={server.url + "/": given})
        async with talking(
            dialect.provider,
            answering(dialect),
            transport=transport,
            llm_endpoint=dialect.endpoint(server.url),
        ) as talk:
            for streamed in (False, True):
                await talk.ask(streamed=streamed)
            # Another origin gets nothing of it.
            talk.configs.current = dialect.config(talk.server.url)
            await talk.ask()
    for request in server.received:
        assert {name: request.headers.get(name) for name in wanted} == wanted
    other = talk.server.received[0].headers
    assert other["authorization"] == f"Bearer {CANARY}"
    assert not {"api-key", "cf-access-client-id", "ocp-apim-subscription-key"} & other.keys()


async def test_a_header_for_the_key_is_left_out_without_a_key(dialect: Dialect) -> None:
    """An agent without a key sends no empty header in its place, nor any made-up key."""
    async with RecordingServer(answering(dialect)).running() as server:
        transport = TransportSettings(headers={server.url: {"api-key": "{key}"}})
        endpoint = dialect.endpoint(server.url)
        async with talking(
            dialect.provider, says({}), transport=transport, llm_api_key=None, llm_endpoint=endpoint
        ) as talk:
            await talk.ask()
    assert not {"api-key", "authorization", "x-api-key"} & server.received[0].headers.keys()


async def test_a_header_that_comes_back_is_hidden() -> None:
    """A gateway's secret in a header is as secret as a key."""

    async def echo(request: Received, answer: Answer) -> None:
        text = f"no subscription {request.headers['x-gateway-token']}"
        await answer.whole(text.encode(), status=401)

    async with RecordingServer(echo).running() as server:
        transport = TransportSettings(
            headers={server.url: {"X-Gateway-Token": "gateway-secret-1234"}}
        )
        assert "gateway-secret" not in repr(transport)
        async with talking(
            "openai", says({}), transport=transport, llm_endpoint=server.url + "/v1"
        ) as talk:
            error = await talk.fails()
    assert error.detail == "no subscription ***"


@pytest.mark.parametrize(
    "settings",
    [
        {"proxy": "proxy:3128"},
        {"proxy": "socks5://proxy"},
        {"proxy": "http://"},
        {"proxy": "http://proxy:99999"},
        {"headers": {"gateway": {}}},
        {"headers": {"https://h": {"bad name": "x"}}},
        {"headers": {"https://h": {"x": "a\r\nauthorization: b"}}},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any) -> None:
    """A misspelt proxy or header is an error where it is written, not at the first call."""
    with pytest.raises(ConfigurationError):
        TransportSettings(**settings)


KEY_HEADERS = {
    "anthropic": ("x-api-key", "x-api-key header is required", "invalid x-api-key"),
    "openai": (
        "api-key",
        "Access denied due to missing subscription key.",
        "Access denied due to invalid subscription key or wrong API endpoint.",
    ),
}


@pytest.mark.parametrize("provider", KEY_HEADERS)
async def test_the_key_goes_in_the_header_that_the_server_takes(provider: str) -> None:
    """Authorization, or the other one where a server asks for it; what works is remembered."""
    header, missing, wrong = KEY_HEADERS[provider]
    dialect = Dialect(provider)

    async def other(request: Received, answer: Answer) -> None:
        if header in request.headers:
            await says(dialect.answer("Hi"))(request, answer)
        else:
            await says({"error": {"message": missing}}, status=401)(request, answer)

    async with talking(provider, other) as talk:
        for streamed in (False, True):
            await talk.ask(streamed=streamed)
        sent = [
            (r.headers.get("authorization"), r.headers.get(header)) for r in talk.server.received
        ]
        assert sent == [(f"Bearer {CANARY}", None), (None, CANARY), (None, CANARY)]
    async with talking(provider, other) as talk:
        # Those under way while another learns it are answered, too.
        assert {r.text for r in await asyncio.gather(*(talk.ask() for _ in range(9)))} == {"Hi"}
    async with talking(provider, says({"error": {"message": wrong}}, status=401)) as talk:
        assert type(await talk.fails()) is LLMAuthError
        assert len(talk.server.received) == 2
        # A wrong key teaches nothing about headers.
        talk.server.handler = says(dialect.answer("Hi"))
        await talk.ask()
        assert talk.server.received[2].headers["authorization"] == f"Bearer {CANARY}"


async def test_many_at_once_share_what_was_learnt() -> None:
    """Calls under way while another learns what is refused all end in an answer."""
    from tests.support.llm.talking import by_body, refusal

    handler = by_body(
        lambda body: refusal("no 'top_p': unsupported") if "top_p" in body else says(completion())
    )
    async with talking("openai", handler, llm_options={"top_p": 1}) as talk:
        results = await asyncio.gather(*(talk.ask() for _ in range(10)))
    assert {result.text for result in results} == {"Hello"}
