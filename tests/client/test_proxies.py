"""A proxy on the way to the SLM: named, or the environment's where that is wanted."""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from slm import ClientStatus, ConfigurationError, SLMClient, Timings
from slm.client.transport.proxies import Proxies, parsed_proxy, usable_proxies
from tests.support.faults.backends import TENTH
from tests.support.servers import InLoopServer, eventually, running_server
from tests.support.ways import forward_proxy

CANARY = "p@ss:w/rd canary"
QUOTED = "p%40ss%3Aw%2Frd%20canary"
QUICK = Timings(**TENTH)


@pytest.fixture
def ca(tmp_path: Path) -> trustme.CA:
    """A private certificate authority, in ca.pem."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


@pytest.fixture
async def secure(tmp_path: Path, ca: trustme.CA) -> AsyncIterator[InLoopServer]:
    """A server that speaks TLS."""
    issued = ca.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    async with running_server(
        tmp_path / "data", tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem"
    ) as server:
        yield server


def follow(server: InLoopServer, tmp_path: Path, **options: Any) -> SLMClient:
    return SLMClient(
        server.url,
        server.backend_token,
        ca_file=tmp_path / "ca.pem",
        timings=QUICK,
        **options,
    )


@pytest.mark.parametrize("kind", ["http", "https"])
async def test_stream_and_requests_go_through_the_named_proxy(
    secure: InLoopServer, tmp_path: Path, ca: trustme.CA, kind: str
) -> None:
    """Through a tunnel, in which the proxy reads nothing, with the user and password it wants."""
    context = None
    if kind == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("127.0.0.1").configure_cert(context)
    async with forward_proxy(wants=f"us er:{CANARY}", tls=context) as proxy:
        named = proxy.url.replace("://", f"://us%20er:{QUOTED}@")
        async with follow(secure, tmp_path, proxy=named) as client:
            assert client.status is ClientStatus.LIVE
            assert (await client.resolve("default")).step == "agent"
            assert "canary" not in repr(vars(client))
        assert proxy.asked
        assert all(line.startswith("CONNECT 127.0.0.1:") for line in proxy.asked)
        assert not any(secure.backend_token.encode() in head for head in proxy.passed)


async def test_slm_proxy_names_it_too(
    secure: InLoopServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable does what the argument does, and the argument wins."""
    async with forward_proxy() as proxy, forward_proxy() as other:
        monkeypatch.setenv("SLM_PROXY", f'"{other.url}/"')
        async with follow(secure, tmp_path) as client:
            assert client.status is ClientStatus.LIVE
        assert other.asked
        async with follow(secure, tmp_path, proxy=proxy.url) as client:
            assert client.status is ClientStatus.LIVE
        assert proxy.asked


async def test_without_tls_the_proxy_reads_what_is_sent(
    server: InLoopServer, caplog: pytest.LogCaptureFixture
) -> None:
    """So it must be on this machine as the SLM is, unless plain http was decided on."""
    with pytest.raises(ConfigurationError, match="which would be sent the token to read"):
        SLMClient(server.url, "slm_t", proxy="http://proxy.corp:3128")
    SLMClient(server.url, "slm_t", proxy="http://proxy.corp:3128", allow_insecure=True)
    async with forward_proxy(wants="u:canary") as proxy:
        named = proxy.url.replace("://", "://u:canary@")
        async with SLMClient(server.url, server.backend_token, proxy=named, timings=QUICK) as slm:
            await eventually(lambda: slm.status is ClientStatus.LIVE)
            assert (await slm.resolve("default")).step == "agent"
        assert any(line.startswith("GET http://127.0.0.1:") for line in proxy.asked)


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        ("407 Proxy Authentication Required", "answered 407 to a tunnel to .*user name and pass"),
        ("403 Forbidden", "answered 403 to a tunnel to .*: it does not allow this destination"),
        ("502 Bad Gateway", "answered 502 to a tunnel to .*: it does not reach it"),
        (None, "the proxy 127.0.0.1:9 cannot be reached"),
    ],
)
async def test_a_proxy_that_refuses_is_named_without_its_password(
    secure: InLoopServer,
    tmp_path: Path,
    refuse: str | None,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What failed is the proxy, not the SLM; who we are there is in no error and no log."""
    caplog.set_level(logging.DEBUG)
    async with forward_proxy(refuse=refuse) as proxy:
        url = proxy.url if refuse else "http://127.0.0.1:9"
        named = url.replace("://", "://user:canary@")
        async with follow(secure, tmp_path, proxy=named, start_timeout=0.3) as client:
            error = client.last_error or ""
            assert re.search(said, error), error
            told = await client.explain("x")
    shown = repr(vars(client)) + error + told.model_dump_json() + caplog.text
    assert "canary" not in shown
    assert secure.backend_token not in shown


async def test_the_environments_proxy_counts_only_where_it_is_wanted(
    secure: InLoopServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTPS_PROXY is ignored by default; with trust_env it is used, except for this machine."""
    async with forward_proxy() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with follow(secure, tmp_path) as client:
            assert client.status is ClientStatus.LIVE
        async with follow(secure, tmp_path, trust_env=True) as client:
            assert client.status is ClientStatus.LIVE
        assert proxy.asked == []
        proxies = Proxies(trust_env=True)
        way = proxies.on_the_way_to("https://slm.internal:8760")
        assert way is not None
        assert way.url == proxy.url
        monkeypatch.setenv("NO_PROXY", ".internal")
        assert proxies.on_the_way_to("https://slm.internal:8760") is None
        monkeypatch.setenv("https_proxy", "socks5://user:canary@proxy")
        monkeypatch.setenv("HTTPS_PROXY", "socks5://user:canary@proxy")
        with pytest.raises(ConfigurationError, match="HTTPS_PROXY must be") as caught:
            SLMClient("https://slm.example", "slm_t", trust_env=True)
        assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "proxy:3128",
        "ftp://proxy",
        "http://",
        "http://proxy:0",
        "http://proxy:port",
        "http://proxy/path",
        "http://proxy?canary",
        "http://canary%3Aname:x@proxy",
        "http://u:can%0d%0aary@proxy",
        "socks5h://u:canary@proxy:1080",
        "http://u:canary@[::1",
    ],
)
def test_what_is_no_proxy_is_refused_with_a_sentence(text: str) -> None:
    """The sentence says what is expected, and does not repeat what may hold a password."""
    with pytest.raises(ConfigurationError, match="proxy must be an http or https URL") as caught:
        parsed_proxy(text, "proxy")
    assert "canary" not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_proxys_password_shows_nowhere() -> None:
    """Neither in a repr nor in what names it in errors."""
    proxies = usable_proxies(
        f"http://user:{QUOTED}@[::1]:3128/", False, ("https://slm.example",), allow_insecure=False
    )
    assert proxies.named is not None
    assert (proxies.named.url, proxies.named.place) == ("http://[::1]:3128", "[::1]:3128")
    assert proxies.named.password.get_secret_value() == CANARY
    assert "canary" not in repr(proxies)
