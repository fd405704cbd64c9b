"""Keys over plain http: from the networks an operator trusts alone, said at each start."""

from __future__ import annotations

import logging
from pathlib import Path

import aiohttp
import pytest
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from slm.errors import TlsRequired
from slm.server.api.peer import require_private
from slm.server.settings import Settings
from tests.support.raw import Api
from tests.support.servers import eventually, running_server

MESH = "10.0.0.0/8, fd12::/16, 127.0.0.6"


def is_private(client: str, headers: dict[str, str], **settings: str) -> bool:
    scope = {"type": "http", "scheme": "http", "client": (client, 1), "path": "/"}
    raw = Headers(headers).raw
    connection = HTTPConnection(scope | {"headers": raw})
    try:
        require_private(connection, Settings(**settings))  # type: ignore[arg-type]
    except TlsRequired:
        return False
    return True


@pytest.mark.parametrize(
    ("client", "headers", "private"),
    [
        ("10.1.2.3", {}, True),
        ("::ffff:10.1.2.3", {}, True),
        ("fd12::7", {}, True),
        ("192.0.2.1", {}, False),
        ("not an address", {}, False),
        # A sidecar says how its application spoke to it, and perhaps for whom.
        ("127.0.0.6", {"X-Forwarded-Proto": "http"}, True),
        ("127.0.0.6", {"X-Forwarded-For": "10.4.4.4, 10.5.5.5"}, True),
        ("10.1.2.3", {"Forwarded": 'for="[fd12::9]:4711";proto=http, for=10.0.0.1:80'}, True),
        ("10.1.2.3", {"X-Forwarded-For": "::ffff:10.9.9.9"}, True),
        # An ingress in the mesh that forwards for somebody outside of it.
        ("10.1.2.3", {"X-Forwarded-For": "198.51.100.7"}, False),
        ("10.1.2.3", {"X-Forwarded-For": "198.51.100.7, 10.5.5.5"}, False),
        ("10.1.2.3", {"X-Forwarded-For": "unknown"}, False),
        ("10.1.2.3", {"X-Forwarded-For": ""}, False),
        ("10.1.2.3", {"Forwarded": "for=_hidden"}, False),
        ("10.1.2.3", {"Forwarded": "for=198.51.100.7;proto=https"}, False),
        ("192.0.2.1", {"X-Forwarded-For": "10.1.2.3"}, False),
        ("127.0.0.1", {"X-Forwarded-For": "10.1.2.3"}, False),
    ],
)
def test_every_hop_must_be_trusted(client: str, headers: dict[str, str], private: bool) -> None:
    """Plain http is private where the peer, and all for whom it says it forwards, are trusted."""
    assert is_private(client, headers, trusted_networks=MESH) is private
    assert not is_private(client, headers)


def test_a_named_proxy_is_judged_first() -> None:
    """A proxy that ends TLS says how its client came, in a trusted network as elsewhere."""
    both = {"trusted_networks": MESH, "trusted_proxies": "10.0.0.5"}
    outside = {"X-Forwarded-For": "198.51.100.7"}
    assert is_private("10.0.0.5", outside | {"X-Forwarded-Proto": "https"}, **both)
    assert not is_private("10.0.0.5", outside | {"X-Forwarded-Proto": "http"}, **both)


async def test_keys_in_a_mesh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A backend of the mesh reads and an operator writes keys over plain http; others cannot."""
    mesh = {"trusted_networks": "127.0.0.0/8,10.0.0.0/8"}
    async with (
        running_server(tmp_path / "data", **mesh) as server,
        aiohttp.ClientSession() as session,
    ):
        inside = {"X-Forwarded-For": "10.2.3.4", "X-Forwarded-Proto": "http"}
        admin = Api(server, session, server.admin_token, inside, key_token=server.backend_token)
        assert (await admin.create("a", llm_api_key="sk-mesh")).status == 201
        assert (await admin.get("/api/agents/a/llm")).json["llm_api_key"] == "sk-mesh"
        outside = Api(
            server,
            session,
            server.admin_token,
            {"X-Forwarded-For": "192.0.2.4"},
            key_token=server.backend_token,
        )
        answer = await outside.get("/api/agents/a/llm")
        assert (answer.status, answer.code) == (403, "tls-required")
        assert "SLM_TRUSTED_NETWORKS" in answer.json["detail"]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [line for line in warned if "127.0.0.0/8, 10.0.0.0/8 (SLM_TRUSTED_NETWORKS)" in line]


async def test_the_fleet_shows_who_came_without_tls(tmp_path: Path) -> None:
    """`plain_http` is true for a backend whose connection came over the network in the clear."""
    async with (
        running_server(tmp_path / "data") as server,
        aiohttp.ClientSession() as session,
    ):
        here = Api(server, session, server.backend_token)
        there = Api(server, session, server.backend_token, {"X-Forwarded-For": "10.2.3.4"})
        async with (
            here.stream(client={"name": "here", "instance": "1"}),
            there.stream(client={"name": "there", "instance": "1"}),
        ):
            admin = Api(server, session, server.admin_token, key_token=server.backend_token)

            async def plain() -> dict[str, bool]:
                fleet = (await admin.get("/api/fleet")).json["backends"]
                return {each["name"]: each["plain_http"] for each in fleet}

            async def both() -> bool:
                return len(await plain()) == 2

            await eventually(both)
            assert await plain() == {"here": False, "there": True}


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "127.0.0.1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0", "trusted_proxies": "10.0.0.5"}, False),
    ],
)
async def test_a_public_address_without_tls_says_what_will_not_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, str], warns: bool
) -> None:
    """At the start, and not only when the first backend of another machine is refused its key."""
    async with running_server(tmp_path / "data", **settings):
        pass
    said = [r.getMessage() for r in caplog.records if "without TLS" in r.getMessage()]
    assert len(said) == warns
    for line in said:
        for named in ("tls-required", "SLM_TLS_CERT", "SLM_TRUSTED_PROXIES"):
            assert named in line
