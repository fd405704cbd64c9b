"""The traps of the providers' SDKs, each seen once, each with its test."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from slm.errors import LLMError, LLMStreamBroken, LLMTimeout
from slm.llm import LLMInterface
from tests.llm.conftest import ASK, QUICK_RETRY, Bench, ask
from tests.support.llm.providers import (
    CANARY,
    DIALECTS,
    Answer,
    Configs,
    Dialect,
    Received,
    RecordingServer,
    answering,
    failing,
)

# --- 1. HTTP clients belong to an event loop ---


def test_one_interface_serves_loops_one_after_another_and_at_once(dialect: Dialect) -> None:
    """An interface made once works in every event loop, and in two threads at the same time."""

    async def three_times() -> str:
        async with RecordingServer(answering(dialect)).running() as server:
            configs.current = dialect.config(server.url)
            answers = [await llm.chat("a", ASK) for _ in range(3)]
            assert server.connections == 1, "a loop's connection is kept and used again"
            return answers[-1].text

    configs = Configs(dialect.config("http://127.0.0.1:1"))
    llm = LLMInterface(configs)
    assert [asyncio.run(three_times()) for _ in range(2)] == ["Hello there"] * 2

    async def at_once(url: str, barrier: threading.Barrier) -> None:
        await llm.chat("a", ASK)
        await asyncio.to_thread(barrier.wait)
        texts.append((await llm.chat("a", ASK)).text)

    async def serve() -> None:
        async with RecordingServer(answering(dialect)).running() as server:
            configs.current = dialect.config(server.url)
            barrier = threading.Barrier(2)
            jobs = [at_once(server.url, barrier) for _ in range(2)]
            await asyncio.gather(*(asyncio.to_thread(asyncio.run, job) for job in jobs))
            assert server.connections == 2, "each loop has a connection of its own"

    texts: list[str] = []
    asyncio.run(serve())
    assert texts == ["Hello there"] * 2


def test_a_program_that_never_closes_ends_without_a_word(dialect: Dialect, tmp_path: Path) -> None:
    """With no close() at all, and Python's every warning on, nothing is left open at the end."""
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio\n"
        "from slm.llm import LLMInterface\n"
        "from tests.support.llm.providers import *\n"
        f"dialect = Dialect({dialect.provider!r})\n"
        "async def main():\n"
        "    async with RecordingServer(answering(dialect)).running() as server:\n"
        "        llm = LLMInterface(Configs(dialect.config(server.url)))\n"
        "        print((await llm.chat('a', [{'role': 'user', 'content': 'x'}])).text)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-W", "error::ResourceWarning", str(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello there\n", "")


# --- 2. SDKs help themselves from the environment ---


@pytest.fixture
async def hostile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[RecordingServer]:
    """A server that every variable in the environment leads to, with keys and headers to match."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.whole(b"{}")

    async with RecordingServer(handler).running() as server:
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login hostile password hostile-netrc\n")
        profiles = tmp_path / "anthropic" / "configs"
        profiles.mkdir(parents=True)
        (profiles / "hostile.json").write_text(f'{{"base_url": "{server.url}"}}')
        headers = "Authorization: Bearer hostile-header\nX-Api-Key: hostile-header\nX-Hostile: yes"
        proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        variables = {
            **dict.fromkeys(("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"), "hostile-key"),
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OPENAI_ORG_ID": "hostile-org",
            "OPENAI_PROJECT_ID": "hostile-project",
            "OPENAI_WEBHOOK_SECRET": "hostile-secret",
            "OPENAI_CUSTOM_HEADERS": headers,
            "OPENAI_API_TYPE": "azure",
            "AZURE_OPENAI_ENDPOINT": server.url,
            **dict.fromkeys(("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"), "hostile-key"),
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_CUSTOM_HEADERS": headers,
            "ANTHROPIC_PROFILE": "hostile",
            "ANTHROPIC_CONFIG_DIR": str(tmp_path / "anthropic"),
            "ANTHROPIC_WEBHOOK_SIGNING_KEY": "hostile-secret",
            "OLLAMA_HOST": server.url,
            "OLLAMA_API_KEY": "hostile-key",
            "NETRC": str(tmp_path / "netrc"),
            **dict.fromkeys(proxies, server.url),
            **dict.fromkeys((name.lower() for name in proxies), server.url),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.mark.parametrize("key", [None, "", CANARY], ids=["no key", "empty key", "key"])
async def test_nothing_is_taken_from_the_environment(
    dialect: Dialect, hostile: RecordingServer, key: str | None
) -> None:
    """Hostile keys, base URLs, headers and proxies in the environment are not used, key or none."""
    async with RecordingServer(answering(dialect)).running() as server:
        secret = None if key is None else SecretStr(key)
        configs = Configs(dialect.config(server.url, llm_api_key=secret))
        async with LLMInterface(configs) as llm:
            await llm.chat("a", ASK)
            await ask(llm, streamed=True)
        assert len(server.received) == 2
        for request in server.received:
            assert b"hostile" not in request.raw.lower()
            assert request.headers["host"] == server.url.removeprefix("http://")
            assert request.headers.get("authorization") == (f"Bearer {key}" if key else None)
    assert hostile.received == []
    assert hostile.connections == 0


async def test_an_endpoint_of_none_is_the_providers_own(
    dialect: Dialect, hostile: RecordingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no endpoint set, the provider's own is meant, whatever the environment says."""
    asked: list[tuple[str, int]] = []

    async def getaddrinfo(host: str, port: int, **_: Any) -> Any:
        asked.append((host, port))
        raise OSError("not here")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    configs = Configs(dialect.config("http://unused", llm_endpoint=None))
    async with LLMInterface(configs, retry=QUICK_RETRY) as llm:
        with pytest.raises(LLMError, match="no connection"):
            await llm.chat("a", ASK)
    own = {
        "openai": ("api.openai.com", 443),
        "anthropic": ("api.anthropic.com", 443),
        "ollama": ("localhost", 11434),
    }
    assert set(asked) == {own[dialect.provider]}
    assert hostile.connections == 0


# --- 3. The SDKs' time-outs are per read ---


async def test_a_slow_drip_does_not_outlive_the_timeout(bench: Bench) -> None:
    """An answer that comes a byte at a time ends at llm_timeout, counted over the whole call."""
    stopped = asyncio.Event()

    async def drip(request: Received, answer: Answer) -> None:
        try:
            await answer.begin("application/json")
            while True:
                await answer.piece(b" ")
                await asyncio.sleep(0.02)
        finally:
            stopped.set()

    bench.server.handler = drip
    with pytest.raises(LLMTimeout, match=r"llm_timeout \(0\.3 s\)") as caught:
        await bench.llm.chat("a", ASK, timeout=0.3)
    assert (caught.value.revision, caught.value.provider) == (43, bench.dialect.provider)
    await asyncio.wait_for(stopped.wait(), 10)
    assert len(bench.server.received) == 1, "a call that timed out is not tried again"


async def test_the_timeout_is_the_agents(bench: Bench) -> None:
    """Without an override, llm_timeout of the config in force ends the call."""

    async def silence(request: Received, answer: Answer) -> None:
        await asyncio.Event().wait()

    bench.server.handler = silence
    bench.set(llm_timeout=1)
    with pytest.raises(LLMTimeout, match=r"llm_timeout \(1 s\)"):
        await bench.llm.chat("a", ASK)


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_stream_may_not_pause_longer_than_the_timeout(bench: Bench, tokens: int) -> None:
    """A stream that only says that it is alive ends at llm_timeout, before and after tokens."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin(bench.dialect.stream_type)
        for piece in [*bench.dialect.opening(), *[bench.dialect.token("x")] * tokens]:
            await answer.piece(piece)
        while True:
            await answer.piece(bench.dialect.keep_alive())
            await asyncio.sleep(0.02)

    bench.server.handler = handler
    stream = bench.llm.stream("a", ASK, timeout=0.3)
    with pytest.raises(LLMTimeout):
        async for _ in stream:
            pass
    assert stream.text == "x" * tokens


async def test_a_long_stream_may_take_longer_than_the_timeout(bench: Bench) -> None:
    """Between tokens the time-out starts anew, so a long answer is not cut off."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin(bench.dialect.stream_type)
        for piece in [*bench.dialect.opening(), *[bench.dialect.token("x")] * 12]:
            await answer.piece(piece)
            await asyncio.sleep(0.1)
        for piece in bench.dialect.closing():
            await answer.piece(piece)
        await answer.end()

    bench.server.handler = handler
    assert (await ask(bench.llm, streamed=True, timeout=0.8)).text == "x" * 12


# --- 4. Anthropic's arguments ---


async def test_anthropic_gets_sampling_options_and_always_a_limit() -> None:
    """Temperature, top_p and top_k reach Anthropic's body, and max_tokens is never missing."""
    dialect = Dialect("anthropic")
    async with RecordingServer(answering(dialect)).running() as server:
        options = {"top_p": 0.5, "top_k": 3}
        configs = Configs(dialect.config(server.url, llm_options=options, llm_temperature=1.5))
        async with LLMInterface(configs) as llm:
            await llm.chat("a", ASK)
            await ask(llm, streamed=True)
        for request in server.received:
            body = request.body
            assert (body["top_p"], body["top_k"]) == (0.5, 3)
            assert body["temperature"] == 1.0, "the protocol's range ends there"
            assert body["max_tokens"] == 4096


# --- 5. A stream that breaks ---


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_stream_cut_by_a_plain_close_is_an_error(bench: Bench, tokens: int) -> None:
    """A stream that just ends, with no finish reason, is never taken for a whole answer."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin_until_close(bench.dialect.stream_type)
        for piece in [*bench.dialect.opening(), *[bench.dialect.token("x")] * tokens]:
            await answer.send(piece)

    bench.server.handler = handler
    with pytest.raises(LLMStreamBroken, match="before the provider said") as caught:
        await ask(bench.llm, streamed=True)
    assert caught.value.partial == "x" * tokens
    assert (caught.value.step, caught.value.revision) == ("agent", 43)
    # Nothing of the answer was seen, so it was tried again; a begun answer never is.
    assert len(bench.server.received) == (3 if tokens == 0 else 1)


@pytest.mark.parametrize("fault", ["cut chunk", "malformed", "error in the stream", "reset"])
async def test_a_stream_that_breaks_says_what_came(bench: Bench, fault: str) -> None:
    """A cut, a piece that is no JSON and an error in mid-stream end as one kind of error."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin(bench.dialect.stream_type)
        for piece in [*bench.dialect.opening(), *[bench.dialect.token("x")] * 2]:
            await answer.piece(piece)
        if fault == "cut chunk":
            await answer.send(b"ff\r\ndata: {")
        elif fault == "malformed":
            await answer.piece(bench.dialect.malformed())
            await answer.end()
        elif fault == "error in the stream":
            await answer.piece(bench.dialect.error_in_stream(f"overloaded, said {CANARY}"))
            await answer.end()
        else:
            answer._writer.transport.abort()

    bench.server.handler = handler
    stream = bench.llm.stream("a", ASK)
    with pytest.raises(LLMStreamBroken) as caught:
        async for _ in stream:
            pass
    error = caught.value
    assert error.partial == "xx"
    assert error.provider_error
    assert CANARY not in str(error)
    assert len(bench.server.received) == 1
    if fault == "error in the stream":
        assert "overloaded" in str(error)


async def test_a_break_after_the_finish_reason_loses_nothing(bench: Bench) -> None:
    """Once the provider said that it is finished, a cut takes nothing from the answer."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin(bench.dialect.stream_type)
        pieces = [*bench.dialect.opening(), bench.dialect.token("x"), *bench.dialect.closing()]
        if bench.dialect.provider != "ollama":
            pieces.pop()
        for piece in pieces:
            await answer.piece(piece)

    bench.server.handler = handler
    assert (await ask(bench.llm, streamed=True)).text == "x"


# --- 6. The key in an SDK's exception ---


@pytest.mark.parametrize(
    "fault", ["refused", "echo", "no server", "timeout", "malformed", "broken", "redirect"]
)
@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_no_error_leads_to_the_key(
    bench: Bench, fault: str, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """From an error, its text, its chain, its frames' variables or a DEBUG log, no way to a key."""
    caplog.set_level(logging.DEBUG)

    async def handler(request: Received, answer: Answer) -> None:
        if fault == "refused":
            await failing(bench.dialect, 401, "no such key")(request, answer)
        elif fault == "echo":
            text = f"Incorrect API key provided: {CANARY}. Headers: {dict(request.headers)}"
            await failing(bench.dialect, 401, text)(request, answer)
        elif fault == "timeout":
            await asyncio.Event().wait()
        elif fault == "malformed":
            await answer.whole(b'{"choices": [')
        elif fault == "broken":
            await answer.begin(bench.dialect.stream_type)
            await answer.piece(bench.dialect.token("x"))
        else:
            await answer.whole(b"", status=302, headers={"location": bench.server.url + "/other"})

    bench.server.handler = handler
    if fault == "no server":
        bench.set(llm_endpoint=bench.dialect.endpoint("http://127.0.0.1:1"))
    with pytest.raises(LLMError) as caught:
        await ask(bench.llm, streamed=streamed, timeout=0.5 if fault == "timeout" else 20)
    error = caught.value
    assert error.__context__ is None
    assert error.__cause__ is None
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    text = "".join(shown.format()) + repr(error) + str(error) + repr(vars(error)) + caplog.text
    for form in (CANARY, repr(CANARY)[1:-1], CANARY.replace("\\", "\\\\").replace('"', '\\"')):
        assert form not in text
    assert not _reachable(error, "httpx2.Request", "httpx.Request", "httpx2.Headers")
    if fault == "echo":
        assert "Incorrect API key provided: ***" in str(error)
        assert error.status == 401


def _reachable(error: BaseException, *types: str) -> list[object]:
    """Return the objects of these types that the error holds on to, its frames left out."""
    found: list[object] = []
    seen, pending = {id(error)}, [*vars(error).values(), *error.args]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if f"{type(item).__module__}.{type(item).__qualname__}" in types:
            found.append(item)
        pending.extend(gc.get_referents(item))
    return found


async def test_success_leaves_no_key_in_a_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that succeeds writes the key into no log, at DEBUG either."""
    caplog.set_level(logging.DEBUG)
    result = await bench.llm.chat("a", ASK)
    streamed = await ask(bench.llm, streamed=True)
    assert bench.server.received[0].headers["authorization"] == f"Bearer {CANARY}"
    assert caplog.records, "the libraries do log at DEBUG"
    assert CANARY not in caplog.text + repr(result) + repr(streamed)


def test_the_dialects_cover_every_provider() -> None:
    """A provider added to the interface must be added to these tests."""
    from slm.llm.validator import PROVIDERS

    assert {dialect.provider for dialect in DIALECTS} == set(PROVIDERS)
