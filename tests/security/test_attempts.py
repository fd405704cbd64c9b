"""Failed logins by the thousand, and requests that no honest client sends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import tracemalloc
from pathlib import Path

import pytest

from tests.support.http import Caller, Stream, admin, agent
from tests.support.servers import InLoopServer, running_server

ATTEMPTS = 10_000


async def say(server: InLoopServer, raw: bytes, source: str = "127.0.0.1") -> bytes:
    """Send bytes as they are and return everything that comes until the server closes."""
    reader, writer = await asyncio.open_connection(*_address(server), local_addr=(source, 0))
    try:
        writer.write(raw)
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _address(server: InLoopServer) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return host, int(port)


def request(*headers: bytes, line: bytes = b"GET /api/agents HTTP/1.1") -> bytes:
    """A request's bytes, closing after it."""
    return b"\r\n".join([line, b"Host: slm", b"Connection: close", *headers, b"", b""])


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def _fail(server: InLoopServer, count: int, *, forwarded: bool = False) -> dict[int, int]:
    """Fail to log in, as fast as one connection can; return how often each status came."""
    reader, writer = await asyncio.open_connection(*_address(server))
    statuses: dict[int, int] = {}
    for first in range(0, count, 500):
        batch = range(first, min(first + 500, count))
        for number in batch:
            hop = f"X-Forwarded-For: 10.{number >> 16}.{number >> 8 & 255}.{number & 255}\r\n"
            writer.write(
                b"GET /api/agents HTTP/1.1\r\nHost: slm\r\nAuthorization: Bearer slm_%d\r\n%s\r\n"
                % (number, hop.encode() if forwarded else b"")
            )
        for _ in batch:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            statuses[status_of(head)] = statuses.get(status_of(head), 0) + 1
    writer.close()
    return statuses


async def test_ten_thousand_failed_logins_from_one_address(
    ask: Caller, server: InLoopServer
) -> None:
    """After a burst of 50 they are 429; who has a token is served all the while, from there too."""
    served = 0
    stop = asyncio.Event()

    async def honest(stream: Stream) -> None:
        nonlocal served
        while not stop.is_set():
            assert (await ask("GET", "/api/agents")).status == 200
            changed = await ask("PUT", "/api/agents/default", {"llm_model": f"m{served}"})
            assert changed.status == 200
            await stream.upto(int(changed.headers["SLM-Revision"]))
            served += 1

    async with ask.stream() as stream:
        client = asyncio.create_task(honest(stream))
        statuses = await _fail(server, ATTEMPTS)
        stop.set()
        await client
    assert served > 10
    assert set(statuses) == {401, 429}
    assert statuses[401] < ATTEMPTS / 4
    assert len(server.running.services.failed_logins) == 1
    refused = await say(server, request(b"Authorization: Bearer slm_x"))
    assert status_of(refused) == 429
    assert b"retry-after: 1\r\n" in refused.lower()
    elsewhere = await say(server, request(b"Authorization: Bearer slm_x"), source="127.0.0.2")
    assert status_of(elsewhere) == 401, "another address has a burst of its own"


async def test_ten_thousand_addresses_take_no_more_memory_than_their_limit(
    tmp_path: Path,
) -> None:
    """However many addresses fail, what is remembered of them is bounded."""
    settings = {"trusted_proxies": "127.0.0.1"}
    async with running_server(tmp_path / "data", **settings) as server, admin(server) as ask:
        buckets = server.running.services.failed_logins
        buckets._max_keys = 500
        await _fail(server, 1000, forwarded=True)
        gc.collect()
        tracemalloc.start()
        statuses = await _fail(server, 3000, forwarded=True)
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert statuses == {401: 3000}, "each address has its own burst"
        assert len(buckets) == 500
        assert grown < 2_000_000
        assert (await ask("GET", "/api/agents")).status == 200


@pytest.mark.parametrize("spoofed", ["10.0.0.1", "127.0.0.1", "nonsense", ""])
async def test_nobody_chooses_the_address_that_counts(spoofed: str, tmp_path: Path) -> None:
    """X-Forwarded-For from a peer that is no trusted proxy changes nothing."""
    async with running_server(tmp_path / "data", auth_failures_burst=2) as server:
        hop = f"X-Forwarded-For: {spoofed}".encode()
        raw = [request(hop + b"%d" % n, b"Authorization: Bearer x") for n in range(3)]
        assert [status_of(await say(server, each)) for each in raw] == [401, 401, 429]


async def test_odd_credentials_are_401(tmp_path: Path) -> None:
    """SQL, bytes that are no ASCII, no scheme, two of them, one of 500 characters: unauthorized."""
    values = [
        b"Bearer ' OR '1'='1",
        b"Bearer slm_'; DROP TABLE tokens; --",
        b"Bearer \xff\xfe\xfd",
        "Bearer ключ".encode(),
        "Bearer \N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"),
        b"Bearer",
        b"Bearer ",
        b"bearer  \t",
        b"Basic YWRtaW46YWRtaW4=",
        b"slm_0000000000000000000000000000000000000000000",
        b"Bearer a b",
        b"Bearer " + b"A" * 500,
        b"Bearer " + b"A" * 5000,
        b"",
    ]
    async with running_server(tmp_path / "data", auth_failures_burst=100) as server:
        for value in values:
            answer = await say(server, request(b"Authorization: " + value))
            assert status_of(answer) == 401, value
            assert b"unauthorized" in answer
        both = [f"Authorization: Bearer {server.admin_token}".encode(), b"Authorization: Bearer x"]
        assert status_of(await say(server, request(*both))) == 401
        upgrade = (
            b"Upgrade: websocket",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            b"Sec-WebSocket-Version: 13",
        )
        for value in values[:6]:
            raw = request(*upgrade, b"Authorization: " + value, line=b"GET /ws HTTP/1.1").replace(
                b"Connection: close", b"Connection: Upgrade"
            )
            assert status_of(await say(server, raw)) == 401, value
        async with admin(server) as ask:
            assert (await ask("GET", "/api/admin/tokens")).status == 200, "the table is still there"


async def test_bytes_that_no_header_may_hold_are_refused_and_closed(
    ask: Caller, server: InLoopServer
) -> None:
    """CR, LF and NUL in a header, a header without a name, control characters: 400, closed."""
    token = f"Authorization: Bearer {ask.token}".encode()
    broken = [
        token + b"\r\nX-Split: a\rb",
        token + b"\nX: \x00",
        token + b"\x00",
        b"X\x00Y: 1",
        b"X Y: 1",
        b": 1",
        b"X-Bell: \x07",
        token + b"\r\n continued: folded",
        b"Content-Length: 1\r\nContent-Length: 2",
        b"Content-Length: -1",
        b"Content-Length: 1x",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    ]
    for header in broken:
        answer = await say(server, request(header))
        assert status_of(answer) in (400, 431), header
        assert answer.count(b"HTTP/1.1 ") == 1, header
    for line in (
        b"GET /api/agents\x00 HTTP/1.1",
        b"GET /api/agents HTTP/1.1\rX: y",
        b"G\x00T / HTTP/1.1",
        b"GET http://[::1 HTTP/9.9",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
    ):
        answer = await say(server, request(line=line))
        assert not answer or status_of(answer) in (400, 404, 431), line


async def test_a_head_over_eight_kib_is_431_and_closed(ask: Caller, server: InLoopServer) -> None:
    """One long header, many short ones, a long path: refused; just under the limit is served."""
    token = f"Authorization: Bearer {ask.token}".encode()
    for raw in (
        request(b"X: " + b"a" * 9000),
        request(*(b"X-%d: %s" % (n, b"a" * 80) for n in range(120))),
        request(line=b"GET /api/agents?search=%s HTTP/1.1" % (b"a" * 9000)),
        request(b"X: " + b"a" * 1_000_000),
    ):
        answer = await say(server, raw)
        assert status_of(answer) == 431
    assert status_of(await say(server, request(token, b"X: " + b"a" * 7500))) == 200


async def test_no_header_of_an_answer_can_be_split(ask: Caller) -> None:
    """An agent_id with a line break in a path reaches no header; new ids cannot have one."""
    for path in ("/api/agents/a%0d%0aX-Evil:%201", "/api/agents/%00", "/api/agents/%0a/llm"):
        answer = await ask("GET", path)
        assert answer.status == 404
        assert "X-Evil" not in answer.headers
    made = await ask("POST", "/api/agents", agent("a\r\nX-Evil: 1"))
    assert made.status == 422


@pytest.mark.parametrize("known", [True, False])
async def test_a_body_that_does_not_come_holds_no_connection(known: bool, tmp_path: Path) -> None:
    """Promised and not sent, sent byte by byte, or a trailer without end: the connection is cut."""
    async with running_server(tmp_path / "data", header_timeout_seconds=0.5) as server:
        token = server.admin_token if known else "slm_x"
        head = (
            f"Authorization: Bearer {token}".encode(),
            b"Content-Type: application/json",
        )
        post = b"POST /api/agents HTTP/1.1"
        whole = request(*head, b"Content-Length: 9", line=post).replace(b"close", b"keep-alive")
        chunked = whole.replace(b"Content-Length: 9", b"Transfer-Encoding: chunked")
        for raw in (
            whole,
            whole + b"{",
            chunked,
            chunked + b"1\r\n{",
            chunked + b"0\r\nX: a",
            chunked + b"0\r\nX: " + b"a" * 1_000_000,
            chunked + b"1;" + b"a" * 1_000_000,
        ):
            answer = await say(server, raw)
            assert not answer or status_of(answer) in (401, 408, 431), raw[:300]
        # A dripping peer is cut as well: what it sends does not start the clock again.
        reader, writer = await asyncio.open_connection(*_address(server))
        writer.write(whole.replace(b"Length: 9", b"Length: 100000"))
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b" ")
                    await writer.drain()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1000), 0.05)
        writer.close()
        # An honest one, whose body comes a little after its head, is served.
        reader, writer = await asyncio.open_connection(*_address(server))
        writer.write(whole)
        await writer.drain()
        if not known:
            await reader.readuntil(b"\r\n\r\n")
        writer.write(b'{"a": 12}' + request(head[0]))
        statuses = re.findall(rb"HTTP/1.1 ([0-9]+)", await reader.read())
        assert statuses[-1:] == ([b"200"] if known else [b"401"])
        writer.close()
