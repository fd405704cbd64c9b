"""LLMInterface in synchronous code: the same calls, from any thread, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from slm import (
    BlockingSLMClient,
    ConfigurationError,
    LLMAuthError,
    LLMInterface,
    SLMClient,
    Timings,
)
from slm.llm.synchronous import _calling
from tests.client.test_any_thread_any_loop import sockets
from tests.llm.conftest import ASK, QUICK_RETRY
from tests.support.faults.backends import TENTH
from tests.support.llm.providers import Configs, Dialect, RecordingServer, answering, failing
from tests.support.servers import InLoopServer, eventually


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test the thread of synchronous calls has ended."""
    yield
    gc.collect()
    for _ in range(500):
        if _calling.loop is None:
            break
        threading.Event().wait(0.01)
    assert _calling.loop is None


async def test_an_answer_and_a_stream(dialect: Dialect) -> None:
    """`chat_now` and `stream_now` give what `chat` and `stream` give, connections kept between."""
    async with RecordingServer(answering(dialect)).running() as server:
        configs = Configs(dialect.config(server.url))
        llm = LLMInterface(configs, retry=QUICK_RETRY)
        expected = await llm.chat("a", ASK)
        streamed = llm.stream("a", ASK)
        async for _ in streamed:
            pass

        def work() -> None:
            with llm:
                assert llm.chat_now("a", ASK).text == expected.text
                stream = llm.stream_now("a", ASK)
                with pytest.raises(ConfigurationError, match="after its last chunk"):
                    _ = stream.result
                assert "".join(chunk.text for chunk in stream) == stream.text
                assert stream.result.text == streamed.result.text
                assert list(stream) == []

        await asyncio.to_thread(work)
        await llm.close()


async def test_errors_are_the_same(dialect: Dialect) -> None:
    """What a call raises, it raises in the thread that called."""
    async with RecordingServer(failing(dialect, 401, "no")).running() as server:
        llm = LLMInterface(Configs(dialect.config(server.url)), retry=QUICK_RETRY)

        def work() -> None:
            with llm:
                with pytest.raises(LLMAuthError):
                    llm.chat_now("a", ASK)
                with pytest.raises(LLMAuthError):
                    list(llm.stream_now("a", ASK))
                with pytest.raises(ConfigurationError):
                    llm.chat_now("a", [])

        await asyncio.to_thread(work)


async def test_many_threads_and_loops(dialect: Dialect) -> None:
    """Eight threads, half of them with loops of their own that end: no socket is left open."""
    async with RecordingServer(answering(dialect)).running() as server:
        llm = LLMInterface(Configs(dialect.config(server.url)), retry=QUICK_RETRY)
        await llm.chat("a", ASK)
        before = sockets()

        def now(_: int) -> str:
            return llm.chat_now("a", ASK).text

        def in_a_loop(_: int) -> str:
            return asyncio.run(llm.chat("a", ASK)).text

        def work() -> set[str]:
            with ThreadPoolExecutor(8) as threads:
                made = [threads.submit(each, 0) for each in (now, in_a_loop) * 8]
                texts = {each.result(30) for each in made}
            llm.close_now()
            return texts

        assert len(await asyncio.to_thread(work)) == 1
        await eventually(lambda: gc.collect() >= 0 and sockets() <= before)
        await llm.close()


async def test_a_loop_that_is_closed_without_ceremony_leaks_no_socket(dialect: Dialect) -> None:
    """`run_until_complete` and `close`, with no asyncio.run: the connections go with the loop."""
    async with RecordingServer(answering(dialect)).running() as server:
        llm = LLMInterface(Configs(dialect.config(server.url)), retry=QUICK_RETRY)
        await llm.chat("a", ASK)
        before = sockets()

        def job() -> str:
            loop = asyncio.new_event_loop()
            try:
                return loop.run_until_complete(llm.chat("a", ASK)).text
            finally:
                loop.close()

        for _ in range(5):
            await asyncio.to_thread(job)
        await asyncio.to_thread(lambda: asyncio.run(llm.chat("a", ASK)))
        await eventually(lambda: gc.collect() >= 0 and sockets() <= before + 1)
        await llm.close()


async def test_an_interface_that_nobody_holds_is_closed(dialect: Dialect) -> None:
    """Forgotten without `close`, it gives back the thread and its connections."""
    async with RecordingServer(answering(dialect)).running() as server:
        llm = LLMInterface(Configs(dialect.config(server.url)), retry=QUICK_RETRY)
        await asyncio.to_thread(llm.chat_now, "a", ASK)
        assert _calling.loop is not None
        del llm
        await eventually(lambda: gc.collect() >= 0 and _calling.loop is None)


async def test_over_either_client(server: InLoopServer) -> None:
    """An interface over a `BlockingSLMClient` is one over the same client."""
    blocking = BlockingSLMClient(server.url, token=server.backend_token, timings=Timings(**TENTH))
    llm: LLMInterface = LLMInterface(blocking)
    client: Any = llm._client
    assert client is blocking.client
    assert isinstance(client, SLMClient)
    assert client._follower.hooks._validators
    await llm.close()
    assert not client._follower.hooks._validators
    await asyncio.to_thread(blocking.close)
