"""Streams as they are on the wire: what is missing, what is odd, how they end, how they break."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.errors import LLMBadResponse, LLMError, LLMStreamBroken
from slm.llm import ChatResult, TransportSettings
from slm.llm.providers.anthropic_answer import AnthropicParser
from slm.llm.providers.ollama import OllamaParser
from slm.llm.providers.openai import OpenAIParser
from slm.llm.providers.wire import Body, Done, StreamReader
from tests.support.llm.providers import DIALECTS, Answer, Dialect, Received
from tests.support.llm.talking import (
    Talk,
    block,
    chunk,
    event,
    message,
    says,
    sse,
    streams,
    talking,
)

HELLO = [chunk({"content": "Hel"}), chunk({"content": "lo"})]
STOP = chunk({}, "stop")
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}

OPENAI: dict[str, list[Any]] = {
    "delta null at the end": [*HELLO, chunk(None, "stop")],
    "no delta in the middle": [HELLO[0], chunk(content_filter_offsets={}), HELLO[1], STOP],
    "no choices first": [{"choices": [], "prompt_filter_results": []}, *HELLO, STOP],
    "choices null": [{"choices": None}, *HELLO, STOP],
    "a choice null": [{"choices": [None]}, *HELLO, STOP],
    "nothing but choices": [{"choices": c["choices"]} for c in [*HELLO, STOP]],
    "comments and other fields": [": ping\n\n", "retry: 100\n\n", "id: 1\n", *HELLO, ":\n\n", STOP],
    "empty data": ["data:\n\n", "data: \n\n", HELLO[0], "data: null\n\n", HELLO[1], STOP],
    "words of a ping": [HELLO[0], "data: ping\n\n", "event: ping\ndata: {}\n\n", HELLO[1], STOP],
    "no blank after the colon": [f"data:{json.dumps(c)}\n\n" for c in [*HELLO, STOP]],
    "CRLF": [f"data: {json.dumps(c)}\r\n\r\n" for c in [*HELLO, STOP]],
    "CR": [f"data: {json.dumps(c)}\r\r" for c in [*HELLO, STOP]],
    "no blank lines": [f"data: {json.dumps(c)}\n" for c in [*HELLO, STOP]],
    "data in several lines": [
        "".join(f"data: {line}\n" for line in json.dumps(c, indent=1).split("\n")) + "\n"
        for c in [*HELLO, STOP]
    ],
    "no newline at the end": [*HELLO, f"data: {json.dumps(STOP)}"],
    "a byte order mark": ["\ufeff", *HELLO, STOP],
    "finish reason empty until the end": [chunk(c["choices"][0]["delta"], "") for c in HELLO]
    + [STOP],
    "the whole message at the end": [
        {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}
    ],
    "U+2028 and U+0085": [chunk({"content": "Hel\u2028"}), chunk({"content": "\u0085lo"}), STOP],
}


@pytest.mark.parametrize("kind", OPENAI)
@pytest.mark.parametrize("done", [False, True], ids=["end", "DONE"])
async def test_odd_but_whole_streams_are_answers(kind: str, done: bool) -> None:
    """Whatever a compatible server leaves out or adds, the answer is the answer."""
    data = sse(*OPENAI[kind], "\n\n" if done else "", done=done)
    async with talking("openai", streams(data)) as talk:
        result = await talk.ask(streamed=True)
        assert result.text.replace("\u2028", "").replace("\u0085", "") == "Hello"
        assert result.finish_reason == "stop"
        assert len(talk.bodies) == 1


@pytest.mark.parametrize("finish", [..., None, ""])
async def test_done_without_a_finish_reason_is_whole_and_a_cut_is_not(finish: Any) -> None:
    """[DONE] is the protocol's own end mark; without it and without a reason the stream was cut."""
    bare = [chunk({"content": "Hel"}, finish), chunk({"content": "lo"}, finish)]
    for each in bare:
        if finish is ...:
            del each["choices"][0]["finish_reason"]
    async with talking("openai", streams(sse(*bare, done=True))) as talk:
        result = await talk.ask(streamed=True)
        assert (result.text, result.finish_reason) == ("Hello", "stop")
    async with talking("openai", streams(sse(*bare))) as talk:
        error = await talk.fails(streamed=True)
        assert isinstance(error, LLMStreamBroken)
        assert error.partial == "Hello"
    async with talking("openai", streams(sse(done=True))) as talk:
        assert isinstance(await talk.fails(streamed=True), LLMError)


@pytest.mark.parametrize(
    "place", ["last", "alone", "each", "choice", "groq", "nulls", "none", "{}"]
)
async def test_usage_in_odd_places(place: str) -> None:
    """The tokens are counted wherever a server says them, and unknown where it does not."""
    parts: dict[str, list[Any]] = {
        "last": [*HELLO, STOP | {"usage": USAGE}],
        "alone": [*HELLO, STOP, {"choices": [], "usage": USAGE}],
        "each": [*(c | {"usage": {"prompt_tokens": 3}} for c in HELLO), STOP | {"usage": USAGE}],
        "choice": [*HELLO, {"choices": [STOP["choices"][0] | {"usage": USAGE}]}],
        "groq": [*HELLO, STOP | {"x_groq": {"usage": USAGE}}],
        "nulls": [*HELLO, STOP | {"usage": {"prompt_tokens": None, "completion_tokens": 2}}],
        "none": [*HELLO, STOP | {"usage": None}],
        "{}": [*HELLO, STOP | {"usage": {}}],
    }
    async with talking("openai", streams(sse(*parts[place], done=True))) as talk:
        usage = (await talk.ask(streamed=True)).usage
    if place in ("none", "{}"):
        assert usage is None
    else:
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens) == (0 if place == "nulls" else 3, 2)


START = event("message_start", message={"usage": {"input_tokens": 3, "output_tokens": 1}})
HELLO_DELTA = {"type": "text_delta", "text": "Hello"}
TEXT = block(0, "text", HELLO_DELTA, text="")
STOPPED = {"stop_reason": "end_turn"}
END = event("message_delta", delta=STOPPED, usage={"output_tokens": 5})
LAST = event("message_stop")

ANTHROPIC: dict[str, tuple[list[Any], Any]] = {
    "plain": ([START, TEXT, END, LAST], (3, 5)),
    "no usage at the end": (
        [START, TEXT, event("message_delta", delta=STOPPED), LAST],
        (3, 1),
    ),
    "usage null": ([START, TEXT, END.replace('{"output_tokens": 5}', "null"), LAST], (3, 1)),
    "no usage at all": (
        [event("message_start", message={}), TEXT, event("message_delta", delta=STOPPED)],
        None,
    ),
    "message null": ([event("message_start", message=None), TEXT, END, LAST], (0, 5)),
    "no message_start": ([TEXT, END, LAST], (0, 5)),
    "no block start": (
        [START, event("content_block_delta", index=0, delta=HELLO_DELTA), END],
        (3, 5),
    ),
    "no index": (
        [START, TEXT.replace('"index": 0, ', ""), END, LAST],
        (3, 5),
    ),
    "text where the block begins": ([START, block(0, "text", text="Hello"), END, LAST], (3, 5)),
    "no message_delta": ([START, TEXT, LAST], None),
    "delta null": ([START, TEXT, event("message_delta", delta=None), LAST], (3, 1)),
    "unknown events": ([START, event("ping"), event("new", x=1), TEXT, END, LAST], (3, 5)),
    "unknown deltas": (
        [START, TEXT, block(1, "new_block", {"type": "new_delta", "x": 1}), END, LAST],
        (3, 5),
    ),
    "no event lines": (
        ["".join(line for line in part.splitlines(True) if not line.startswith("event:"))
         for part in (START, TEXT, END, LAST)],
        (3, 5),
    ),
    "no type in the last": ([START, TEXT, "event: message_stop\ndata: {}\n\n"], None),
    "the prompt counted at the end": (
        [START, TEXT, event("message_delta", delta=STOPPED,
                            usage={"input_tokens": 100, "output_tokens": 7}), LAST],
        (100, 7),
    ),
    "the whole message as one event": (
        [message({"type": "text", "text": "Hello"})],
        (1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANTHROPIC)
async def test_odd_streams_of_anthropics_protocol(kind: str) -> None:
    """Members that MiniMax, proxies and others leave out cost no answer."""
    parts, counted = ANTHROPIC[kind]
    async with talking("anthropic", streams(sse(*parts))) as talk:
        result = await talk.ask(streamed=True)
    assert (result.text, result.finish_reason) == ("Hello", "stop")
    if counted is not None:
        assert result.usage is not None
        assert (result.usage.input_tokens, result.usage.output_tokens) == counted


@pytest.mark.parametrize(
    "data",
    [
        '{"message": {"content": "Hel"}}\n\n\n{"message": {"content": "lo"}}\n{"done": true}',
        '{"message": {"content": "Hel\\u2028"}}\r\n{"message": {"content": "lo"}, "done": 1}\r\n',
        '{"message": {"content": "Hel\u2028\u0085lo"}}\n{"message": null, "done": true}\n',
        '{"message": {"content": "Hello", "thinking": null, "tool_calls": null}}\n{"done": true}\n',
        'data: {"message": {"content": "Hello"}}\n\ndata: {"done": true}\n\n',
        '{"model": "m", "message": {"content": "Hello"}, "done": true, "done_reason": null}',
        '{"message": {"content": "Hello"}, "done": true}\n{"message": {"content": " no"}}\n',
    ],
)
async def test_lines_of_json(data: str) -> None:
    """Lines end at a newline alone; blank ones, and a last one without message, are fine."""
    for kind in ("application/x-ndjson", "text/plain"):
        async with talking("ollama", streams(data.encode(), kind=kind)) as talk:
            result = await talk.ask(streamed=True)
            assert "".join(c for c in result.text if c.isalpha()) == "Hello"
            assert result.finish_reason == "stop"


@pytest.mark.parametrize("after", ["finish", "DONE", "usage"])
async def test_a_connection_left_open_delays_nothing(dialect: Dialect, after: str) -> None:
    """Once the provider said that it is finished, nobody waits for a connection to close."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin(dialect.stream_type)
        closing = dialect.closing()
        pieces = [*dialect.opening(), dialect.token("Hello"), *closing]
        if after == "finish" and dialect.provider != "ollama":
            pieces = pieces[: -2 if dialect.provider == "openai" else -1]
        for piece in pieces:
            await answer.piece(piece)
        await asyncio.Event().wait()

    async with talking(dialect.provider, handler) as talk:
        began = time.monotonic()
        assert (await talk.ask(streamed=True)).text == "Hello"
        assert time.monotonic() - began < 2


async def test_a_stream_read_to_its_end_keeps_its_connection(dialect: Dialect) -> None:
    """Streams that end properly share one connection, as whole answers do."""
    from tests.support.llm.providers import answering

    async with talking(dialect.provider, answering(dialect)) as talk:
        for _ in range(3):
            await talk.ask(streamed=True)
        assert talk.server.connections == 1


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "text/plain", ""])
async def test_a_whole_answer_in_place_of_a_stream_is_taken(dialect: Dialect, kind: str) -> None:
    """A server that cannot stream answers whole: read as what it is, asked and paid for once."""
    data = json.dumps(json.loads(dialect.answer("Hello")), indent=1).encode()
    if dialect.provider == "ollama":
        data = dialect.answer("Hello")
    async with talking(dialect.provider, says(data, kind=kind)) as talk:
        result = await talk.ask(streamed=True)
        assert result.text == "Hello"
        assert result.usage is not None
        assert len(talk.bodies) == 1


async def test_a_stream_in_place_of_a_whole_answer_is_taken(dialect: Dialect) -> None:
    """A server that always streams is understood, too."""
    pieces = [*dialect.opening(), dialect.token("Hel"), dialect.token("lo"), *dialect.closing()]
    async with talking(
        dialect.provider, streams(b"".join(pieces), kind="application/json")
    ) as talk:
        result = await talk.ask()
        assert (result.text, result.usage and result.usage.output_tokens) == ("Hello", 7)


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ("<html><title>Sign in</title><body>Portal</body></html>", "text/html", "Sign in"),
        ("Bad gateway configuration", "text/plain", "Bad gateway configuration"),
        ('{"status": "ok"}', "application/json", "protocol"),
        ('"hello"', "application/json", "protocol"),
        ("[]", "application/json", "protocol"),
    ],
)
async def test_a_body_that_is_no_answer_is_quoted_and_bought_once(
    dialect: Dialect, data: str, kind: str, words: str, streamed: bool
) -> None:
    """A portal's HTML or a proxy's text with status 200 is told, with the path that was asked."""
    async with talking(dialect.provider, says(data, kind=kind)) as talk:
        error = await talk.fails(streamed=streamed)
        assert isinstance(error, LLMBadResponse | LLMStreamBroken)
        assert words in str(error)
        assert len(talk.bodies) == 1


async def test_an_answer_has_a_bound(dialect: Dialect) -> None:
    """What a provider sends is read up to a limit, counted after it is unpacked."""
    import gzip

    small = TransportSettings(max_answer_bytes=100_000)
    bomb = gzip.compress(b" " * 50_000_000)
    endless = b"".join(dialect.token("x" * 1000) for _ in range(200))
    handlers = [
        says(b" " * 200_000),
        says(bomb, content_encoding="gzip"),
        streams(endless, kind=dialect.stream_type),
    ]
    for handler in handlers:
        async with talking(dialect.provider, handler, transport=small) as talk:
            for streamed in (False, True):
                error = await talk.fails(streamed=streamed)
                assert "larger than 100000 bytes" in str(error)
            assert len(talk.bodies) == 2


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_answer_is_read(dialect: Dialect, encoding: str) -> None:
    """A proxy that compresses unasked is understood; one that lies about it is told."""
    import gzip
    import zlib

    packed = (gzip.compress if encoding == "gzip" else zlib.compress)(dialect.answer("Hello"))
    async with talking(dialect.provider, says(packed, content_encoding=encoding)) as talk:
        assert (await talk.ask()).text == "Hello"
    async with talking(dialect.provider, says(b"plain", content_encoding=encoding)) as talk:
        assert "not compressed as it says" in str(await talk.fails())
    async with talking(dialect.provider, says(packed, content_encoding="br")) as talk:
        assert "not asked for" in str(await talk.fails())


# --- laws ---


def _read(dialect: Dialect, pieces: list[bytes]) -> Any:
    parsers = {"openai": OpenAIParser, "anthropic": AnthropicParser, "ollama": OllamaParser}
    reader = StreamReader(dialect.stream_type, lines=dialect.provider == "ollama")
    parser = parsers[dialect.provider]()
    for piece in [*pieces, None]:
        for item in reader.end() if piece is None else reader.feed(piece):
            if isinstance(item, Done):
                parser.done = True
            elif not isinstance(item, Body):
                parser.take(item)
    last = parser.end()
    assert last is not None
    return parser.text, parser.reasoning, last.end, parser.finish_reason


@pytest.mark.parametrize("each", DIALECTS, ids=repr)
def test_any_cutting_into_pieces_gives_the_same(each: Dialect) -> None:
    """Law: where the network cuts a stream changes nothing of the answer."""
    text = "H\u00e9\u2028llo \U0001f600\u0085\n"
    parts = [*each.opening(), each.token(text), *each.tool_pieces("w", '{"a": "\u00e9"}')]
    data = b"".join([*parts, *each.closing(tool=True)])
    wanted = _read(each, [data])
    assert wanted[0] == text

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, len(data)), max_size=12), st.booleans())
    def law(cuts: list[int], crlf: bool) -> None:
        whole = data.replace(b"\n", b"\r\n") if crlf and each.provider != "ollama" else data
        at = sorted(cuts)
        pieces = [whole[a:b] for a, b in zip([0, *at], [*at, len(whole)], strict=True)]
        assert _read(each, pieces) == wanted

    law()
    assert _read(each, [data[n : n + 1] for n in range(len(data))]) == wanted


def _places(value: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = value.items() if isinstance(value, dict) else ()
    items = list(enumerate(value)) if isinstance(value, list) else items
    return [so_far, *(p for name, child in items for p in _places(child, (*so_far, name)))]


def _without(value: Any, place: tuple[Any, ...], null: bool) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(place) > 1:
        copy[place[0]] = _without(copy[place[0]], place[1:], null)
    elif null:
        copy[place[0]] = None
    else:
        del copy[place[0]]
    return copy


async def _outcome(talk: Talk, streamed: bool) -> ChatResult | LLMError:
    try:
        return await talk.ask(streamed=streamed, timeout=5)
    except LLMError as error:
        return error


@pytest.mark.parametrize("each", DIALECTS, ids=repr)
def test_any_member_may_be_missing_or_null(each: Dialect) -> None:
    """Law: take any member away from any event, or make it null: an answer, or an error of ours."""
    tool = each.tool_pieces("w", '{"a": 1}')
    lines = [*each.opening(), each.token("x"), *tool, *each.closing(tool=True)]
    whole = json.loads(each.answer("x", tool=("w", {"a": 1})))
    variants = []
    for at, line in enumerate(lines):
        before, brace, data = line.partition(b"{")
        if not brace:
            continue
        value = json.loads(brace + data)
        end = b"\n\n" if before else b"\n"
        for place in _places(value)[1:]:
            for null in (False, True):
                changed = before + json.dumps(_without(value, place, null)).encode() + end
                variants.append([*lines[:at], changed, *lines[at + 1 :]])
    bodies = [
        json.dumps(_without(whole, place, null)).encode()
        for place in _places(whole)[1:]
        for null in (False, True)
    ]
    sent: list[bytes] = []

    async def handler(request: Received, answer: Answer) -> None:
        await answer.whole(sent[0], content_type=each.stream_type)
        answer.keep_alive = True

    async def all_of_them() -> None:
        async with talking(each.provider, handler) as talk:
            for streamed, everything in ((True, [b"".join(v) for v in variants]), (False, bodies)):
                for data in everything:
                    sent[:] = [data]
                    outcome = await _outcome(talk, streamed)
                    if isinstance(outcome, LLMError):
                        assert outcome.code not in ("llm-error", "llm-timeout"), data
                        continue
                    for used in outcome.tool_calls:
                        assert used.name == "w", data
                        # A piece that is missing leaves no JSON, which the caller is told.
                        with contextlib.suppress(ValueError):
                            assert used.arguments in ({"a": 1}, {"a": None}, {}), data

    asyncio.run(all_of_them())
