"""Whoever answers in the SLM's place, the SDK goes on, raises its own errors and tells no token."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slm import SLMClient
from slm.client.cache.cache import AgentConfigCache
from slm.client.resolution.explain import explain_steps
from slm.client.timings import Timings
from slm.client.transport import answers, http
from slm.client.transport.answers import AskedServer
from slm.client.transport.credentials import TokenSource
from slm.common.retries import retry_after_seconds
from slm.errors import SLMError, SLMUnavailable, Unavailable
from slm.protocol import ExplainedStep
from tests.client.test_http import TOKEN, answering, connection
from tests.support.faults.backends import backend, is_live
from tests.support.faults.scripted import EPOCH, Peer, ScriptedSLM, config, scripted_slm
from tests.support.llm.reach import reaches
from tests.support.servers import eventually

OVERFLOW = "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"
BIG = "9" * 5000
QUICK = Timings(backoff_initial_seconds=0.05, retry_after_max_seconds=0.2)
AGENTS = {"default": (1, config("d", is_default=True))}
WAITS = [
    *(OVERFLOW, "999999999", BIG, "nan", "inf", "-5", "1e400", "\u00b2", "", "soon"),
    "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
    "Fri, 31 Dec 9999 23:59:59 -2359",
]
ODD = ["{}", "[]", "5", "null", "true", "1e400", "²", "-1", "1.5", "x"]
HEADS = [
    *(f"HTTP/1.1 {status} x" for status in (200, 204, 301, 401, 404, 409, 429, 503, 101, 999)),
    *("HTTP/1.1 000 x", f"HTTP/1.1 {BIG} x", "HTTP/9.9 200 x", "HTTP/1.1 200", "x", "", "\x00"),
]
LINES = [
    *(f"Retry-After: {wait}" for wait in WAITS),
    *(f"Date: {wait}" for wait in WAITS),
    *("Content-Encoding: gzip", "Content-Encoding: br", "Content-Length: -1", "Content-Length: 99"),
    *(f"Content-Length: {BIG}", "Transfer-Encoding: chunked", "X: \x01", "no colon", ": x"),
    *("SLM-Epoch: \u00e9", f"SLM-Revision: {BIG}", f"X: {BIG * 3}", "Location: http://127.0.0.1:1"),
]
BODIES = [
    *("", "[", "[" * 100_000, '{"revision": ' + BIG + "}", '{"agents": {}}', '"\\ud800"', "\u00ff"),
    *(f'{{"code": {odd}, "detail": {odd}, "status": {odd}}}' for odd in ODD),
    f'{{"code": "unavailable", "detail": "no such token: {TOKEN}", "status": 503}}',
    f'{{"revision": 1, "epoch": "e", "agents": [{{"agent_id": "a", "llm_timeout": {BIG}}}]}}',
]


@asynccontextmanager
async def _raw(answer: list[bytes]) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer[0])
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _outcome(asked: Awaitable[Any]) -> Any:
    try:
        return await asked
    except SLMError as error:
        return error


def test_no_answer_makes_anything_but_our_errors() -> None:
    """Odd status lines, headers, numbers and bodies: an answer, or an error without the token."""

    async def ask(url: str) -> None:
        async with connection(url, Timings(request_timeout_seconds=3)) as opened:
            for asked in (
                lambda: opened.get_snapshot(min_revision=0),
                lambda: opened.get_llm("a", min_revision=0, epoch="e"),
                lambda: opened.get_default(epoch=None),
                opened.open_stream,
            ):
                outcome = await _outcome(asked())
                if not isinstance(outcome, SLMError):
                    assert hasattr(outcome, "revision"), outcome
                    continue
                assert outcome.__cause__ is outcome.__context__ is None
                assert not reaches(outcome, TOKEN), repr(outcome)
                assert str(outcome).isprintable()

    async def each(data: bytes) -> None:
        async with _raw([data]) as url:
            await ask(url)

    with asyncio.Runner() as runner:

        @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(
            head=st.sampled_from(HEADS),
            lines=st.lists(st.sampled_from(LINES), max_size=2),
            body=st.sampled_from(BODIES),
        )
        @example(head=HEADS[7], lines=[f"Retry-After: {OVERFLOW}"], body="")
        def law(head: str, lines: list[str], body: str) -> None:
            text = "\r\n".join([head, "Connection: close", *lines, "", body])
            runner.run(each(text.encode("utf-8")))

        law()


@given(wait=st.text(max_size=60), date=st.text(max_size=60))
@example(wait=OVERFLOW, date=OVERFLOW)
@example(wait=OVERFLOW, date="Mon, 01 Jan 2024 00:00:00 GMT")
def test_any_retry_after_is_a_number_or_nothing(wait: str, date: str) -> None:
    """What the SDK waits for is finite, whatever the header says."""
    seconds = retry_after_seconds({"retry-after": wait, "date": date})
    assert seconds is None or 0 <= seconds <= 366 * 86400


@pytest.mark.parametrize("wait", [OVERFLOW, BIG, "Fri, 31 Dec 9999 23:59:59 -2359"])
@pytest.mark.parametrize("where", ["stream", "snapshot"])
async def test_an_odd_answer_once_does_not_end_the_syncing(
    wait: str, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a 503 with an odd Retry-After the SDK is live again, and no log leads to the token."""

    async def script(peer: Peer) -> None:
        await peer.subscribed(1)
        await peer.live(1)

    refused: list[str] = []
    right = ScriptedSLM.snapshot

    def refusal() -> web.Response:
        refused.append(where)
        return web.Response(status=503, headers={"Retry-After": wait, "Date": OVERFLOW})

    async def snapshot(self: ScriptedSLM, request: web.Request) -> web.Response:
        return await right(self, request) if refused else refusal()

    if where == "snapshot":
        monkeypatch.setattr(ScriptedSLM, "snapshot", snapshot)
    async with scripted_slm(agents=AGENTS, scripts=[script]) as slm:
        if where == "stream":
            slm.refuse = lambda _: None if refused else refusal()
        async with SLMClient(slm.url, token=TOKEN, timings=QUICK) as client:
            await eventually(lambda: is_live(client))
            assert (await client.resolve("default")).llm_model == "d"
    assert refused == [where]
    for record in caplog.records:
        assert TOKEN not in record.getMessage()
        assert record.exc_info is None or not reaches(record.exc_info[1] or SLMError(), TOKEN)


async def test_an_answer_too_large_is_not_read_to_its_end() -> None:
    """A megabyte, unpacked, is the most that an answer about one agent may have."""
    bomb = gzip.compress(b" " * (64 * 1024 * 1024))

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    async with answering(handler) as url, connection(url) as opened:
        for asked in (
            opened.get_llm("a", min_revision=0, epoch=None),
            opened.get_default(epoch=None),
        ):
            with pytest.raises(SLMUnavailable, match="larger than 1048576 bytes") as caught:
                await asked
            assert not reaches(caught.value, TOKEN)


async def test_a_snapshot_too_large_leaves_the_sdk_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client keeps what it has, says why, and asks again."""
    monkeypatch.setattr(http, "MAX_SNAPSHOT_BYTES", 100)

    async def script(peer: Peer) -> None:
        await peer.subscribed(1)
        await peer.live(1)

    async with (
        scripted_slm(agents=AGENTS, scripts=[script]) as slm,
        SLMClient(slm.url, token=TOKEN, timings=QUICK, start_timeout=0.1) as client,
    ):
        await eventually(lambda: "larger than 100 bytes" in str(client.last_error))
        monkeypatch.undo()
        await eventually(lambda: is_live(client))


def test_what_a_server_repeats_of_the_token_is_hidden() -> None:
    """A problem's words are logged, so the token is taken out of them."""
    body = f'{{"code": "unavailable", "detail": "no: Bearer {TOKEN.upper()} or {TOKEN[:12]}"}}'
    place = AskedServer("https://slm.example", None)
    problem = answers.problem(
        503, {}, body.encode(), TokenSource(TOKEN).repeated, place, "/api/snapshot"
    )
    assert isinstance(problem, Unavailable)
    assert str(problem) == "no: Bearer *** or ***"


async def test_what_a_stream_says_is_one_short_line_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A long code or reason with line breaks, escapes or the token is cut and cleaned."""
    odd = f"\n\x1b[2Jforged {TOKEN} {'x' * 30_000}"

    async def refusing(peer: Peer) -> None:
        await peer.say({"type": "error", "code": odd, "detail": odd})

    async def script(peer: Peer) -> None:
        await peer.subscribed(1)
        await peer.say({"type": "error", "code": odd, "detail": odd})
        await peer.say({"type": "resync", "revision": 1, "epoch": EPOCH, "reason": odd})
        await peer.live(1)

    caplog.set_level(logging.DEBUG, logger="slm.client")
    async with (
        scripted_slm(agents=AGENTS, scripts=[refusing, script]) as slm,
        SLMClient(slm.url, token=TOKEN, timings=QUICK) as client,
    ):
        await eventually(lambda: is_live(client) and "asks for a resync" in caplog.text)
    told = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert len(told) == 3
    for line in told:
        assert len(line) < 500
        assert line.isprintable()
        assert TOKEN not in line


class _Anything(AgentConfigCache):
    """A cache in a state that it never should have."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def find(self, agent_id: str) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    "found",
    [OverflowError("x"), RecursionError(), object(), 5],
    ids=lambda found: type(found).__name__,
)
def test_explaining_raises_nothing(found: Any) -> None:
    """Whatever is in the cache, each step is explained, or said not to be explainable."""
    steps = explain_steps(_Anything(found), "a", None, "x" * 10_000)
    assert [step.step for step in steps] == ["agent", "default", "environment", "hardcoded"]
    assert "cannot be explained" in steps[0].said
    assert all(isinstance(step, ExplainedStep) for step in steps)


async def test_a_question_that_cannot_be_answered_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Questions with ids beyond the contract, and thousands at once, leave the stream as it is."""
    caplog.set_level(logging.WARNING)

    async def script(peer: Peer) -> None:
        await peer.subscribed(1)
        question = {"type": "explain", "agent_id": "a" * 20_000}
        await peer.say(question | {"id": "i" * 5000}, *([question | {"id": "i"}] * 2000))
        await peer.live(1)

    async with (
        scripted_slm(agents=AGENTS, scripts=[script]) as slm,
        backend(slm.url, TOKEN) as client,
    ):
        await eventually(lambda: is_live(client))
        await eventually(
            lambda: (sync := client._follower.sync) is not None and sync._questions.under_way == 0
        )
        assert is_live(client)
        assert len(slm.handshakes) == 1
        for odd in ("a" * 20_000, "a\x00\ud800", ""):
            explained = await client.explain(odd)
            assert explained.answered_by == "default"
            assert explained.model_dump_json()
    assert [r for r in caplog.records if "a task of the client failed" in r.message] == []
