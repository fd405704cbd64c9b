"""What may come in the middle of anything: signals, the garbage collector, a failing log or system.

None of it may leave a lock held, a thread dead, or a client that never follows its SLM again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from slm import ClientStatus, SLMClient, SLMUnavailable, Timings
from slm.client.runtime.background import Background
from slm.client.runtime.callbacks import Hooks
from slm.client.runtime.dispatch import Dispatcher
from slm.testing import FakeSLMClient
from tests.support.faults.backends import TENTH
from tests.support.processes import process, until
from tests.support.servers import ServerProcess

__all__ = ["process"]


class Failing(logging.Handler):
    """A handler whose log server is away."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ConnectionError("the log server is away")


@pytest.fixture
def failing_log() -> Iterator[None]:
    handler = Failing()
    logging.getLogger("slm").addHandler(handler)
    yield
    logging.getLogger("slm").removeHandler(handler)


def make(server: ServerProcess) -> SLMClient:
    return SLMClient(server.url, token=server.backend_token, timings=Timings(**TENTH))


async def answer() -> str:
    return "here"


def in_time(work: Any) -> None:
    """Run in a thread that no deadlock keeps this test from leaving."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it hangs"


# --- a log that fails ---


@pytest.mark.usefixtures("failing_log")
def test_a_failing_log_handler_does_not_end_the_stream(process: ServerProcess) -> None:
    """Saying that the stream was lost ended the task that would have connected again."""
    with make(process) as client:
        until(lambda: client.status is ClientStatus.LIVE)
        process.kill()
        until(lambda: client.status is ClientStatus.DISCONNECTED)
        asyncio.run(process.start())
        until(lambda: client.status is ClientStatus.LIVE)


@pytest.mark.usefixtures("failing_log")
def test_a_failing_log_handler_does_not_end_the_callbacks() -> None:
    dispatcher = Dispatcher()
    told: list[int] = []

    def fails() -> None:
        raise ValueError

    dispatcher.enter()
    dispatcher.put(fails)
    dispatcher.put(lambda: told.append(1))
    until(lambda: told)
    dispatcher.leave()


def test_a_line_is_logged_in_the_name_of_who_says_it(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = Dispatcher()
    dispatcher.enter()
    dispatcher.put(lambda: 1 / 0)
    until(lambda: caplog.records)
    assert caplog.records[0].filename == "dispatch.py"
    dispatcher.leave()


# --- a system that has no more to give ---


@pytest.mark.parametrize("missing", ["thread", "descriptor"])
def test_what_cannot_be_started_is_started_later(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first question failed outside of the error tree, and each later one hung for ever."""
    background = Background("test-background")

    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread") if missing == "thread" else OSError(24, "none")

    with monkeypatch.context() as patched:
        if missing == "thread":
            patched.setattr(threading.Thread, "start", fails)
        else:
            patched.setattr(asyncio, "SelectorEventLoop", fails)
        with pytest.raises(SLMUnavailable, match="cannot be started"):
            background.start(answer)
        with pytest.raises(SLMUnavailable, match="cannot be started"):
            background.hold(1)
    in_time(lambda: background.start(answer).wait())
    until(lambda: background.loop is None)


def test_callbacks_whose_thread_cannot_be_started_are_called_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dispatcher = Dispatcher()
    told: list[int] = []

    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    dispatcher.enter()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fails)
        dispatcher.put(lambda: told.append(1))
    dispatcher.put(lambda: told.append(2))
    until(lambda: told == [1, 2])
    dispatcher.leave()


# --- signals and the garbage collector ---


def test_a_signal_handler_may_close_the_client(process: ServerProcess) -> None:
    """It waited for a thread that waited for a lock, which the interrupted code held."""
    program = f"""
import faulthandler, signal, time
from slm import SLMClient
faulthandler.dump_traceback_later(20, exit=True)
client, other = (SLMClient({process.url!r}, {process.backend_token!r}) for _ in range(2))
other.connect_now()
count = 0

def interrupt(*_):
    global count
    count += 1
    client.close_now() if count % 2 else client.connect_now()
    signal.setitimer(signal.ITIMER_REAL, 0.0007)

signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.001)
until = time.monotonic() + 2
while time.monotonic() < until:
    client.get_default_agent_config_now()
signal.setitimer(signal.ITIMER_REAL, 0)
print("done", count > 20)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "done True\n", ended.stderr


def test_nothing_waits_for_a_lock_in_the_background_thread() -> None:
    """As where a signal came while its thread held the lock."""
    background = Background("test-background")
    background.hold(1)
    with background._lock:
        in_time(lambda: None)
        assert background.start(answer).wait() == "here"

        async def hold() -> None:
            background.hold(2)
            background.let_go(2)

        background.start(hold).wait()
    background.let_go(1)
    until(lambda: background.loop is None)


def test_a_finalizer_may_unregister_while_another_registers() -> None:
    """A cycle that the collector finds while the lock is held waited for that lock for ever."""
    hooks = Hooks(lambda added: None)

    class Holder:
        def __init__(self) -> None:
            self.me = self
            self.stop = hooks.on_change(lambda agent_id, config: None)
            self.unregister = hooks.register_validator(lambda config: None)

        def __del__(self) -> None:
            self.stop()
            self.unregister()

    def work() -> None:
        for _ in range(500):
            Holder()

    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        in_time(work)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert not hooks.has_callbacks
    assert not hooks.has_slow_validators


def test_a_finalizer_may_close_at_exit(process: ServerProcess) -> None:
    program = f"""
from slm import SLMClient

class Holder:
    def __init__(self):
        self.client = SLMClient({process.url!r}, {process.backend_token!r})
        self.client.connect_now()
    def __del__(self):
        self.client.close_now()
        print("closed")

holder = Holder()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.stdout, ended.stderr) == ("closed\n", "")


# --- callbacks ---


def test_a_callback_that_was_removed_hears_nothing_of_what_is_being_told() -> None:
    hooks = Hooks(lambda added: None)
    told: list[str] = []
    stop = hooks.on_change(lambda agent_id, config: told.append(agent_id))
    being_told = hooks._outlets
    stop()
    for outlet in being_told:
        outlet.tell("a", None)
    time.sleep(0.05)
    assert told == []


def test_a_coroutine_in_the_callbacks_thread_waits_for_no_verdict(process: ServerProcess) -> None:
    """The validator is to be asked in the very thread that would have waited for it."""
    with make(process) as client:
        judged: list[Any] = []

        async def asked() -> None:
            answering = client._follower.answer

            async def noted(agent_id: str | None, *, judged: bool = True) -> Any:
                seen.append(judged)
                return await answering(agent_id, judged=judged)

            client._follower.answer = noted  # type: ignore[method-assign]
            await client.resolve("nobody")
            await client.get_default_agent_config()

        seen: list[bool] = []

        async def callback(agent_id: str, config: Any) -> None:
            await asked()
            judged.append(agent_id)

        client.on_change(callback)
        client._follower.hooks.tell("a", None)
        until(lambda: judged)
        assert seen == [False, False]


def test_an_empty_reason_refuses_nothing_with_the_fake_client_either() -> None:
    client = FakeSLMClient({"a": {"llm_model": "m1"}})
    client.register_validator(lambda config: "")
    client.set_agent("a", llm_model="m2")
    assert client.resolve_now("a").llm_model == "m2"
    assert client.peek("a") is not None
