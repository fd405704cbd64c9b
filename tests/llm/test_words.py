"""A provider's own words survive: classified by what they say, quoted in short, without the key."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.errors import (
    LLMAuthError,
    LLMBadRequest,
    LLMBadResponse,
    LLMError,
    LLMQuotaExhausted,
    LLMRateLimited,
    LLMUnavailable,
)
from slm.llm.providers.failures import refused
from slm.llm.providers.words import words_of
from tests.support.llm.providers import CANARY, Answer, Dialect, Received
from tests.support.llm.reach import reaches
from tests.support.llm.talking import chunk, says, sse, streams, talking

REASON = "Cannot find field."
SHAPES: dict[str, Any] = {
    "OpenAI": {"error": {"message": REASON, "type": "invalid_request_error", "param": None}},
    "Gemini, a list": [{"error": {"code": 400, "message": REASON, "status": "INVALID_ARGUMENT"}}],
    "FastAPI, text": {"detail": REASON},
    "FastAPI, a list": {
        "detail": [{"loc": ["body", "x"], "msg": REASON, "type": "extra_forbidden"}]
    },
    "FastAPI, an object": {"detail": {"error": {"message": REASON}}},
    "TGI": {"error": REASON, "error_type": "validation"},
    "Cloudflare": {"success": False, "errors": [{"code": 7003, "message": REASON}]},
    "Zhipu": {"code": 1211, "msg": REASON},
    "MiniMax": {"base_resp": {"status_code": 1004, "status_msg": REASON}},
    "vLLM": {"object": "error", "message": REASON, "type": "BadRequestError", "code": 400},
    "Anthropic": {"type": "error", "error": {"type": "invalid_request_error", "message": REASON}},
    "Azure API Management": {"statusCode": 400, "message": REASON},
    "RFC 9457": {"type": "about:blank", "title": "Bad Request", "detail": REASON},
    "a gateway that quotes": {"error": {"message": json.dumps({"error": {"message": REASON}})}},
    "OpenRouter's upstream": {
        "error": {"message": "Provider returned error", "metadata": {"raw": REASON}}
    },
    "a cause in JSON text": {"error": {"cause": json.dumps({"error": {"message": REASON}})}},
    "AWS": {"__type": "com.amazon.coral.service#ValidationException", "message": REASON},
    "JSON text": json.dumps(REASON),
    "plain text": REASON,
    "HTML": f"<html><head><title>400</title></head><body><h1>No</h1><p>{REASON}</p></body></html>",
    "something else": {"outcome": {"why": REASON}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_the_reason_is_in_the_error_whatever_its_shape(
    dialect: Dialect, shape: str, streamed: bool
) -> None:
    """An operator reads why, not only that, of every provider and of those who imitate it."""
    async with talking(dialect.provider, says(SHAPES[shape], status=400)) as talk:
        error = await talk.fails(streamed=streamed)
        assert type(error) is LLMBadRequest
        assert error.status == 400
        assert REASON in error.detail
        assert "<" not in error.detail
        assert len(talk.bodies) == 1


SAID: list[tuple[str, Any, type[LLMError], int]] = [
    ("OpenRouter 429", {"error": {"message": "slow", "code": 429}}, LLMRateLimited, 3),
    ("OpenRouter 502", {"error": {"message": "gave up", "code": 502}}, LLMUnavailable, 3),
    ("OpenRouter 401", {"error": {"message": "No auth", "code": 401}}, LLMAuthError, 1),
    ("in a choice", {"choices": [{"error": {"code": 502, "message": "Up"}}]}, LLMUnavailable, 3),
    ("LM Studio", {"error": "Unexpected endpoint or method. (POST /x)"}, LLMBadRequest, 1),
    ("Anthropic", {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
     LLMUnavailable, 3),
    ("Ollama", {"error": "llama runner process has terminated: exit status 2"}, LLMUnavailable, 3),
    ("a list", [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "slow"}}],
     LLMRateLimited, 3),
    ("a detail", {"detail": "Rate limit reached"}, LLMRateLimited, 3),
    ("quota", {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}},
     LLMQuotaExhausted, 1),
    ("no such model", {"error": "model 'x' not found"}, LLMBadRequest, 1),
    ("a type", {"error": {"type": "rate_limit_error", "message": "x"}}, LLMRateLimited, 3),
    ("text", {"error": "Too many requests"}, LLMRateLimited, 3),
]  # fmt: skip


@pytest.mark.parametrize("said", SAID, ids=[each[0] for each in SAID])
@pytest.mark.parametrize("way", ["chat", "body", "event"])
async def test_an_error_in_a_200_is_what_it_says(dialect: Dialect, said: Any, way: str) -> None:
    """With status 200, whole or as an event of a stream, an error is judged by its own words."""
    _, body, kind, tries = said
    handler = says(body)
    if way == "event":
        line = json.dumps(body) + "\n"
        line = line if dialect.provider == "ollama" else f"data: {line}\n"
        handler = streams(line.encode(), kind=dialect.stream_type)
    async with talking(dialect.provider, handler) as talk:
        error = await talk.fails(streamed=way != "chat")
        assert type(error) is kind
        assert words_of(body).text in error.detail
        assert len(talk.bodies) == tries


@pytest.mark.parametrize(
    ("status", "body", "kind", "tries"),
    [
        (429, {"error": {"message": "x", "code": "insufficient_quota"}}, LLMQuotaExhausted, 1),
        (429, {"error": {"message": "x", "type": "insufficient_quota"}}, LLMQuotaExhausted, 1),
        (429, {"error": {"message": "Insufficient Balance"}}, LLMQuotaExhausted, 1),
        (402, {"error": {"message": "Insufficient Balance"}}, LLMQuotaExhausted, 1),
        (429, {"error": {"code": "1113", "message": "您的账户已欠费"}}, LLMQuotaExhausted, 1),
        (400, {"__type": "x#ThrottlingException", "message": "Too many"}, LLMRateLimited, 3),
        (400, {"error": {"message": "Your credit balance is too low"}}, LLMQuotaExhausted, 1),
        (429, {"error": {"message": "x", "code": "rate_limit_exceeded"}}, LLMRateLimited, 3),
        (
            429,
            [{"error": {"status": "RESOURCE_EXHAUSTED",
                        "message": "You exceeded your current quota. Please retry in 0.01s.",
                        "details": [{"retryDelay": "0.01s"}]}}],
            LLMRateLimited,
            3,
        ),
        (400, {"error": {"type": "overloaded_error", "message": "x"}}, LLMUnavailable, 3),
        (400, {"error": {"message": "API key not valid", "status": "INVALID_ARGUMENT",
                         "details": [{"reason": "API_KEY_INVALID"}]}}, LLMAuthError, 1),
        (500, {"error": {"message": "x", "type": "rate_limit_error"}}, LLMRateLimited, 3),
        (503, {"error": {"message": "The model is overloaded", "code": 503}}, LLMUnavailable, 3),
    ],
)  # fmt: skip
async def test_what_is_tried_again(
    dialect: Dialect, status: int, body: Any, kind: type[LLMError], tries: int
) -> None:
    """Nothing left to pay with is not tried again; a rate limit and an overload are."""
    async with talking(dialect.provider, says(body, status=status)) as talk:
        error = await talk.fails()
        assert type(error) is kind
        assert len(talk.bodies) == tries
        assert isinstance(error, LLMRateLimited) == issubclass(kind, LLMRateLimited)


async def test_a_wait_in_the_words_is_kept() -> None:
    """Gemini says in the body how long to wait; there is no header for it."""
    body = [{"error": {"code": 429, "message": "slow", "details": [{"retryDelay": "86400s"}]}}]
    async with talking("openai", says(body, status=429)) as talk:
        error = await talk.fails()
        assert error.retry_after_seconds == 86400
        assert len(talk.bodies) == 1


@pytest.mark.parametrize(
    ("provider", "path", "asked"),
    [
        ("openai", "/v1", "/v1/chat/completions"),
        ("openai", "/v1/", "/v1/chat/completions"),
        ("openai", "/v1//", "/v1/chat/completions"),
        ("openai", "//v1", "//v1/chat/completions"),
        ("openai", "/v1/chat/completions", "/v1/chat/completions"),
        ("openai", "/d/g?api-version=1", "/d/g/chat/completions?api-version=1"),
        ("anthropic", "", "/v1/messages"),
        ("anthropic", "/v1", "/v1/messages"),
        ("anthropic", "/v1/messages", "/v1/messages"),
        ("anthropic", "/x?tenant=1", "/x/v1/messages?tenant=1"),
        ("ollama", "/", "/api/chat"),
        ("ollama", "/v1", "/api/chat"),
        ("ollama", "/other", "/other/api/chat"),
        ("ollama", "/api", "/api/chat"),
        ("ollama", "/api/chat", "/api/chat"),
    ],
)
async def test_an_error_names_the_path_that_was_asked(provider: str, path: str, asked: str) -> None:
    """Endpoints as people paste them work, or the error shows the segment too many."""
    async with talking(provider, says("404 page not found", status=404), path=path or "/") as talk:
        error = await talk.fails()
        assert talk.server.received[0].path == asked
        assert f"POST {asked.partition('?')[0]}: 404 page not found" in error.detail


def _encodings(key: str) -> dict[str, str]:
    raw = key.encode()
    return {
        "plain": key,
        "upper case": key.upper(),
        "reversed slashes": key.replace("\\", "\\\\"),
        "percent": "".join(f"%{byte:02X}" for byte in raw),
        "html": "".join(f"&#{byte};" for byte in raw),
        "hex": raw.hex(),
        "hex, spaced": raw.hex(" "),
        "hex, colons": raw.hex(":"),
        "hex, 0x": ", ".join(f"0x{byte:02x}" for byte in raw),
        "decimal": ", ".join(str(byte) for byte in raw),
        "decimal, close": ",".join(str(byte) for byte in raw),
        "quoted-printable": "".join(f"={byte:02X}" for byte in raw),
        "base64": base64.b64encode(raw).decode(),
        "base64 of a header": base64.b64encode(b"Bearer " + raw).decode(),
        "base64url": base64.urlsafe_b64encode(b"u:" + raw).decode(),
        "base64 twice": base64.b64encode(base64.b64encode(raw)).decode(),
        "base32": base64.b32encode(raw).decode(),
        "backwards": key[::-1],
        "json in json": json.dumps(json.dumps(key)),
        "escapes": "".join(f"\\u{ord(c):04x}" for c in key),
        "octal": "".join(f"\\{ord(c):03o}" for c in key),
        "spelled": " ".join(key),
        "dashes": "-".join(key),
        "utf-16": raw.decode().encode("utf-16-le").decode("latin-1"),
    }


@pytest.mark.parametrize("encoding", _encodings("x"))
@pytest.mark.parametrize("status", [401, 200])
async def test_a_key_comes_back_in_no_encoding(encoding: str, status: int) -> None:
    """A provider that echoes the key, in whatever spelling, shows it to nobody."""
    echoed = _encodings(CANARY)[encoding]
    body = {"error": {"message": f"Wrong key {echoed} given.", "code": 401}}
    async with talking("openai", says(body, status=status)) as talk:
        error = await talk.fails()
    assert "Wrong key" in error.detail
    assert "given" in error.detail
    middle = echoed[len(echoed) // 4 : len(echoed) // 4 + 24]
    assert middle not in error.detail
    assert middle.strip() not in str(error)


async def test_no_error_leads_to_the_key(dialect: Dialect) -> None:
    """From whatever a call ends with, no attribute, frame or cause leads to the key."""
    handlers = [
        says({"error": {"message": f"no {CANARY}"}}, status=401),
        says({"error": {"message": f"no {CANARY}", "code": 500}}),
        says(f"<html>{CANARY}</html>"),
        streams(sse(chunk({"content": "x"}), {"error": CANARY}), kind="text/plain"),
    ]
    for handler in handlers:
        async with talking(dialect.provider, handler) as talk:
            for streamed in (False, True):
                error = await talk.fails(streamed=streamed)
                assert not reaches(error, CANARY)
                assert error.__context__ is error.__cause__ is None


async def test_an_error_whose_body_never_ends_keeps_its_status(
    dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A status is told at once, even where its body drips, breaks off or is no text."""
    monkeypatch.setattr("slm.llm.providers.http._ERROR_SECONDS", 0.1)

    async def drips(request: Received, answer: Answer) -> None:
        await answer.send(b"HTTP/1.1 401 No\r\ncontent-length: 99\r\n\r\n{")
        await asyncio.Event().wait()

    async def breaks(request: Received, answer: Answer) -> None:
        await answer.send(b"HTTP/1.1 401 No\r\ncontent-length: 99\r\n\r\n{")

    for handler in (drips, breaks, says(b"\xff\xfe\x00", status=401), says(b"", status=401)):
        async with talking(dialect.provider, handler) as talk:
            error = await talk.fails()
            assert (type(error), error.status) == (LLMAuthError, 401)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["error", "message", "code", "type", "detail", "loc", "status"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(st.integers(100, 999), JSON, st.booleans())
def test_any_error_has_a_meaning(status: int, body: Any, in_answer: bool) -> None:
    """Law: whatever an error looks like, there is one of ours for it, with words of some length."""
    for said in (body, json.dumps(body)):
        error = refused(status, said, {}, "/x", in_answer=in_answer)
        assert issubclass(error.failure.kind, LLMError)
        assert error.failure.detail
        assert len(error.words.text) <= 2048
        assert error.failure.status is None or 100 <= error.failure.status < 1000


def test_a_hostile_error_takes_no_time() -> None:
    """Deep, wide and long errors are read in a moment."""
    deep: Any = "end"
    for _ in range(500):
        deep = {"error": deep, "message": [deep] if isinstance(deep, str) else "x"}
    wide = {"errors": [{"message": f"m{n}"} for n in range(100_000)]}
    for body in (deep, wide, "<script" * 100_000, "<" * 1_000_000, "{" * 1_000_000):
        assert len(words_of(body).text) <= 2048


async def test_a_bad_answer_quotes_what_came() -> None:
    """Lines that are no JSON are quoted in the error of a stream that had not begun."""
    async with talking("openai", streams(b"data: sorry, we are closed\n\n")) as talk:
        error = await talk.fails(streamed=True)
        assert type(error) is LLMBadResponse
        assert "sorry, we are closed" in error.detail
