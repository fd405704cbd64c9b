"""A key goes to the origin that it was given for, however the endpoint is spelled."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection

from slm import SLMClient
from slm.endpoints import DEFAULT_ENDPOINTS, canonical_url, origin, refused_endpoint
from slm.errors import LLMEndpointRefused, LLMError
from slm.llm import LLMInterface, RetrySettings
from slm.llm.providers import http
from tests.llm.conftest import ASK
from tests.support.http import Caller, agent
from tests.support.llm.providers import DIALECTS, Configs, Dialect, RecordingServer, answering
from tests.support.servers import InLoopServer

ONCE = RetrySettings(max_retries=0)

SCHEMES = st.sampled_from(["http", "https", "HTTP", "hTTps", "htTp", "ftp", "ht\ttp", " http"])
HOSTS = (
    "gw GW gw. gw.. vllm.prod VLLM.prod. a..b .gw xn--bcher-kva.de localhost LocalHost. 127.0.0.1 "
    "127.1 0x7f.1 2130706433 0177.0.0.1 127.0.0.1. 1.2.3.4.5 09.1.1.1 4294967296 [::1] [0:0::1] "
    "[::FFFF:7F00:1] [::ffff:127.0.0.1] [::1%25eth0] [127.0.0.1] [fd12::A] gw%2eprod g%77 gw,x _x "
    "b\u00fccher.de gw\u3002prod \uff47\uff57 gw\u00ad g\u0131 \u0661.1.1.1 user@gw user:pw@gw "
    "gw\\@evil gw\\.evil gw\tx gw\n"
)
ANY_HOST = st.one_of(
    st.sampled_from([*HOSTS.split(" "), "g w"]),
    st.text("aGw0127.:[]%\\@-_\u3002\u0661\t x", min_size=1, max_size=10),
)
PORTS = " : :80 :443 :0080 :11434 :8000 :0 :65536 :\u0668\u0660 :80:80 :-1"
PATHS = " / /v1 /v1/ //evil.example/v1 /a/../b /%2e%2e ?x=1 /v1?x=@evil #f /@evil"
URLS = st.builds(
    lambda scheme, slashes, host, port, path: scheme + slashes + host + port + path,
    SCHEMES,
    st.sampled_from(["://", "://", "://", ":///", ":/", ":", "//"]),
    ANY_HOST,
    st.sampled_from(PORTS.split(" ")),
    st.sampled_from(PATHS.split(" ")),
)


@pytest.mark.parametrize("stored", [False, True], ids=["saved now", "stored before"])
def test_every_adapter_connects_where_the_key_is_bound_to(
    stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any spelling of a URL is refused, or all three adapters connect to the origin of the key."""
    wire: list[str] = []

    async def connect(self: aiohttp.TCPConnector, request: Any, *_: Any, **__: Any) -> Any:
        """Note where the HTTP library connects to, and whether by TLS; connect nowhere."""
        to = request.connection_key
        host = f"[{to.host}]" if ":" in to.host else to.host
        wire.append(f"{'https' if to.is_ssl else 'http'}://{host}:{to.port}")
        raise aiohttp.ClientConnectionError("seen")

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", connect)

    async def where(llm: LLMInterface, configs: Configs, dialect: Dialect, url: str) -> list[str]:
        wire.clear()
        configs.current = dialect.config("http://unused", llm_endpoint=url)
        with pytest.raises(LLMError):
            await llm.chat("a", ASK)
        return list(wire)

    with asyncio.Runner() as runner:
        configs = Configs(DIALECTS[0].config("http://unused"))
        llm = LLMInterface(configs, retry=ONCE)

        @settings(max_examples=80, deadline=None)
        @given(url=URLS)
        @example(url="HTTP://gw")
        @example(url="http://vllm.prod.:8000/v1")
        @example(url="https://GW/v1")
        def live(url: str) -> None:
            for dialect in DIALECTS:
                seen = runner.run(where(llm, configs, dialect, url))
                if refused_endpoint(url, stored=stored) is not None:
                    assert stored is False or seen == [], dialect
                    continue
                bound = [origin(dialect.provider, url)]
                # A name that was saved before may be one that an HTTP library does not take.
                assert seen == bound or (stored and seen == []), dialect

        live()
        runner.run(llm.close())


def _origin_at_first(provider: str, endpoint: str | None) -> str:
    """Return what a key was bound to by the first version, whose seals are still there."""
    url = endpoint or DEFAULT_ENDPOINTS.get(provider)
    if url is None:
        return f"none:{provider}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return f"unreadable:{url}"
    scheme = parts.scheme.lower()
    plain = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]*)?", parts.netloc)
    if not host or scheme not in ("http", "https") or not plain:
        return f"unreadable:{url}"
    host = host.rstrip(".").lower()
    address: Any = None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            address = None
    if address is not None:
        address = getattr(address, "ipv4_mapped", None) or address
        host = f"[{address}]" if address.version == 6 else str(address)
    return f"{scheme}://{host}:{port or {'http': 80, 'https': 443}[scheme]}"


@settings(max_examples=400)
@given(provider=st.sampled_from(["openai", "ollama", "other"]), url=st.none() | URLS)
def test_keys_sealed_before_still_open(provider: str, url: str | None) -> None:
    """What a key is bound to is worded as ever, so that no stored key is lost."""
    bound = _origin_at_first(provider, url)
    # A host of dots alone was read as none then, and names no place now.
    if "://:" not in bound:
        assert origin(provider, url) == bound
    one = canonical_url(provider, url)
    assert one is None or origin(provider, one) == origin(provider, url)
    assert one is None or canonical_url(provider, one) == one


async def test_a_dot_at_the_end_of_the_host_is_not_saved(ask: Caller) -> None:
    """`vllm.prod.` is another host than `vllm.prod` where search domains exist: 422, key kept."""
    key = {"llm_endpoint": "http://vllm.prod:8000/v1", "llm_api_key": "sk-a"}
    assert (await ask("POST", "/api/agents", agent("a", **key))).status == 201
    for spelled in (
        "http://vllm.prod.:8000/v1",
        "http://vllm.prod..:8000",
        "HTTP://VLLM.prod.:8000",
    ):
        moved = await ask("PUT", "/api/agents/a", {"llm_endpoint": spelled})
        assert (moved.status, moved.code) == (422, "invalid-request")
        assert "dot" in str(moved.body)
    same = await ask("PUT", "/api/agents/a", {"llm_endpoint": "HTTP://VLLM.prod:8000/v2"})
    assert (same.status, "api_key_cleared" in same.body) == (200, False)


def _execute(sql: str, connection: Connection) -> None:
    connection.exec_driver_sql(sql)


async def test_a_stored_dot_leads_where_the_key_is_bound_to(
    ask: Caller, server: InLoopServer
) -> None:
    """A row from before with such a dot is served with its key, and called without the dot."""
    database = server.running.services.database
    for dialect in DIALECTS:
        async with RecordingServer(answering(dialect)).running() as provider:
            port = provider.url.rpartition(":")[2]
            name = dialect.provider
            endpoint = dialect.endpoint(f"http://localhost:{port}")
            fields = {"llm_provider": name, "llm_api_key": "sk-a", "llm_endpoint": endpoint}
            assert (await ask("POST", "/api/agents", agent(name, **fields))).status == 201
            dotted = endpoint.replace("localhost", "LocalHost.")
            sql = f"UPDATE agents SET llm_endpoint = '{dotted}' WHERE agent_id = '{name}'"
            await database.run(functools.partial(_execute, sql))
            read = await ask("GET", f"/api/agents/{name}/llm")
            assert (read.body["llm_endpoint"], read.body["llm_api_key"]) == (dotted, "sk-a")
            configs = Configs(dialect.config("", llm_endpoint=dotted))
            async with LLMInterface(configs, retry=ONCE) as llm:
                await llm.chat("a", ASK)
            assert provider.received[0].headers["host"] == f"localhost:{port}"


@pytest.mark.parametrize("dialect", DIALECTS, ids=repr)
async def test_what_is_connected_to_is_compared_with_the_bound_origin(
    dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a URL lead elsewhere by mistake, the request is refused before a byte is sent."""
    async with (
        RecordingServer(answering(dialect)).running() as right,
        RecordingServer(answering(dialect)).running() as wrong,
    ):
        configs = Configs(dialect.config(right.url))
        async with LLMInterface(configs, retry=ONCE) as llm:
            await llm.chat("a", ASK)
            astray = http.url_of(dialect.endpoint(wrong.url), dialect.path)
            monkeypatch.setattr(http, "url_of", lambda *_: astray)
            with pytest.raises(LLMEndpointRefused, match="another place"):
                await llm.chat("a", ASK)
            with pytest.raises(LLMEndpointRefused, match="another place"):
                await anext(llm.stream("a", ASK))
        assert (wrong.connections, len(right.received)) == (0, 1)


async def test_the_spelling_of_the_scheme_changes_nothing(
    ask: Caller, server: InLoopServer
) -> None:
    """`HTTP://host` keeps the key and reaches the port that `http://host` reaches."""
    dialect = Dialect("ollama")
    async with RecordingServer(answering(dialect)).running() as provider:
        endpoint = provider.url.replace("127.0.0.1", "localhost")
        body = agent("a", llm_provider="ollama", llm_endpoint=endpoint, llm_api_key="sk-a")
        assert (await ask("POST", "/api/agents", body)).status == 201
        async with (
            SLMClient(server.url, token=server.backend_token) as client,
            LLMInterface(client, retry=ONCE) as llm,
        ):
            await llm.chat("a", ASK)
            change = {"llm_endpoint": endpoint.replace("http", "HTTP")}
            moved = await ask("PUT", "/api/agents/a?wait=5s", change)
            assert (moved.status, moved.body["has_api_key"]) == (200, True)
            await llm.chat("a", ASK)
        sent = [request.headers["authorization"] for request in provider.received]
        assert sent == ["Bearer sk-a"] * 2


def test_a_canonical_url_leaves_nothing_to_a_reader() -> None:
    """Lower case, the port always there, addresses in one spelling, path and query kept."""
    assert canonical_url("ollama", "HTTP://GW") == "http://gw:80"
    assert canonical_url("openai", None) == "https://api.openai.com:443/v1"
    assert canonical_url("openai", "http://0x7F.1/v1?x=1") == "http://127.0.0.1:80/v1?x=1"
    assert canonical_url("openai", "http://[::FFFF:7f00:1]") == "http://127.0.0.1:80"
    assert canonical_url("openai", "http://./") is None
    assert canonical_url("other", None) is None
