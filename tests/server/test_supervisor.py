"""Background tasks: whatever ends one, it is started again, and /readyz and /metrics say so."""

from __future__ import annotations

import ast
import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import slm.server
from slm.server.db.engines.listener import CHANNEL
from slm.server.fleet import explain as explanations
from slm.server.fleet import replication as fleet_sync
from slm.server.fleet.replication import FleetSync
from slm.server.fleet.tracker import Fleet
from slm.server.tasks import supervisor
from slm.server.tasks.supervisor import SupervisedTask, Supervisor
from tests.support.postgres import connect
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server
from tests.support.store import KEY

NEEDED = ["feed", "broadcast", "heartbeats", "caretaker", "doorkeeper", "uvicorn"]

SHORT_TASKS = {
    "transport/acceptor.py": "one connection's beginning, bounded by the time of its TLS handshake",
    "api/routes/ws.py": "the opening of one stream, which the stream awaits",
    "agents/catalog.py": "one compression, which its callers await",
    "fleet/explain.py": "one answer to another replica, over after seconds",
    "fleet/replication.py": "two waits, cancelled by the function that began them",
    "agents/read_batches.py": "it lasts while somebody waits; each gets an answer in any case",
}
"""Where else the server starts tasks, and why none of them lives as long as the server."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "DOWN_SECONDS", 0.2)
    monkeypatch.setattr(supervisor, "MAX_BACKOFF_SECONDS", 0.1)


def test_only_the_supervisor_starts_tasks_that_stay() -> None:
    """A task that is started anywhere else in the server is a short one, with a reason."""
    root = Path(slm.server.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", ""))
            if name in ("create_task", "ensure_future", "TaskGroup", "run_coroutine_threadsafe"):
                found.add(path.relative_to(root).as_posix())
    assert found == {"tasks/supervisor.py", *SHORT_TASKS}


# --- one task ---


class Work:
    """What a supervised task does: as told, each time that it is started."""

    def __init__(self) -> None:
        self.starts = 0
        self.error: BaseException | None = None

    async def __call__(self) -> None:
        self.starts += 1
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()


@pytest.fixture
async def work() -> AsyncIterator[tuple[Work, SupervisedTask]]:
    given = Work()
    task = Supervisor().task("work", given)
    yield given, task
    await task.stop()


async def test_what_a_task_raises_is_logged_once_and_it_starts_again(
    work: tuple[Work, SupervisedTask], caplog: pytest.LogCaptureFixture
) -> None:
    """The class is logged and never the text; a task that keeps failing floods no log."""
    given, task = work
    given.error = LookupError("canary")
    task.start()
    await eventually(lambda: given.starts >= 4)
    state = task.state()
    assert (state.running, state.last_error) == (False, "LookupError")
    assert state.restarts >= 3
    given.error = None
    await eventually(lambda: task.state().running)
    assert task.state().restarting_seconds == 0
    errors = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "LookupError" in errors[0].getMessage()
    assert "canary" not in caplog.text


@pytest.mark.parametrize("how", ["return", "cancelled"])
async def test_a_task_that_ends_without_an_error_starts_again(
    work: tuple[Work, SupervisedTask], how: str
) -> None:
    """A return and a stray cancellation are failures too."""
    given, task = work
    if how == "cancelled":
        given.error = asyncio.CancelledError()
    else:
        task._work = _returns
    task.start()
    await eventually(lambda: task.state().restarts >= 2)
    assert not task.state().running


async def _returns() -> None:
    return


async def test_a_stopped_task_stays_stopped(work: tuple[Work, SupervisedTask]) -> None:
    """A task can be stopped while it waits to be restarted, and started again."""
    given, task = work
    given.error = LookupError()
    task.start()
    await eventually(lambda: task.restarts >= 2)
    await task.stop()
    starts = given.starts
    await asyncio.sleep(0.15)
    assert given.starts == starts
    given.error = None
    task.start()
    await eventually(lambda: task.state().running)


# --- a whole server ---


async def _fails() -> None:
    raise LookupError("canary")


@pytest.mark.parametrize("name", NEEDED)
async def test_each_task_comes_back_and_readyz_tells(
    server: InLoopServer, admin: Api, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """While a needed task keeps failing, /readyz is red and names it; then all is as before."""
    task: SupervisedTask = server.running.services.supervisor._tasks[name]
    work = task._work
    task._work = _fails
    cancel(name)

    async def is_red() -> Any:
        answer = await admin.get("/readyz")
        told = answer.json["background"][name]
        return answer.status == 503 and not answer.json["tasks"] and told["restarts"] > 1 and told

    told = await eventually(is_red)
    assert (told["running"], told["last_error"]) == (False, "LookupError")
    metrics = await admin.get("/metrics")
    assert f'slm_task_running{{task="{name}"}} 0.0' in metrics.body.decode()
    task._work = work

    async def is_green() -> bool:
        return (await admin.get("/readyz")).status == 200

    await eventually(is_green)
    async with admin.stream() as socket:
        assert (await socket.next())["type"] == "subscribed"
        assert (await admin.put("default", llm_model="after")).status == 200
        assert (await socket.until(2))[-1]["type"] == "agent_config_changed"
    assert "canary" not in caplog.text


async def test_a_broadcast_that_ends_halfway_loses_no_change(
    server: InLoopServer, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known who has the change, so every stream is closed and resumes with all of it."""
    hub = server.running.services.hub
    async with admin.stream() as socket:
        await socket.next()
        await eventually(lambda: hub.live_count() == 1)

        async def stray(_: Any) -> AsyncIterator[list[Any]]:
            monkeypatch.undo()
            raise asyncio.CancelledError
            yield []

        monkeypatch.setattr("slm.server.stream.hub._in_turns", stray)
        assert (await admin.put("default", llm_model="m2")).status == 200
        await eventually(lambda: hub.live_count() == 0)
    async with admin.stream(since=1, epoch=hub.epoch) as socket:
        assert [frame["revision"] for frame in await socket.until(2)][-1] == 2


def cancel(name: str) -> None:
    """Cancel a task from outside, as a fault in a library does."""
    [task] = [each for each in asyncio.all_tasks() if each.get_name() == f"slm-{name}"]
    task.cancel()


async def test_postgresql_has_two_tasks_more_and_a_listener(
    postgres_url: str, tmp_path: Path
) -> None:
    """The tasks of several replicas come back too, and are not needed to be ready."""
    options = {"database_url": postgres_url, "encryption_keys": KEY, "changes_keep": 1000}
    async with running_server(tmp_path / "data", **options) as server:
        states = server.running.services.supervisor.states
        others = {state.name for state in states() if not state.needed}
        assert others == {"listener", "fleet-write", "fleet-read", "fleet-forget", "compaction"}
        for name in others:
            cancel(name)
        await eventually(
            lambda: all(s.running and s.restarts == 1 for s in states() if s.name in others)
        )


BAD_PAYLOADS = [
    *("", "x", "²", "٣", "-1", "1e3", "9" * 5000, "9" * 19, "1/1 {", "1/1 []", "1/1 null", "1/1 7"),
    *('1/1 {"answer": []}', '1/1 {"answer": {}}', '1/1 {"replica": []}', "/", "1/", "a/b c"),
    *('1/1 {"replica": "REPLICA"}', '1/1 {"replica": "REPLICA", "backend": []}'),
    *('1/1 {"replica": "REPLICA", "backend": "b", "ask": {}}', "1/1 " + "[" * 5000, "\ud7ff"),
    *('1/1 {"answer": "a", "report": 1}', "2/9 x", '1/1 {"\\ud800": "\\ud800"}'),
]


async def test_no_notification_ends_the_listening(postgres_url: str, tmp_path: Path) -> None:
    """Whoever may connect to the database can notify; nothing that they send stops the wake-ups."""
    options = {"database_url": postgres_url, "encryption_keys": KEY, "poll_interval_seconds": 30}
    async with running_server(tmp_path / "data", **options) as server:
        services = server.running.services
        [listener] = [s for s in services.supervisor.states() if s.name == "listener"]
        with connect(postgres_url) as other:
            for channel in (CHANNEL, explanations.CHANNEL, fleet_sync.CHANNEL):
                for payload in BAD_PAYLOADS:
                    said = payload.replace("REPLICA", services.fleet.replica)
                    other.execute("SELECT pg_notify(%s, %s)", (channel, said))
            other.execute("UPDATE tokens SET name = 'renamed' WHERE name = 'backend'")
            other.execute("UPDATE state SET tokens_version = tokens_version + 1")
            other.execute(f"NOTIFY {CHANNEL}")
        # No poll for half a minute: that this is seen is the listener's work.
        await eventually(lambda: "renamed" in {t.name for t in services.tokens._by_id.values()})
        [listener] = [s for s in services.supervisor.states() if s.name == "listener"]
        assert (listener.running, listener.restarts) == (True, 0)


async def test_pieces_that_never_end_are_not_kept(postgres_url: str, tmp_path: Path) -> None:
    """Pieces of an explanation whose last one never comes take a bounded place."""
    options = {"database_url": postgres_url, "encryption_keys": KEY}
    async with running_server(tmp_path / "data", **options) as server:
        heard = server.running.services.explanations
        for number in range(2, 5000):
            heard.hear(f"{number}/9999 " + "x" * 100)
        assert len(heard._pieces) <= explanations.MAX_PIECES
        ask = f'1/1 {{"replica": "{server.running.services.fleet.replica}", "backend": "b"}}'
        for _ in range(5000):
            heard.hear(ask)
        assert len(heard._tasks) <= explanations.MAX_ANSWERS


def test_the_fleet_of_a_server_alone_runs_no_task() -> None:
    """A task that was never started is not reported."""
    states = Supervisor()
    FleetSync(None, Fleet("r", "s", lambda token_id: ""), 1, 1, states)  # type: ignore[arg-type]
    assert states.states() == []
