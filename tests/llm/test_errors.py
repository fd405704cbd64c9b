"""What a failed call becomes, and when it is tried again."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from typing import Any

import pytest
from pydantic import SecretStr

from slm.errors import (
    LLMAuthError,
    LLMBadRequest,
    LLMBadResponse,
    LLMError,
    LLMRateLimited,
    LLMUnavailable,
)
from slm.llm import LLMInterface, RetrySettings
from tests.llm.conftest import ASK, Bench, ask
from tests.support.llm.providers import (
    Answer,
    Configs,
    Dialect,
    Received,
    RecordingServer,
    answering,
    failing,
)


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [
        (400, LLMBadRequest, 1),
        (401, LLMAuthError, 1),
        (403, LLMAuthError, 1),
        (404, LLMBadRequest, 1),
        (422, LLMBadRequest, 1),
        (302, LLMBadResponse, 1),
        (408, LLMUnavailable, 3),
        (429, LLMRateLimited, 3),
        (500, LLMUnavailable, 3),
        (503, LLMUnavailable, 3),
        (529, LLMUnavailable, 3),
    ],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_a_status_has_its_error_and_its_number_of_tries(
    bench: Bench, status: int, kind: type[LLMError], tries: int, streamed: bool
) -> None:
    """Each HTTP status is one of our errors, with the facts of the config; some are tried again."""
    bench.server.handler = failing(bench.dialect, status, "that will not do")
    with pytest.raises(kind) as caught:
        await ask(bench.llm, streamed=streamed)
    error = caught.value
    assert type(error) is kind
    assert error.status == status
    assert error.provider_error
    facts = (error.agent_id, error.provider, error.model, error.step, error.revision)
    assert facts == ("a", bench.dialect.provider, "model-1", "agent", 43)
    assert f"[{bench.dialect.provider}/model-1, agent a, step agent, revision 43]" in str(error)
    assert ("never followed" if status == 302 else "that will not do") in str(error)
    assert len(bench.server.received) == tries


async def test_what_a_provider_says_is_one_line(bench: Bench) -> None:
    """Line breaks and control characters in an error text reach no log of ours."""
    said = "no\r\n2026-11-22 CRITICAL slm: all is lost\x1b[2J\u2028\x9b\x00end"
    bench.server.handler = failing(bench.dialect, 400, said)
    with pytest.raises(LLMBadRequest) as caught:
        await bench.llm.chat("a", ASK)
    assert str(caught.value).isprintable()
    assert "no 2026-11-22 CRITICAL slm: all is lost [2J end" in str(caught.value)


async def test_a_redirect_is_not_followed(bench: Bench) -> None:
    """A provider's redirect is an error; where it points gets nothing."""
    bench.server.handler = failing(bench.dialect, 307, "", location=f"{bench.server.url}/elsewhere")
    with pytest.raises(LLMBadResponse, match="never followed"):
        await bench.llm.chat("a", ASK)
    assert [request.path for request in bench.server.received] == [bench.dialect.path]


async def test_a_failure_that_passes_is_not_noticed(bench: Bench) -> None:
    """Two failures that may pass, then an answer: the caller gets the answer."""
    well = answering(bench.dialect)

    async def handler(request: Received, answer: Answer) -> None:
        number = len(bench.server.received)
        if number == 1:
            await failing(bench.dialect, 503, "busy")(request, answer)
        elif number == 2:
            answer._writer.transport.abort()
        else:
            await well(request, answer)

    bench.server.handler = handler
    assert (await bench.llm.chat("a", ASK)).text == "Hello there"
    bench.server.received.clear()
    stream = bench.llm.stream("a", ASK)
    assert "".join([chunk.text async for chunk in stream]) == "Hellothere"
    bodies = [request.body for request in bench.server.received]
    assert bodies == [bodies[0]] * 3


async def test_retry_after_is_obeyed(bench: Bench) -> None:
    """A provider that says when to come back is not asked before."""
    well = answering(bench.dialect)
    asked: list[float] = []

    async def handler(request: Received, answer: Answer) -> None:
        asked.append(time.monotonic())
        if len(asked) == 1:
            await failing(bench.dialect, 429, "slowly", retry_after="0.4")(request, answer)
        else:
            await well(request, answer)

    bench.server.handler = handler
    await bench.llm.chat("a", ASK)
    assert asked[1] - asked[0] >= 0.4


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_a_retry_after_beyond_the_deadline_is_handed_on(bench: Bench, form: str) -> None:
    """Where the wait would outlast llm_timeout, the error says at once how long it is."""
    given = "3600" if form == "seconds" else email.utils.formatdate(time.time() + 3600, usegmt=True)
    bench.server.handler = failing(bench.dialect, 429, "tomorrow", retry_after=given)
    with pytest.raises(LLMRateLimited) as caught:
        await bench.llm.chat("a", ASK)
    assert caught.value.retry_after_seconds == pytest.approx(3600, abs=60)
    assert len(bench.server.received) == 1


async def test_a_server_that_is_not_there(bench: Bench) -> None:
    """A refused connection is told as such, with the endpoint, after the tries allowed."""
    bench.set(llm_endpoint=bench.dialect.endpoint("http://127.0.0.1:1"))
    with pytest.raises(LLMUnavailable, match=r"no connection.*\(endpoint http://127\.0\.0\.1:1\)"):
        await bench.llm.chat("a", ASK)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"choices": [', "application/json"),
        (b"<html>Welcome to the hotel</html>", "text/html"),
        (b"{}", "application/json"),
        (b"[]", "application/json"),
        (b'{"choices": [], "content": 3, "message": null}', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"", "application/json"),
    ],
)
async def test_an_answer_of_no_protocol(bench: Bench, body: bytes, content_type: str) -> None:
    """An answer that is not the provider's is one clear error, which quotes its text in short."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.whole(body, content_type=content_type)

    bench.server.handler = handler
    with pytest.raises(LLMBadResponse, match="not of the provider's protocol") as caught:
        await bench.llm.chat("a", ASK)
    assert ("Welcome to the hotel" in str(caught.value)) == (b"hotel" in body)
    assert "<" not in str(caught.value)
    with pytest.raises(LLMError):
        await ask(bench.llm, streamed=True)


async def test_a_key_that_no_header_can_carry(bench: Bench) -> None:
    """A key with a line break, as an environment may hold, is refused without being shown."""
    bench.set(llm_api_key=SecretStr("sk-secret\nX-Other: 1"))
    with pytest.raises(LLMAuthError, match="no header can carry") as caught:
        await bench.llm.chat("a", ASK)
    assert "sk-secret" not in str(caught.value)
    assert bench.server.received == []


async def test_no_retries_when_told_so(bench: Bench) -> None:
    """max_retries=0 leaves every decision to the caller."""
    bench.server.handler = failing(bench.dialect, 503, "busy")
    async with LLMInterface(bench.configs, retry=RetrySettings(max_retries=0)) as llm:
        with pytest.raises(LLMUnavailable):
            await llm.chat("a", ASK)
    assert len(bench.server.received) == 1


def test_pauses_grow_and_are_random() -> None:
    """Pauses have full jitter, double up to their limit and are never before Retry-After."""
    settings = RetrySettings(max_retries=5, backoff_seconds=1, backoff_max_seconds=4)

    def pauses(tries: int, **fields: Any) -> list[float]:
        error = LLMUnavailable("busy", **fields)
        found = [settings.pause(error, tries, 1000.0) for _ in range(300)]
        return [pause for pause in found if pause is not None]

    for tries, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (5, 4.0)):
        seen = pauses(tries)
        assert 0 <= min(seen) < 0.2 * longest
        assert 0.8 * longest < max(seen) <= longest
    assert min(pauses(1, retry_after_seconds=7.0)) >= 7
    assert settings.pause(LLMUnavailable("busy"), 6, 1000.0) is None
    assert settings.pause(LLMUnavailable("busy", retry_after_seconds=20.0), 1, 19.0) is None
    assert settings.pause(LLMBadRequest("no"), 1, 1000.0) is None


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [3]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": {1, 2}}],
        [{"role": "user", "content": "\ud800"}],
    ],
    ids=["part", "image", "tool call", "set", "surrogate"],
)
async def test_messages_of_no_form_are_the_callers_error(
    bench: Bench, messages: list[dict[str, Any]]
) -> None:
    """Messages that cannot be sent are told as a bad request, not as the provider's fault."""
    bench.server.handler = failing(bench.dialect, 400, "what is that?")
    with pytest.raises(LLMBadRequest):
        await bench.llm.chat("a", messages)
    with pytest.raises(LLMBadRequest):
        await anext(bench.llm.stream("a", messages))


async def test_a_cancelled_call_ends_at_the_provider(bench: Bench) -> None:
    """A caller that gives up closes the connection, and the next call works."""
    asked, gone = asyncio.Event(), asyncio.Event()

    async def handler(request: Received, answer: Answer) -> None:
        asked.set()
        try:
            while True:
                await answer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                await asyncio.sleep(0.001)
        except ConnectionError:
            gone.set()
            raise

    bench.server.handler = handler
    call = asyncio.create_task(bench.llm.chat("a", ASK))
    await asked.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(gone.wait(), 10)
    bench.server.handler = answering(bench.dialect)
    assert (await bench.llm.chat("a", ASK)).text == "Hello there"


async def test_a_compatible_servers_own_ways_are_put_up_with() -> None:
    """Tool arguments as an object, text in parts, missing counts: such servers there are."""
    function = {"name": "weather", "arguments": {"city": "Riga"}}
    message = {
        "role": "assistant",
        "content": [{"type": "text", "text": "Let me see"}],
        "tool_calls": [{"function": function}],
    }

    async def handler(request: Received, answer: Answer) -> None:
        usage = {"prompt_tokens": 5, "completion_tokens": None}
        await answer.whole(json.dumps({"choices": [{"message": message}], "usage": usage}).encode())

    async with (
        RecordingServer(handler).running() as server,
        LLMInterface(Configs(Dialect("openai").config(server.url))) as llm,
    ):
        result = await llm.chat("a", ASK)
    assert result.text == "Let me see"
    assert result.tool_calls[0].arguments == {"city": "Riga"}
    assert result.finish_reason == "tool_calls"
    assert result.usage is not None
    assert result.usage.total_tokens == 5
