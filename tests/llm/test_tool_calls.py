"""A tool call is the right one or an error: never glued to another, never without its arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.errors import LLMError
from slm.llm.providers.tool_calls import MAX_CALLS, ToolCalls
from tests.support.llm.talking import (
    WEATHER,
    block,
    call,
    chunk,
    completion,
    either,
    event,
    message,
    says,
    sse,
    streams,
    talking,
)

OSLO, ROME, UTC = '{"city": "Oslo"}', '{"city": "Rome"}', '{"tz": "UTC"}'
TWO = [("weather", OSLO), ("time", UTC)]
SAME = [("weather", OSLO), ("weather", ROME)]

PIECES: dict[str, tuple[list[tuple[str, str]], list[list[Any]]]] = {
    "one index, two ids, two chunks": (
        TWO,
        [[call("a", *TWO[0], 0)], [call("b", *TWO[1], 0)]],
    ),
    "one index, two ids, one chunk": (TWO, [[call("a", *TWO[0], 0), call("b", *TWO[1], 0)]]),
    "the same tool twice": (SAME, [[call("a", *SAME[0], 0)], [call("b", *SAME[1], 0)]]),
    "the same tool twice, without ids": (
        SAME,
        [[call(index=0, name="weather", arguments=OSLO)], [call("", "weather", ROME, 0)]],
    ),
    "no index": (TWO, [[call("a", *TWO[0])], [call("b", *TWO[1])]]),
    "no index, in pieces": (
        TWO,
        [
            [call("a", "weather", "")],
            [call(arguments=OSLO[:5])],
            [call(arguments=OSLO[5:])],
            [call("b", "time", UTC[:3])],
            [call(arguments=UTC[3:])],
        ],
    ),
    "null index, null id": (
        TWO,
        [[call(None, *TWO[0], None)], [call(None, *TWO[1], None)]],
    ),
    "the id in every piece": (
        [TWO[0]],
        [
            [call("a", "weather", "", 0)],
            [call("a", "weather", OSLO[:4], 0)],
            [call("a", ..., OSLO[4:], 0)],
        ],
    ),
    "the id after the name": (
        [TWO[0]],
        [[call(..., "weather", "", 0)], [call("a", ..., OSLO, 0)]],
    ),
    "interleaved": (
        TWO,
        [
            [call("a", "weather", "", 0), call("b", "time", "", 1)],
            [call(index=1, arguments=UTC[:5]), call(index=0, arguments=OSLO[:5])],
            [call(index=1, arguments=UTC[5:]), call(index=0, arguments=OSLO[5:])],
        ],
    ),
    "arguments as an object": (
        TWO,
        [[call("a", "weather", {"city": "Oslo"}, 0), call("b", "time", {"tz": "UTC"}, 1)]],
    ),
    "arguments null": ([("weather", "{}")], [[call("a", "weather", None, 0)]]),
    "arguments missing": ([("weather", "{}")], [[call("a", "weather", index=0)]]),
    "said twice": ([TWO[0]], [[call("a", *TWO[0], 0)], [call("a", *TWO[0], 0)]]),
    "one id for two calls": (SAME, [[call("a", *SAME[0], 0)], [call("a", *SAME[1], 1)]]),
    "one id and one index for two calls": (
        SAME,
        [[call("a", *SAME[0], 0)], [call("a", *SAME[1], 0)]],
    ),
    "an index as text": (TWO, [[call("a", *TWO[0], "0")], [call("b", *TWO[1], "1")]]),
}


@pytest.mark.parametrize("kind", PIECES)
async def test_pieces_become_the_calls_that_were_meant(kind: str) -> None:
    """However a server cuts calls up and numbers them, each has its own name and arguments."""
    wanted, pieces = PIECES[kind]
    chunks = [chunk({"tool_calls": each}) for each in pieces]
    async with talking("openai", streams(sse(*chunks, chunk({}, "stop"), done=True))) as talk:
        result = await talk.ask(streamed=True)
    got = [(each.name, json.loads(each.arguments_json)) for each in result.tool_calls]
    assert got == [(name, json.loads(arguments)) for name, arguments in wanted]
    assert len({each.id for each in result.tool_calls}) == len(wanted)
    assert all(each.id for each in result.tool_calls)
    assert result.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "pieces",
    [
        [[call(arguments=OSLO)]],
        [[call(index=0, arguments=OSLO)]],
        [[call("a", "weather", OSLO, 0)], [call(index=0, arguments=ROME)]],
        [[call("a", "weather", OSLO, 0)], [call(index=7, arguments=ROME)]],
        [[call("a", ..., OSLO, 0)]],
        [[call("a", "weather", ["Oslo"], 0)]],
        [[call("a", "weather", 5, 0)]],
        [[call("a", "weather", OSLO, 1.5)]],
        [[call("a", ["weather"], OSLO, 0)]],
        [["weather"]],
    ],
)
async def test_what_belongs_to_no_call_is_an_error(pieces: Any) -> None:
    """Pieces without a beginning, two objects in one call and values of a wrong kind are told."""
    chunks = [chunk({"tool_calls": each}) for each in pieces]
    async with talking("openai", streams(sse(*chunks, chunk({}, "stop"), done=True))) as talk:
        assert isinstance(await talk.fails(streamed=True), LLMError)
        assert len(talk.bodies) == 1, "what was paid for is not bought again"


@st.composite
def _cut(draw: st.DrawFn) -> tuple[list[tuple[str, str, dict[str, str]]], list[Any]]:
    """Return calls, and pieces of them as some legal server would send these."""
    calls = [
        (
            f"id-{number}",
            draw(st.sampled_from(["weather", "time"])),
            {"at": draw(st.text(max_size=9))},
        )
        for number in range(draw(st.integers(1, 4)))
    ]
    one_index, repeats = draw(st.booleans()), draw(st.booleans())
    has_index = draw(st.booleans())
    pieces = []
    for number, (identity, name, arguments) in enumerate(calls):
        text = json.dumps(arguments)
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
        for at, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(text)], strict=True)):
            index = (0 if one_index else number) if has_index else ...
            first = at == 0
            pieces.append(
                call(
                    identity if first or repeats else draw(st.sampled_from([..., None, ""])),
                    name if first else draw(st.sampled_from([..., None, ""])),
                    text[begin:end] or draw(st.sampled_from(["", None, ...])),
                    index,
                )
            )
    return calls, pieces


@given(_cut())
def test_any_legal_cut_gives_the_calls(made: Any) -> None:
    """Law: with an id for each call, no way of cutting and numbering changes what is called."""
    calls, pieces = made
    found = ToolCalls()
    deltas = [found.piece(piece) for piece in pieces]
    result = [(each.id, each.name, each.arguments) for each in found.result()]
    assert result == calls
    # Who listens to the pieces comes to the same.
    heard: dict[int, str] = {}
    for delta in deltas:
        if delta is not None:
            heard[delta.index] = heard.get(delta.index, "") + delta.arguments_json
    assert [json.loads(heard[at]) for at in sorted(heard)] == [each[2] for each in calls]


@given(st.lists(st.fixed_dictionaries({}, optional={
    "index": st.one_of(st.none(), st.integers(-1, 3), st.text(max_size=2), st.booleans()),
    "id": st.one_of(st.none(), st.sampled_from(["", "a", "b"]), st.integers()),
    "extra_content": st.just({"x": 1}),
    "function": st.one_of(st.none(), st.text(max_size=1), st.fixed_dictionaries({}, optional={
        "name": st.one_of(st.none(), st.sampled_from(["", "w", "t"]), st.integers()),
        "arguments": st.one_of(st.none(), st.just({"a": 1}), st.lists(st.integers()),
                               st.sampled_from(["", "{", "}", '{"a": 1}', "x"])),
    })),
}), max_size=8))  # fmt: skip
def test_odd_pieces_make_calls_or_an_error(pieces: list[Any]) -> None:
    """Law: whatever comes, there are no two calls of one id, none without a name, none glued."""
    found = ToolCalls()
    try:
        for piece in pieces:
            found.piece(piece)
        result = found.result()
    except (TypeError, AttributeError):
        return
    assert len({each.id for each in result}) == len(result)
    assert all(each.name and "}{" not in each.arguments_json for each in result)


def test_an_answer_of_a_million_calls_ends() -> None:
    """More calls than make sense are an error, not a day's work."""
    found = ToolCalls()
    for number in range(MAX_CALLS):
        found.piece(call(f"c{number}", "w", "{}", 0))
    with pytest.raises(TypeError, match="more tool calls"):
        found.piece(call("one more", "w", "{}", 0))


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
@pytest.mark.parametrize(
    ("given_arguments", "wanted"),
    [(OSLO, {"city": "Oslo"}), (None, {}), ({"city": "Oslo"}, {"city": "Oslo"}), ("", {})],
)
@pytest.mark.parametrize("provider", ["openai", "anthropic", "ollama"])
async def test_arguments_come_as_object_text_or_nothing(
    provider: str, given_arguments: Any, wanted: Any, streamed: bool
) -> None:
    """Text where an object is due, an object where text is, null: the arguments meant."""
    if provider == "openai":
        used = call("c1", "weather", given_arguments, 0)
        handler = either(
            says(completion(None, "tool_calls", tool_calls=[used])),
            streams(sse(chunk({"tool_calls": [used]}), chunk({}, "tool_calls"))),
        )
    elif provider == "anthropic":
        use = {"type": "tool_use", "id": "c1", "name": "weather", "input": given_arguments}
        handler = either(
            says(message(use, stop="tool_use")),
            streams(
                sse(
                    block(
                        0, **{"kind": "tool_use"} | {k: v for k, v in use.items() if k != "type"}
                    ),
                    event("message_delta", delta={"stop_reason": "tool_use"}),
                    event("message_stop"),
                )
            ),
        )
    else:
        calls = [{"function": {"name": "weather", "arguments": given_arguments}}]
        part = {"message": {"role": "assistant", "content": "", "tool_calls": calls}}
        data = json.dumps(part | {"done": False}) + "\n" + json.dumps({"done": True}) + "\n"
        handler = either(says(part | {"done": True}), streams(data.encode()))
    async with talking(provider, handler) as talk:
        (used,) = (await talk.ask(streamed=streamed, tools=[WEATHER])).tool_calls
        assert (used.name, used.arguments) == ("weather", wanted)


async def test_every_call_of_ollama_has_index_0_and_no_id() -> None:
    """Ollama numbers no calls: each is one of its own, in one part or in several."""
    calls = [
        {"function": {"index": 0, "name": name, "arguments": json.loads(arguments)}}
        for name, arguments in [*TWO, *SAME]
    ]
    parts = [{"message": {"tool_calls": calls[:3]}}, {"message": {"tool_calls": calls[3:]}}]
    data = "".join(json.dumps(part) + "\n" for part in [*parts, {"done": True}])
    async with talking("ollama", streams(data.encode())) as talk:
        result = await talk.ask(streamed=True)
    assert [(c.name, c.arguments) for c in result.tool_calls] == [
        (name, json.loads(arguments)) for name, arguments in [*TWO, *SAME]
    ]
    assert [c.id for c in result.tool_calls] == ["call_0", "call_1", "call_2", "call_3"]


async def test_blocks_of_anthropic_keep_their_own_pieces() -> None:
    """Pieces of two tools and of a server's tool that come mixed stay apart."""
    piece = {"type": "input_json_delta"}
    use = {"type": "tool_use", "name": "weather", "input": {}}
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    events = [
        event("content_block_start", index=0, content_block=search),
        event("content_block_start", index=1, content_block=use | {"id": "a"}),
        event("content_block_start", index=2, content_block=use | {"id": "b"}),
        event("content_block_delta", index=2, delta=piece | {"partial_json": ROME[:5]}),
        event("content_block_delta", index=0, delta=piece | {"partial_json": '{"query": 1}'}),
        event("content_block_delta", index=1, delta=piece | {"partial_json": OSLO}),
        event("content_block_delta", index=2, delta=piece | {"partial_json": ROME[5:]}),
        event("message_delta", delta={"stop_reason": "tool_use"}),
    ]
    async with talking("anthropic", streams(sse(*events))) as talk:
        result = await talk.ask(streamed=True)
        assert [(c.id, c.arguments) for c in result.tool_calls] == [
            ("a", {"city": "Oslo"}),
            ("b", {"city": "Rome"}),
        ]
    stray = event("content_block_delta", index=9, delta=piece | {"partial_json": OSLO})
    async with talking("anthropic", streams(sse(stray, *events))) as talk:
        assert isinstance(await talk.fails(streamed=True), LLMError)


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_of_several_answers_one_is_read(streamed: bool) -> None:
    """With n above 1 the first answer is the result, and no word of another is mixed in."""

    def of(index: int, text: str, finish: Any = None) -> dict[str, Any]:
        part = {"index": index, "delta": {"content": text}, "finish_reason": finish}
        return {"choices": [part]}

    parts = [of(1, "Bon"), of(0, "Hel"), of(1, "jour", "stop"), of(0, "lo"), of(0, "", "stop")]
    choices = [
        {"index": 1, "message": {"content": "Bonjour"}, "finish_reason": "stop"},
        {"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"},
    ]
    handler = either(says({"choices": choices}), streams(sse(*parts, done=True)))
    async with talking("openai", handler, llm_options={"n": 2}) as talk:
        result = await talk.ask(streamed=streamed)
        assert (result.text, result.finish_reason) == ("Hello", "stop")
