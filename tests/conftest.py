"""Fixtures of all tests: a real server on port 0, and clients that call it with its tokens."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.raw import Api
from tests.support.servers import InLoopServer, running_server

# What the shell of whoever runs the tests has set must not reach a server under test.
for _name in [name for name in os.environ if name.startswith("SLM_") and "_TEST_" not in name]:
    del os.environ[_name]

# A shell makes its background jobs deaf to Ctrl-C, and children inherit that; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what was loaded and collected out of every later garbage collection.

    It is most of a test process, and lives as long: to search it took half a second each time, in
    which servers under test, at a tenth of the usual timings, stood still.
    """
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured, as docs/reliability.md has it."""
    measured = [
        (report.nodeid.partition("::")[2], report.user_properties)
        for report in terminalreporter.getreports("passed")
        if report.when == "call" and report.user_properties
    ]
    if measured:
        terminalreporter.section("measured")
        for name, properties in sorted(measured):
            shown = ", ".join(f"{what}={value}" for what, value in properties)
            terminalreporter.line(f"{name}: {shown}")


@pytest.fixture(autouse=True)
def _own_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients keep by default is kept in the test's own folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InLoopServer]:
    """A server with nothing but its default agent, in the test's own loop."""
    async with running_server(tmp_path / "data") as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """One HTTP client session for the test."""
    async with aiohttp.ClientSession() as opened:
        yield opened


@pytest.fixture
def admin(server: InLoopServer, session: aiohttp.ClientSession) -> Api:
    """An operator's calls: keys are read with the backend's token, all else with the admin's."""
    return Api(server, session, server.admin_token, key_token=server.backend_token)


@pytest.fixture
def backend(server: InLoopServer, session: aiohttp.ClientSession) -> Api:
    """Calls with a token of config:read and key:read."""
    return Api(server, session, server.backend_token)


@pytest.fixture
def anonymous(server: InLoopServer, session: aiohttp.ClientSession) -> Api:
    """Calls without a token."""
    return Api(server, session)
