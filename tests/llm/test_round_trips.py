"""What a provider says comes back to it word for word, and goes to nobody else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slm.llm import ChatResult
from tests.llm.conftest import ASK
from tests.support.llm.providers import Answer, Dialect, Handler, Received, RecordingServer
from tests.support.llm.talking import (
    WEATHER,
    block,
    by_body,
    call,
    chunk,
    completion,
    either,
    event,
    message,
    refusal,
    says,
    sse,
    streams,
    talking,
)

THINKING = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
TOOL_USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}
THOUGHT = {"type": "thinking", "thinking": "I need the weather", "signature": "c2ln"}
REDACTED = {"type": "redacted_thinking", "data": "b3BhcXVl"}


def answers_to(result: ChatResult) -> list[dict[str, Any]]:
    """Return the conversation with the result and the answers of its tool calls appended."""
    said = [{"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in result.tool_calls]
    return [result.message, *said]


def as_stream(body: Any) -> Handler:
    """Return Anthropic's stream of a whole answer."""
    parts = [event("message_start", message=body | {"content": [], "stop_reason": None})]
    for index, part in enumerate(body["content"]):
        if part["type"] == "thinking":
            pieces = [{"type": "thinking_delta", "thinking": c} for c in part["thinking"]]
            pieces.append({"type": "signature_delta", "signature": part["signature"]})
            parts.append(block(index, "thinking", *pieces, thinking="", signature=""))
        elif part["type"] == "tool_use":
            text = json.dumps(part["input"])
            pieces = [
                {"type": "input_json_delta", "partial_json": c} for c in ("", text[:4], text[4:])
            ]
            parts.append(
                block(index, "tool_use", *pieces, id=part["id"], name=part["name"], input={})
            )
        elif part["type"] == "text":
            parts.append(
                block(index, "text", {"type": "text_delta", "text": part["text"]}, text="")
            )
        else:
            parts.append(
                block(
                    index, **{"kind": part["type"]} | {k: v for k, v in part.items() if k != "type"}
                )
            )
    parts.append(event("message_delta", delta={"stop_reason": body["stop_reason"]}))
    return streams(sse(*parts, event("message_stop")))


def claude(body: Any) -> Handler:
    """Answer as Claude does when it thinks: refuse a turn that came back without its thoughts."""
    turns = body["messages"]
    tools = sum(1 for turn in turns if turn["content"][0]["type"] == "tool_result")
    for turn in turns:
        if turn["role"] == "assistant" and turn["content"][:2] != [THOUGHT, REDACTED]:
            return refusal("Expected `thinking` or `redacted_thinking`, but found `tool_use`.")
    if tools == 0:
        said = message(THOUGHT, REDACTED, TOOL_USE, stop="tool_use")
    elif tools == 1:
        said = message(THOUGHT, REDACTED, TOOL_USE | {"id": "t2"}, stop="tool_use")
    else:
        said = message(THOUGHT, REDACTED, {"type": "text", "text": "Sunny"})
    return either(says(said), as_stream(said))


def deepseek(body: Any) -> Handler:
    """Answer as DeepSeek does when it thinks: refuse a tool's turn without its reasoning."""
    turns = body["messages"]
    tools = sum(1 for turn in turns if turn["role"] == "tool")
    for turn in turns:
        if turn["role"] == "assistant" and not turn.get("reasoning_content"):
            return refusal("Missing `reasoning_content` field in the assistant message.")
    if tools < 2:
        use = call(f"c{tools}", "weather", '{"city": "Oslo"}', 0)
        said = {"tool_calls": [use], "reasoning_content": "I need the weather"}
    else:
        said = {"content": "Sunny", "reasoning_content": "Now I know"}
    finish = "stop" if "content" in said else "tool_calls"
    thought = {"reasoning_content": "Now I "}, {"reasoning_content": "know"}
    first = thought if "content" in said else ({"reasoning_content": "I need the weather"},)
    rest = {name: value for name, value in said.items() if name != "reasoning_content"}
    pieces = [chunk(each) for each in (*first, rest)] + [chunk({}, finish)]
    whole = completion(
        said.get("content"), finish, **{k: v for k, v in said.items() if k != "content"}
    )
    return either(says(whole), streams(sse(*pieces, done=True)))


def gemini(body: Any) -> Handler:
    """Answer as Gemini does: refuse a call that came back without its signature."""
    turns = body["messages"]
    for turn in turns:
        for each in turn.get("tool_calls") or ():
            if each.get("extra_content") != {"google": {"thought_signature": "c2ln"}}:
                return refusal("Function call is missing a thought_signature")
    tools = sum(1 for turn in turns if turn["role"] == "tool")
    if tools == 2:
        return either(
            says(completion("Sunny")), streams(sse(chunk({"content": "Sunny"}), chunk({}, "stop")))
        )
    use = call(f"c{tools}", "weather", '{"city": "Oslo"}', 0)
    use["extra_content"] = {"google": {"thought_signature": "c2ln"}}
    whole = says(completion(None, "stop", tool_calls=[use]))
    return either(whole, streams(sse(chunk({"tool_calls": [use]}), chunk({}, "stop"), done=True)))


PROVIDERS = {
    "claude": ("anthropic", claude, THINKING),
    "deepseek": ("openai", deepseek, {}),
    "gemini": ("openai", gemini, {}),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
@pytest.mark.parametrize("who", PROVIDERS)
async def test_three_turns_with_tools_and_thinking(who: str, streamed: bool) -> None:
    """Three turns with tools go through where the provider wants its own parts back."""
    provider, choose, options = PROVIDERS[who]
    async with talking(provider, by_body(choose), llm_options=options) as talk:
        messages: list[Any] = list(ASK)
        for _ in range(2):
            result = await talk.ask(messages, streamed=streamed, tools=[WEATHER])
            (used,) = result.tool_calls
            assert (used.name, used.arguments) == ("weather", {"city": "Oslo"})
            assert result.finish_reason == "tool_calls"
            # A conversation is kept as JSON between its turns.
            messages += json.loads(json.dumps(answers_to(result)))
        result = await talk.ask(messages, streamed=streamed, tools=[WEATHER])
        assert result.text == "Sunny"
        # And on: a new question in the same conversation.
        again = [*messages, result.message, {"role": "user", "content": "Thanks"}]
        assert (await talk.ask(again, streamed=streamed, tools=[WEATHER])).text == "Sunny"


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
@pytest.mark.parametrize("who", PROVIDERS)
@pytest.mark.parametrize("other", ["openai", "anthropic", "ollama"])
async def test_another_provider_gets_none_of_it(who: str, other: str, streamed: bool) -> None:
    """An agent that moves in the middle of a conversation takes the words along, no signature."""
    provider, choose, options = PROVIDERS[who]
    async with talking(provider, by_body(choose), llm_options=options) as talk:
        result = await talk.ask(streamed=streamed, tools=[WEATHER])
        dialect = Dialect(other)

        async def handler(request: Received, answer: Answer) -> None:
            await answer.whole(dialect.answer("Hi"))

        async with RecordingServer(handler).running() as server:
            # Thinking stays on: this turn began without Claude, which would refuse it.
            talk.configs.current = dialect.config(server.url, llm_options=options)
            moved = await talk.ask([*ASK, *answers_to(result)], tools=[WEATHER])
            assert moved.text == "Hi"
            sent = json.dumps(server.received[0].body["messages"])
    for secret in ("c2ln", "b3BhcXVl", "reasoning_content", "I need", "provider_parts", "thinking"):
        assert secret not in sent
    assert "weather" in sent
    if other == "anthropic":
        assert any("thinking dropped" in text for text in moved.adjusted) == bool(options)


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_magistrals_thinking_parts_are_kept(streamed: bool) -> None:
    """Mistral's reasoning is read from the parts of a content, and goes back as such parts."""
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Let me think."}]}
    text = {"type": "text", "text": "Answer"}
    pieces = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Let me "}]},
        {"type": "thinking", "thinking": [{"type": "text", "text": "think."}]},
    ]
    stream = [chunk({"content": [piece]}) for piece in pieces]
    stream += [chunk({"content": [{"type": "text", "text": "Ans"}]}), chunk({"content": "wer"})]
    handler = either(
        says(completion([thought, text])), streams(sse(*stream, chunk({}, "stop"), done=True))
    )
    async with talking("openai", handler) as talk:
        result = await talk.ask(streamed=streamed)
        assert (result.text, result.reasoning) == ("Answer", "Let me think.")
        await talk.ask([*ASK, result.message, *ASK], streamed=streamed)
        assert talk.bodies[1]["messages"][1] == {"role": "assistant", "content": [thought, text]}
        changed = result.message | {"content": "Another answer"}
        await talk.ask([*ASK, changed, *ASK], streamed=streamed)
        assert talk.bodies[2]["messages"][1]["content"] == "Another answer"


OWN_WORDS: dict[str, Any] = {
    "Groq": {"error": {"message": "property 'messages.1.reasoning_content' is unsupported"}},
    "OpenAI": {
        "error": {
            "message": "Unknown parameter: 'messages[1].reasoning_content'.",
            "param": "messages[1].reasoning_content",
        }
    },
    "Mistral": {
        "detail": [
            {
                "type": "extra_forbidden",
                "loc": ["body", "messages", 1, "assistant", "reasoning_content"],
                "msg": "Extra inputs are not permitted",
            }
        ]
    },
}


@pytest.mark.parametrize("who", OWN_WORDS)
async def test_a_server_that_refuses_its_own_words_gets_them_no_more(who: str) -> None:
    """Where a server sends reasoning and refuses to have it back, it is left out from then on."""

    def choose(body: Any) -> Handler:
        if any("reasoning_content" in turn for turn in body["messages"]):
            return says(OWN_WORDS[who], status=422 if who == "Mistral" else 400)
        used = call("c1", "weather", "{}", 0)
        return says(completion(None, "tool_calls", tool_calls=[used], reasoning_content="hm"))

    async with talking("openai", by_body(choose)) as talk:
        result = await talk.ask(tools=[WEATHER])
        for asked in (3, 4):
            again = await talk.ask([*ASK, *answers_to(result)], tools=[WEATHER])
            assert again.adjusted == ("reasoning of earlier turns dropped",)
            assert len(talk.bodies) == asked


async def test_unknown_members_pass_through_to_anthropic() -> None:
    """cache_control, strict and what comes next reach Anthropic from messages, tools and system."""
    mark = {"cache_control": {"type": "ephemeral"}}
    tool = {"type": "function", "function": WEATHER["function"] | {"strict": True}} | mark
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "A handbook", **mark}]},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi", **mark}]},
        {"role": "assistant", "content": "Yes?", "name": "x"},
        {"role": "user", "content": "Go on", **mark},
    ]
    async with talking("anthropic", says(message({"type": "text", "text": "Hi"}))) as talk:
        await talk.ask(turns, tools=[tool])
        body = talk.bodies[0]
    assert body["system"] == [
        {"type": "text", "text": "A handbook", **mark},
        {"type": "text", "text": "Be brief."},
    ]
    assert body["tools"][0]["cache_control"] == mark["cache_control"]
    assert body["tools"][0]["strict"] is True
    assert body["tools"][0]["input_schema"] == WEATHER["function"]["parameters"]
    assert body["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Hi", **mark}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]},
        {"role": "user", "content": [{"type": "text", "text": "Go on", **mark}]},
    ]


@pytest.mark.parametrize("provider", ["openai", "ollama"])
async def test_unknown_members_pass_through_elsewhere(provider: str) -> None:
    """Members that this version has never heard of are the provider's to judge."""
    tool = WEATHER | {"new": 1}
    turns = [{"role": "user", "content": "Hi", "priority": 3}]
    async with talking(provider, says({}, status=400)) as talk:
        await talk.fails(tools=[tool], messages=turns)
        assert talk.bodies[0]["tools"] == [tool]
        assert talk.bodies[0]["messages"][0]["priority"] == 3


async def test_a_tools_error_and_files_reach_anthropic() -> None:
    """is_error of a tool's answer, documents and empty parts are what Anthropic takes."""
    pdf = {"file_data": "data:application/pdf;base64,AA==", "filename": "a.pdf"}
    use = call("c1", "weather", "{}")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "file", "file": pdf}]},
        {"role": "assistant", "content": "", "tool_calls": [use]},
        {"role": "tool", "tool_call_id": "c1", "content": "no", "is_error": True},
    ]
    async with talking("anthropic", says(message({"type": "text", "text": "Hi"}))) as talk:
        await talk.ask(turns)
        sent = talk.bodies[0]["messages"]
    source = {"type": "base64", "media_type": "application/pdf", "data": "AA=="}
    assert sent[0]["content"] == [{"type": "document", "source": source, "title": "a.pdf"}]
    assert sent[2]["content"] == [
        {"type": "tool_result", "tool_use_id": "c1", "content": "no", "is_error": True}
    ]


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_a_refusal_is_text(streamed: bool) -> None:
    """What a model says when it refuses is in the text, streamed as well as whole."""
    pieces = [chunk({"refusal": None}), chunk({"refusal": "I "}), chunk({"refusal": "can't"})]
    handler = either(
        says(completion(None, refusal="I can't")), streams(sse(*pieces, chunk({}, "stop")))
    )
    async with talking("openai", handler) as talk:
        assert (await talk.ask(streamed=streamed)).text == "I can't"


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_a_servers_own_tools_go_round_with_the_turn(streamed: bool) -> None:
    """A search that ran at Anthropic is no call for the caller, and goes back with its results."""
    search = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [{"encrypted": "e"}]}
    said = message(search, found, {"type": "text", "text": "Done."})
    async with talking("anthropic", either(says(said), as_stream(said))) as talk:
        result = await talk.ask(streamed=streamed)
        assert (result.text, result.tool_calls, result.finish_reason) == ("Done.", (), "stop")
        await talk.ask([*ASK, result.message, *ASK])
        assert talk.bodies[1]["messages"][1]["content"] == said["content"]
