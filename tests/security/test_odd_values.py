"""Odd values at every place of every route: never a 5xx, always a problem, and a healthy server.

The places come from the API's own document, so a new route or parameter is walked too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.servers import ServerProcess

KEYS: Final = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="

TEXTS: Final = [
    *("²", "٣", "²:ab", "9" * 250 + ":ab", "9" * 5000, "2147483648", "9223372036854775807"),
    *("9223372036854775808", "-1", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"),
    *("0001-01-01", "9999-12-31T23:59:59.999999Z", "a\x00b", "%_\\.", "ẞ" * 80, "a" * 3000),
]
"""What a database or a parser may stumble over, as text; the client encodes it."""

MORE_TEXTS: Final = [
    *("", "0", "2", "1_000", "0x10", "NaN", "①", "0" * 300 + "1", "0000-00-00", "２０２６-01-01"),
    *("\u202e", "💩", "a/b", "..", "*", "key.", "60s"),
]

ENCODED: Final = [
    *(
        b"%zz",
        b"%u0041",
        b"%2F%00",
        b"%ED%A0%80",
        b"%2f%ED%B0%AF",
        b"%FF",
        b"%C0%80",
        b"\xff",
        b"%",
    ),
]
"""As bytes of a URL, the way they are sent."""

JSON: Final = [
    *("null", "true", "0", "-1", "-0.0", "5e-324", "1e308", "1e400", "1.5", "[]", "{}", '""'),
    *("2147483648", "9223372036854775807", "9223372036854775808", "9" * 5000, "[null]", "[[]]"),
    *('"\\u0000"', '"\\ud800"', '"\\ufffe"', '"²"', '"٣"', '"💩"', '"a"', f'"{"a" * 3000}"'),
    *('{"a": 1, "a": 2}', '{"\\u0000": 1}', '{"\\ud800": 1}', "[" * 200 + "]" * 200, "NaN", "nul"),
    *(f'"{"ẞ" * 20_000}"', '{"' + "k" * 15_000 + '": 1}', '["*", "a"]', '"http://[::1"', "{"),
]

HEADERS: Final = [
    *("If-Match", "If-None-Match", "Accept-Encoding", "Content-Type", "Authorization", "Origin"),
    *("Host", "Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "traceparent", "tracestate"),
    *("Expect", "Range", "Connection"),
]
HEADER_VALUES: Final = [
    *(b"", b"*", b'"', b'"2"', b'"2",' * 300, b'"99999999999999999999"', b'W/"2"', b'"\x80\xff"'),
    *(b'"a"' + b" " * 7000 + b'"', b",", b"\xb2", b"9" * 250, b"gzip;q=\xb2", b"gzip;q=0.0.0"),
    *(b"Bearer \xb2", b"Bearer  x  y", b"http://[", b"http://x:99999", b"for=\xff;proto", b"=;=,="),
    *(b"fe80::1%" + b"x" * 300, b"::ffff:1.2.3.4, 999.1.1.1", b"application/json; charset=\xff"),
    *(b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-00", b"bytes=0-", b"https, \xe9", b"100-continue"),
]
"""As bytes of a header line; a NUL or a line break is the parser's own business (test_attempts)."""

BODIES: Final[dict[str, dict[str, Any]]] = {
    "AgentCreate": {"agent_id": "made", "name": "n", "llm_provider": "ollama", "llm_model": "m"},
    "TokenCreate": {"name": "made", "scopes": ["config:read"]},
}
"""What a body cannot do without."""


@dataclass(frozen=True)
class Place:
    """Where a value goes: a part of the path, a query parameter, or a field of the body."""

    method: str
    path: str
    kind: str
    name: str
    body: str | None
    query: bytes = b""

    def request(self, value: bytes) -> tuple[str, bytes, bytes | None]:
        """Method, target and body with this value there; of a body, its JSON."""
        target = self.path.encode()
        query = self.query
        body = None if self.body is None else self.body.encode()
        if self.kind == "path":
            target = target.replace(b"{%s}" % self.name.encode(), value)
        elif self.kind == "query":
            query += b"&%s=%s" % (self.name.encode(), value)
        else:
            assert self.body is not None
            sent = {k: json.dumps(v).encode() for k, v in json.loads(self.body).items()}
            sent[self.name] = value
            fields = (b"%s: %s" % (json.dumps(k).encode(), v) for k, v in sent.items())
            body = b"{" + b", ".join(fields) + b"}"
        for name in (b"{agent_id}", b"{revision}", b"{token_id}"):
            target = target.replace(name, b"1" if name != b"{agent_id}" else b"a")
        return self.method, target + (b"?" + query.lstrip(b"&") if query else b""), body


def places_of(document: dict[str, Any]) -> list[Place]:
    """Every place of the API's document where a caller may put a value."""
    found: list[Place] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parameters = operation.get("parameters", [])
            needed = [p for p in parameters if p["in"] == "query" and p.get("required")]
            body, fields = None, []
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                name = schema["$ref"].rpartition("/")[2]
                body = json.dumps(BODIES.get(name, {}))
                fields = list(document["components"]["schemas"][name]["properties"])
            for parameter in parameters:
                others = [p for p in needed if p is not parameter]
                query = b"".join(b"&%s=a" % p["name"].encode() for p in others)
                kind, name = parameter["in"], parameter["name"]
                found.append(Place(method.upper(), path, kind, name, body, query))
            found += [Place(method.upper(), path, "body", name, body) for name in fields]
    return found


class Raw:
    """One HTTP connection that sends the bytes it is given; opened anew when it was closed."""

    def __init__(self, server: ServerProcess) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self._address = host, int(port)
        self._token = server.admin_token
        self._socket: socket.socket | None = None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(
        self, method: str, target: bytes, body: bytes | None = None, *headers: tuple[str, bytes]
    ) -> tuple[int, str, bytes]:
        """Send a request; return its status, Content-Type and body."""
        sent = {
            "Host": b"x",
            "Authorization": b"Bearer " + self._token.encode(),
            "Content-Type": b"application/json",
        } | dict(headers)
        lines = [b"%s: %s" % (name.encode(), value) for name, value in sent.items()]
        lines.append(b"Content-Length: %d" % len(body or b""))
        head = b"%s %s HTTP/1.1\r\n%s\r\n\r\n" % (method.encode(), target, b"\r\n".join(lines))
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=20)
        self._socket.sendall(head + (body or b""))
        return self._answer(self._socket)

    def _answer(self, connection: socket.socket) -> tuple[int, str, bytes]:
        stream = connection.makefile("rb")
        status = int(stream.readline().split()[1])
        if status == 100:
            stream.readline()
            status = int(stream.readline().split()[1])
        headers: dict[bytes, bytes] = {}
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        content = b""
        if status not in (204, 304):
            content = stream.read(int(headers[b"content-length"]))
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return status, headers.get(b"content-type", b"").decode(), content


def check(answer: tuple[int, str, bytes], what: object) -> None:
    """Fail unless the answer is a success or a problem, and the server's fault in no way."""
    status, kind, content = answer
    if status < 400:
        return
    assert kind == "application/problem+json", (what, answer)
    problem = json.loads(content)
    assert problem["status"] == status, (what, answer)
    assert problem["code"], (what, answer)
    # A revision that is not there yet is waited for, and then this is right.
    assert status < 500 or problem["code"] == "behind", (what, answer)


@contextlib.contextmanager
def healthy(server: ServerProcess) -> Iterator[Raw]:
    """Yield a connection; afterwards the server is ready and has failed at nothing."""
    raw = Raw(server)
    try:
        yield raw
    finally:
        raw.close()
    status, _, _ = raw.ask("GET", b"/readyz")
    _, _, metrics = raw.ask("GET", b"/metrics")
    raw.close()
    assert status == 200
    assert b"slm_request_failures_total 0.0" in metrics
    assert "failed with" not in server.log


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server of its own, with limits that a walk does not reach."""
    given: dict[str, Any] = {
        "auth_failures_burst": 1_000_000,
        "writes_burst": 1_000_000,
        "min_revision_wait_seconds": 0.001,
        "behind_after_seconds": 5,
        "trusted_proxies": "127.0.0.1",
        "encryption_keys": KEYS,
    }
    folder: Path = tmp_path_factory.mktemp("odd") / "data"
    with contextlib.ExitStack() as stack:
        if request.param == "postgresql":
            url = stack.enter_context(_database(request.getfixturevalue("postgres")))
            given["database_url"] = url
        process = ServerProcess(folder, **given)
        asyncio.run(process.start())
        stack.callback(process.kill)
        with healthy(process) as raw:
            body = b'{"agent_id": "a", "name": "a", "llm_provider": "ollama", "llm_model": "m"}'
            assert raw.ask("POST", b"/api/agents", body)[0] == 201
        yield process


@contextlib.contextmanager
def _database(postgres: str) -> Iterator[str]:
    from tests.support.postgres import postgres_url

    made = postgres_url.__wrapped__(postgres)  # type: ignore[attr-defined]
    yield next(made)
    with contextlib.suppress(StopIteration):
        next(made)


def places(server: ServerProcess) -> list[Place]:
    raw = Raw(server)
    found = places_of(json.loads(raw.ask("GET", b"/openapi.json")[2]))
    raw.close()
    return found


def in_url(text: str) -> bytes:
    return quote(text, safe="").encode()


def test_every_odd_value_at_every_place(server: ServerProcess) -> None:
    """Each of the values above, in each path, query parameter and field of a body, one by one."""
    walked = places(server)
    assert {place.kind for place in walked} == {"path", "query", "body"}
    jsons = [text.encode("utf-8", "surrogatepass") for text in JSON]
    urls = [in_url(text) for text in TEXTS + MORE_TEXTS] + ENCODED
    if "database_url" in server.settings:
        # What only the parsers see was tried on the other engine.
        urls = [in_url(text) for text in TEXTS] + ENCODED[2:4]
        jsons = [value for value in jsons if b"\\u" in value or value[:1] in b"0123456789-"]
    with healthy(server) as raw:
        for place in walked:
            for value in jsons if place.kind == "body" else urls:
                check(raw.ask(*place.request(value)), (place, value[:60]))


def test_every_odd_header(server: ServerProcess) -> None:
    """Each header that the server reads, with each of the values above, on a read and a write."""
    # Of a header only the address comes to the database, in the audit.
    names = ["X-Forwarded-For"] if "database_url" in server.settings else HEADERS
    with healthy(server) as raw:
        for name in names:
            for number, value in enumerate(HEADER_VALUES):
                asked = (name, value)
                check(raw.ask("GET", b"/api/agents/a", None, asked), asked)
                body = b'{"llm_timeout": %d}' % (1 + number)
                check(raw.ask("PUT", b"/api/agents/a", body, asked), asked)


TEXT: Final = st.text(max_size=60) | st.sampled_from(TEXTS)
ANY_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_value_at_any_place(server: ServerProcess, data: st.DataObject) -> None:
    """Whatever hypothesis thinks of, several requests one after the other."""
    with healthy(server) as raw:
        walked = places_of(json.loads(raw.ask("GET", b"/openapi.json")[2]))
        for place in data.draw(st.lists(st.sampled_from(walked), min_size=1, max_size=20)):
            if place.kind == "body":
                value = json.dumps(data.draw(ANY_JSON)).encode()
            else:
                value = in_url(data.draw(TEXT.filter(_encodes)))
            check(raw.ask(*place.request(value)), (place, value))


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
