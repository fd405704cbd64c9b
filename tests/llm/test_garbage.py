"""Whatever a provider answers, a call ends in an answer or in an error of ours, without the key."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm.common.retries import retry_after_seconds
from slm.errors import LLMBadResponse, LLMError, LLMTimeout, SLMError
from slm.llm import ChatResult, LLMInterface, RetrySettings
from tests.llm.conftest import Bench, ask
from tests.support.llm.providers import CANARY, Answer, Configs, Dialect, Received, RecordingServer
from tests.support.llm.reach import reaches

ONCE = RetrySettings(max_retries=0)
TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
BIG = "9" * 5000
# Stand for text that json.dumps does not write.
DEEP, HUGE, HALF = "@deep@", "@huge@", "@half@"
ODD: list[Any] = [
    *(None, True, -1, 0, 5, 2**63, 10**400, 1.5, 1e308, "", "\u00b2", "x", "9" * 400, CANARY),
    *([], {}, [[]], [5], {"a": 1}, [None], {"message": CANARY}, DEEP, HUGE, HALF, "NaN"),
]
HEADERS = [
    *("retry-after: 9" + "9" * 400, "retry-after: Mon, 01 Jan 2024 00:00:00 +99999999999999999999"),
    *("retry-after: nan", "retry-after: -inf", "retry-after-ms: 1e400", "retry-after: \u00b2"),
    *("retry-after: Fri, 31 Dec 9999 23:59:59 -0000", "retry-after: Mon, 1 Jan 1 0:0:0 +2400"),
    *(
        "content-encoding: gzip",
        "content-encoding: zstd, br",
        "content-length: -5",
        "x: \u00e9\x01",
    ),
    *(
        "content-length: 99999999999999999999",
        "transfer-encoding: chunked",
        "set-cookie: a=b",
        ": x",
    ),
    *(
        "location: http://127.0.0.1:1/",
        "content-type: text/html; charset=\u00e9",
        "no colon",
        ": x",
    ),
    *("content-type: application/json; charset=utf-7", f"x-echo: Bearer {CANARY}", "x: " + BIG * 2),
]
STATUSES = f"200 429 400 503 302 000 999 204 101 -1 \u00b2 {BIG}"
STATUS_LINES = [
    *(f"HTTP/1.1 {status} x".encode() for status in STATUSES.split(" ")),
    *(b"HTTP/1.1 200", b"HTTP/9.9 200 OK", b"\x00\xff", b"", b"SSH-2.0-x"),
]


def _text(value: Any) -> str:
    text = json.dumps(value)
    for name, stands_for in {DEEP: "[" * 50_000, HUGE: BIG, HALF: '"\\ud800"'}.items():
        text = text.replace(f'"{name}"', stands_for)
    return text


def _places(value: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [so_far]
    items: Any = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for name, child in items:
        found += _places(child, (*so_far, name))
    return found


def _changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    if not place:
        return to
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _changed(value[place[0]], place[1:], to)
    return copy


@st.composite
def _pieces(draw: st.DrawFn, dialect: Dialect, streamed: bool) -> list[bytes]:
    """Return an answer, in pieces, in which one or two members are something else."""
    if not streamed:
        whole = [dialect.answer(), dialect.answer(tool=("w", {"a": 1})), dialect.error("no")]
        lines = [draw(st.sampled_from(whole))]
    else:
        lines = [*dialect.opening(), dialect.token("x"), *dialect.tool_pieces("w", '{"a": 1}')]
        lines += [*dialect.closing(), dialect.error_in_stream(f"no {CANARY}")]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        before, brace, data = lines[at].partition(b"{")
        try:
            value = json.loads(brace + data)
        except (ValueError, RecursionError):
            continue
        place = draw(st.sampled_from(_places(value)))
        text = _text(_changed(value, place, draw(st.sampled_from(ODD))))
        end = b"\n\n" if before else b"\n"
        lines[at] = before + text.encode() + end
    return lines


@st.composite
def _answers(draw: st.DrawFn, dialect: Dialect, streamed: bool) -> bytes:
    """Return everything that a provider sends, from the status line on."""
    status = draw(st.one_of(st.just(STATUS_LINES[0]), st.sampled_from(STATUS_LINES)))
    kind = dialect.stream_type if streamed else "application/json"
    headers = [f"content-type: {kind}", "connection: close"]
    headers += draw(st.lists(st.sampled_from(HEADERS), max_size=1))
    body = draw(
        st.one_of(
            _pieces(dialect, streamed).map(b"".join),
            _pieces(dialect, streamed).map(b"".join),
            st.binary(max_size=40),
            st.sampled_from([b"", b"[" * 100_000, b'{"a":' * 50_000, BIG.encode(), b"\xff\xfe{"]),
        )
    )
    head = status + b"\r\n" + "\r\n".join(headers).encode("latin-1", "replace")
    return head + b"\r\n\r\n" + body


async def _outcome(llm: LLMInterface, streamed: bool) -> ChatResult | SLMError:
    try:
        return await ask(llm, streamed=streamed, tools=[TOOL], timeout=5)
    except SLMError as error:
        return error


def _judge(outcome: ChatResult | SLMError) -> None:
    if isinstance(outcome, ChatResult):
        assert all(isinstance(t, str) for t in (outcome.text, outcome.reasoning, repr(outcome)))
        assert isinstance(outcome.finish_reason, str)
        assert json.dumps(outcome.as_message())
        return
    assert isinstance(outcome, LLMError)
    assert not isinstance(outcome, LLMTimeout)
    assert outcome.__cause__ is outcome.__context__ is None
    assert not reaches(outcome, CANARY), outcome
    assert str(outcome).isprintable()


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
def test_no_answer_makes_anything_else(dialect: Dialect, streamed: bool) -> None:
    """Odd status lines, headers, members, numbers and depths: an answer, or an error of ours."""
    sent = b""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.send(sent)

    async def live(data: bytes) -> ChatResult | SLMError:
        nonlocal sent
        sent = data
        return await _outcome(llm, streamed)

    with asyncio.Runner() as runner:
        server = RecordingServer(handler)
        running = server.running()
        runner.run(_enter(running))
        llm = LLMInterface(Configs(dialect.config(server.url)), retry=ONCE)

        @settings(max_examples=40, deadline=None)
        @given(data=_answers(dialect, streamed))
        def law(data: bytes) -> None:
            _judge(runner.run(live(data)))

        law()
        runner.run(llm.close())
        runner.run(_leave(running))


async def _enter(context: Any) -> None:
    await context.__aenter__()


async def _leave(context: Any) -> None:
    await context.__aexit__(None, None, None)


async def test_an_adapter_that_fails_to_explain_is_no_way_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should reading an exception fail, the call ends in an error of ours all the same."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.whole(b"no", status=500)

    def explain(self: Any, error: Exception) -> Any:
        raise OverflowError(f"while reading {error!r}") from error

    bench.server.handler = handler
    await _outcome(bench.llm, False)
    provider = bench.llm._providers[bench.dialect.provider]
    monkeypatch.setattr(type(provider), "explain", explain)
    for streamed in (False, True):
        outcome = await _outcome(bench.llm, streamed)
        assert type(outcome) is LLMBadResponse
        _judge(outcome)


async def test_a_cancelled_call_leads_to_no_key(bench: Bench) -> None:
    """A caller's own time-out or cancellation carries no frame of an SDK, nor its variables."""
    for streamed in (False, True):
        asked = asyncio.Event()

        async def silence(request: Received, answer: Answer, asked: Any = asked) -> None:
            asked.set()
            await asyncio.Event().wait()

        bench.server.handler = silence
        task = asyncio.ensure_future(ask(bench.llm, streamed=streamed))
        await asyncio.wait_for(asked.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        where = set()
        entry = caught.value.__traceback__
        while entry is not None:
            where.add(entry.tb_frame.f_globals["__name__"].split(".")[0])
            entry = entry.tb_next
        assert not [
            name for name in where if name.split(".")[0] not in ("slm", "tests", "contextlib")
        ]
        assert caught.value.__context__ is None
        assert not reaches(caught.value, CANARY)


async def test_what_a_broken_stream_repeats_is_hidden(bench: Bench) -> None:
    """The key is not in the text that a stream gave before it broke, either."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin_until_close(bench.dialect.stream_type)
        for piece in [*bench.dialect.opening(), bench.dialect.token(f"your key is {CANARY}, yes")]:
            await answer.send(piece)

    bench.server.handler = handler
    outcome = await _outcome(bench.llm, True)
    assert getattr(outcome, "partial", "") == "your key is ***, yes"
    assert not isinstance(outcome, ChatResult)
    _judge(outcome)


@example(text="Mon, 01 Jan 2024 00:00:00 +99999999999999999999", name="retry-after")
@example(text="Mon, 01 Jan 99999999999999999999 00:00:00 GMT", name="retry-after")
@example(text=BIG, name="retry-after")
@example(text="nan", name="retry-after-ms")
@given(text=st.text(max_size=60), name=st.sampled_from(["retry-after", "retry-after-ms"]))
def test_any_wait_is_a_number_that_makes_sense(text: str, name: str) -> None:
    """A wait is None, or between nothing and a year."""
    wait = retry_after_seconds({name: text})
    assert wait is None or 0 <= wait <= 366 * 86400
