"""Tokens and scopes at every door, and over what a key may travel."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from sqlalchemy import insert, update
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from slm.server.api.peer import has_foreign_origin, is_private
from slm.server.db.tables import STATE, TOKENS
from slm.server.security.tokens import digest, mint
from tests.support.raw import Api, raw_exchange
from tests.support.servers import InLoopServer, eventually, running_server

ROUTES: dict[tuple[str, str], str | None] = {
    ("GET", "/api/agents"): "config:read",
    ("GET", "/api/agents/default"): "config:read",
    ("GET", "/api/agents/{agent_id}"): "config:read",
    ("GET", "/api/agents/{agent_id}/llm"): "key:read",
    ("POST", "/api/agents"): "agents:write",
    ("PUT", "/api/agents/{agent_id}"): "agents:write",
    ("DELETE", "/api/agents/{agent_id}"): "agents:write",
    ("GET", "/api/snapshot"): "key:read",
    ("POST", "/api/admin/backup"): "admin",
    ("GET", "/healthz"): None,
    ("GET", "/readyz"): None,
    ("GET", "/metrics"): None,
}
"""The scope of each route as docs/protocol.md section 3 has it."""


async def add_token(server: InLoopServer, scopes: str, **columns: Any) -> str:
    """Put a token into the database as another replica would, and wait until it is known here."""
    token = mint().get_secret_value()
    row = {
        "name": "test",
        "digest": digest(token),
        "scopes": scopes,
        "created_at": datetime.now(UTC),
    }
    services = server.running.services

    def add(connection: Any) -> None:
        connection.execute(insert(TOKENS).values(row | columns))
        connection.execute(update(STATE).values(tokens_version=STATE.c.tokens_version + 1))

    before = services.feed._tokens_version
    await services.database.run(add)
    await eventually(lambda: services.feed._tokens_version > before)
    return token


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer slm_wrong",
        "Basic YWRtaW46YWRtaW4=",
        "Bearer ' OR '1'='1",
        "Bearer slm_" + "é" * 43,
        "Bearer \udc80",
        "Bearer " + "a" * 4000,
        "bearer\tx",
    ],
)
async def test_garbage_for_a_token_is_401(anonymous: Api, authorization: str) -> None:
    """Whatever stands in Authorization, what is no token of ours is 401 and never 500."""
    head = f"GET /api/agents HTTP/1.1\r\nHost: h\r\nAuthorization: {authorization}\r\n"
    received = await raw_exchange(
        anonymous.server.url,
        head.encode("utf-8", "surrogateescape") + b"Connection: close\r\n\r\n",
    )
    assert received.startswith(b"HTTP/1.1 401 "), received
    assert b"www-authenticate: Bearer" in received
    assert b'"code":"unauthorized"' in received


async def test_two_tokens_at_once_are_refused(admin: Api) -> None:
    """Two Authorization headers leave it open which one a proxy meant."""
    head = "GET /api/agents HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + 2 * (
        f"Authorization: Bearer {admin.token}\r\n"
    )
    assert (await raw_exchange(admin.server.url, head.encode() + b"\r\n")).startswith(
        b"HTTP/1.1 401 "
    )


async def test_each_route_asks_for_its_scope(
    server: InLoopServer, session: aiohttp.ClientSession
) -> None:
    """Every route that the application has: 401 without a token, 403 with every other scope."""
    document = await Api(server, session).get("/openapi.json")
    routes = {
        (method.upper(), path): operation
        for path, operations in document.json["paths"].items()
        for method, operation in operations.items()
    }
    assert routes.keys() >= ROUTES.keys()
    scopes = {"config:read", "key:read", "agents:write", "admin"}
    tokens = {left: await add_token(server, ",".join(scopes - {left})) for left in scopes}
    for (method, path), operation in routes.items():
        url = re.sub(r"\{(\w+)\}", lambda m: "default" if m[1] == "agent_id" else "1", path)
        [security] = operation.get("security", [{}])
        needed = next(iter(security.get("bearer", [])), None)
        if (method, path) in ROUTES:
            assert needed == ROUTES[method, path], (method, path)
        if needed is None:
            assert path in ("/healthz", "/readyz", "/metrics"), f"{path} is open to all"
            assert (await Api(server, session).call(method, url)).status == 200
            continue
        assert (await Api(server, session).call(method, url)).code == "unauthorized"
        without = await Api(server, session, tokens[needed]).call(method, url)
        assert (without.status, without.code) == (403, "forbidden"), (method, path)


async def test_expired_and_revoked_tokens_are_refused(
    server: InLoopServer, session: aiohttp.ClientSession
) -> None:
    """A token counts from its row on, until it expires or is revoked."""
    past, soon = (datetime.now(UTC) + timedelta(seconds=s) for s in (-1, 3600))
    good = await add_token(server, "config:read", expires_at=soon)
    expired = await add_token(server, "config:read", expires_at=past)
    revoked = await add_token(server, "config:read", revoked_at=past)
    statuses = [
        (await Api(server, session, token).get("/api/agents")).status
        for token in (good, expired, revoked)
    ]
    assert statuses == [200, 401, 401]


async def test_tokens_are_known_while_the_database_is_away(admin: Api) -> None:
    """Plain reads go on, and so do the checks of who asks."""
    services = admin.server.running.services
    await services.database.close()
    assert (await admin.get("/api/agents")).status == 200
    assert (await Api(admin.server, admin.session, "slm_x").get("/api/agents")).status == 401


async def test_metrics_may_have_a_token_of_their_own(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """With SLM_METRICS_TOKEN set, /metrics asks for it, and takes no other."""
    async with running_server(tmp_path, metrics_token="m3tr1cs") as server:
        for token, status in (("m3tr1cs", 200), (server.admin_token, 401), (None, 401)):
            answer = await Api(server, session, token).get("/metrics")
            assert answer.status == status
            assert b"slm_revision" in answer.body or status == 401


# --- over what a key may travel ---


def connection(
    client: str, scheme: str = "http", headers: dict[str, str] | None = None
) -> HTTPConnection:
    """A request as the server sees it."""
    raw = Headers(headers or {}).raw
    return HTTPConnection(
        {"type": "http", "scheme": scheme, "client": (client, 1), "headers": raw, "path": "/"}
    )


PROXY = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("127.0.0.9/32")]


@pytest.mark.parametrize(
    ("client", "scheme", "headers", "private"),
    [
        ("192.0.2.1", "https", {}, True),
        ("192.0.2.1", "http", {}, False),
        ("127.0.0.1", "http", {}, True),
        ("127.8.8.8", "http", {}, True),
        ("::1", "http", {}, True),
        ("::ffff:127.0.0.1", "http", {}, True),
        ("::ffff:192.0.2.1", "http", {}, False),
        ("not an address", "http", {}, False),
        # A proxy on this machine that nobody named: the peer is loopback, the client is not.
        ("127.0.0.1", "http", {"X-Forwarded-For": "192.0.2.1"}, False),
        ("127.0.0.1", "http", {"Forwarded": "for=192.0.2.1;proto=https"}, False),
        ("127.0.0.1", "http", {"X-Forwarded-Proto": "https"}, False),
        ("127.0.0.1", "http", {"x-forwarded-anything": ""}, False),
        # Nobody may claim TLS for itself.
        ("192.0.2.1", "http", {"X-Forwarded-Proto": "https"}, False),
        # A named proxy tells how its client came.
        ("10.1.2.3", "http", {"X-Forwarded-Proto": "https"}, True),
        ("10.1.2.3", "http", {"X-Forwarded-Proto": "http"}, False),
        ("10.1.2.3", "http", {"X-Forwarded-Proto": "https, http"}, False),
        ("10.1.2.3", "http", {"Forwarded": 'for=1;Proto="HTTPS"'}, True),
        ("10.1.2.3", "http", {"Forwarded": "for=1;proto=https, for=2"}, False),
        ("10.1.2.3", "http", {"X-Forwarded-For": "192.0.2.1"}, False),
        ("10.1.2.3", "https", {"X-Forwarded-Proto": "http"}, False),
        ("10.1.2.3", "http", {}, False),
        ("127.0.0.9", "http", {"X-Forwarded-Proto": "http"}, False),
    ],
)
def test_what_counts_as_private(
    client: str, scheme: str, headers: dict[str, str], private: bool
) -> None:
    """A key travels over TLS or to this very machine; headers count only from a named proxy."""
    assert is_private(connection(client, scheme, headers), PROXY) is private


@pytest.mark.parametrize(
    ("origin", "host", "scheme", "foreign"),
    [
        (None, "h:80", "http", False),
        ("http://h:8760", "h:8760", "http", False),
        ("http://H:8760", "h:8760", "http", False),
        ("http://h", "h", "http", False),
        ("https://h", "h:443", "https", False),
        ("http://evil", "h", "http", True),
        ("http://h:1", "h:2", "http", True),
        ("null", "h", "http", True),
        ("", "h", "http", True),
        ("http://h@evil", "h", "http", True),
        ("http://[", "h", "http", True),
    ],
)
def test_whose_origin_is_foreign(origin: str | None, host: str, scheme: str, foreign: bool) -> None:
    """A browser's page of another host or port is foreign; no Origin is no browser."""
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    assert has_foreign_origin(connection("127.0.0.1", scheme, headers)) is foreign


async def test_keyed_routes_refuse_a_forwarded_request(admin: Api) -> None:
    """Through an unknown proxy keys are neither handed out nor taken in; the rest is served."""
    await admin.create("a", llm_provider="openai", llm_api_key="sk-canary-old")
    for headers in (
        {"X-Forwarded-For": "192.0.2.1"},
        # uvicorn itself would believe these from this machine, and call it https.
        {"X-Forwarded-Proto": "https"},
        {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "https"},
        {"Forwarded": "for=127.0.0.1;proto=https"},
    ):
        proxied = replace(admin, headers=headers)
        for answer in (
            await proxied.get("/api/agents/a/llm"),
            await proxied.get("/api/snapshot"),
            await proxied.create("b", llm_api_key="sk-canary-new"),
            await proxied.put("a", llm_api_key="sk-canary-new"),
            await proxied.call("POST", "/api/admin/backup"),
        ):
            assert (answer.status, answer.code) == (403, "tls-required"), headers
    assert (await proxied.get("/api/agents/a")).status == 200
    assert (await proxied.put("a", llm_model="other")).status == 200
    assert (await admin.get("/api/agents/a/llm")).json["llm_api_key"] == "sk-canary-old"


@pytest.fixture
def own_ca() -> trustme.CA:
    """A private certificate authority."""
    return trustme.CA()


@pytest.fixture
async def tls_server(tmp_path: Path, own_ca: trustme.CA) -> AsyncIterator[InLoopServer]:
    """A server that speaks TLS."""
    issued = own_ca.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    async with running_server(tmp_path / "data", tls_cert=cert, tls_key=key) as server:
        yield server


async def test_keys_and_streams_over_tls(tls_server: InLoopServer, own_ca: trustme.CA) -> None:
    """HTTPS serves keys even through a proxy that is not named, and wss carries the stream."""
    context = ssl.create_default_context()
    own_ca.configure_trust(context)
    assert tls_server.url.startswith("https://")
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(connector=connector) as session:
        admin = Api(
            tls_server,
            session,
            tls_server.admin_token,
            {"X-Forwarded-For": "192.0.2.1"},
            key_token=tls_server.backend_token,
        )
        async with admin.stream() as socket:
            assert (await socket.frame())["type"] == "subscribed"
            created = await admin.create("a", llm_provider="openai", llm_api_key="sk-canary-tls")
            assert (await socket.next())["revision"] == created.revision
        assert (await admin.get("/api/agents/a/llm")).json["llm_api_key"] == "sk-canary-tls"


async def test_the_peer_is_checked_not_the_host_header(
    admin: Api, unused_tcp_port_factory: Callable[[], int]
) -> None:
    """A Host header that says localhost changes nothing, nor does one that says otherwise."""
    answer = await admin.get("/api/snapshot", headers={"Host": "slm.example.com"})
    assert answer.status == 200
