"""Where requests may go: the endpoint is checked before, and its address when it is known."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from pydantic import SecretStr

from slm.errors import ConfigurationError, LLMEndpointRefused, LLMUnavailable
from slm.llm import LLMInterface, TransportSettings
from tests.llm.conftest import ASK, QUICK_RETRY, Bench
from tests.support.llm.providers import Configs, Dialect, RecordingServer, answering


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://169.254.169.254/latest",
        "http://2852039166/",
        "http://[::ffff:169.254.169.254]/",
        "http://metadata.google.internal/",
        "http://user:secret-password@127.0.0.1/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "not a url",
    ],
)
async def test_an_endpoint_is_checked_before_anything_is_sent(bench: Bench, endpoint: str) -> None:
    """An endpoint from an adopted row or the environment, which no write checked, is checked."""
    bench.set(llm_endpoint=endpoint)
    with pytest.raises(LLMEndpointRefused) as caught:
        await bench.llm.chat("a", ASK)
    assert "secret-password" not in str(caught.value)
    assert caught.value.revision == 43


def resolving(monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> list[str]:
    """Make the loop's resolver answer these addresses for these names; return what was asked."""
    asked: list[str] = []
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    async def getaddrinfo(host: Any, port: Any, **more: Any) -> Any:
        asked.append(host)
        addresses = names.get(str(host).partition(".")[0])
        if addresses is None:
            return await real(host, port, **more)
        return [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (address, port),
            )
            for address in addresses
        ]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254", "fe80::1", "0.0.0.0"),
        *("fd00:ec2::23", "fd00:c1::a9fe:a9fe", "fd00:42::42", "fec0::1", "64:ff9b:1::a9fe:a9fe"),
    ],
)
async def test_a_name_that_leads_to_a_metadata_address_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """A harmless name that resolves to a forbidden address gets no connection, and no retry."""
    asked = resolving(monkeypatch, innocent=["127.0.0.1", address])
    port = bench.server.url.rpartition(":")[2]
    bench.set(llm_endpoint=bench.dialect.endpoint(f"http://innocent.example:{port}"))
    with pytest.raises(LLMEndpointRefused, match="resolves to an address"):
        await bench.llm.chat("a", ASK)
    stream = bench.llm.stream("a", ASK)
    with pytest.raises(LLMEndpointRefused):
        await anext(stream)
    assert asked == ["innocent.example"] * 2
    assert bench.server.connections == 0


async def test_a_name_is_looked_up_once_a_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address that was checked is the one connected to: a second look-up cannot differ."""
    asked = resolving(monkeypatch, innocent=["127.0.0.1"])
    port = bench.server.url.rpartition(":")[2]
    bench.set(llm_endpoint=bench.dialect.endpoint(f"http://innocent.example:{port}"))
    for _ in range(3):
        await bench.llm.chat("a", ASK)
    assert asked == ["innocent.example"]
    assert bench.server.received[0].headers["host"] == f"innocent.example:{port}"


async def test_the_next_address_is_tried(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a name has several addresses, one that refuses is passed over."""
    resolving(monkeypatch, innocent=["::1", "127.0.0.2", "127.0.0.1"])
    port = bench.server.url.rpartition(":")[2]
    bench.set(llm_endpoint=bench.dialect.endpoint(f"http://innocent.example:{port}"))
    assert (await bench.llm.chat("a", ASK)).text == "Hello there"


async def test_a_changed_key_or_endpoint_never_meets_the_others_partner(bench: Bench) -> None:
    """Under constant change of both, each key arrives only at its own server."""
    dialect = bench.dialect
    async with RecordingServer(answering(dialect)).running() as second:
        configs = [
            dialect.config(server.url, llm_api_key=SecretStr(key), revision=revision)
            for revision, (server, key) in enumerate([(bench.server, "key-1"), (second, "key-2")])
        ]

        async def ask(number: int) -> None:
            bench.configs.current = configs[number % 2]
            result = await bench.llm.chat("a", ASK)
            assert result.text == "Hello there"

        await asyncio.gather(*(ask(number) for number in range(40)))
        assert {r.headers["authorization"] for r in bench.server.received} == {"Bearer key-1"}
        assert {r.headers["authorization"] for r in second.received} == {"Bearer key-2"}
        assert len(bench.server.received) + len(second.received) == 40


async def test_no_cookie_goes_along(bench: Bench) -> None:
    """A provider's cookie is not sent again: it would tie one key's calls to another's."""
    well = answering(bench.dialect)

    async def handler(request: Any, answer: Any) -> None:
        if len(bench.server.received) == 1:
            cookie = {"set-cookie": "session=1; Path=/"}
            await answer.whole(bench.dialect.answer(), headers=cookie)
        else:
            await well(request, answer)

    bench.server.handler = handler
    for _ in range(2):
        await bench.llm.chat("a", ASK)
    assert "cookie" not in bench.server.received[1].headers


async def test_a_changed_key_leaves_nothing(bench: Bench) -> None:
    """A key changed again and again leaves no connection of its own: none of them holds a key."""
    for number in range(300):
        bench.set(llm_api_key=SecretStr(f"secret-key-{number:03}-of-many"))
        await bench.llm.chat("a", ASK)
    assert bench.server.connections == 1, "connections hold no key and are kept"


@pytest.mark.parametrize("trusted", [True, False])
async def test_certificates_are_verified(dialect: Dialect, tmp_path: Path, trusted: bool) -> None:
    """Over TLS, a certificate of a private CA needs ca_file; without it nothing is sent."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = RecordingServer(answering(dialect))
    listener = await asyncio.start_server(server._serve, "127.0.0.1", 0, ssl=context)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        configs = Configs(dialect.config(f"https://localhost:{port}"))
        settings = TransportSettings(ca_file=str(tmp_path / "ca.pem") if trusted else None)
        async with LLMInterface(configs, retry=QUICK_RETRY, transport=settings) as llm:
            if trusted:
                assert (await llm.chat("a", ASK)).text == "Hello there"
            else:
                with pytest.raises(LLMUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                    await llm.chat("a", ASK)
                assert server.received == []


async def test_a_ca_file_that_is_not_there_is_told(dialect: Dialect) -> None:
    """A wrong ca_file is an error of the settings, not of the provider."""
    configs = Configs(dialect.config("http://127.0.0.1:1"))
    llm = LLMInterface(configs, transport=TransportSettings(ca_file="/nowhere/ca.pem"))
    with pytest.raises(ConfigurationError, match="ca_file cannot be read"):
        await llm.chat("a", ASK)


async def test_a_large_request_is_sent_whole(bench: Bench) -> None:
    """Messages of several megabytes, as pictures make them, arrive as they are."""
    large = "x\u00e9" * 2**20
    await bench.llm.chat("a", [{"role": "user", "content": large}])
    assert large in json.dumps(bench.server.received[0].body, ensure_ascii=False)
    assert int(bench.server.received[0].headers["content-length"]) > 3 * 2**20
