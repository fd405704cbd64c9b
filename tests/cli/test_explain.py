"""`slm explain`, asked of a backend that is a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from slm.protocol import Explanation
from tests.support.command import CANARY, environment, slm
from tests.support.raw import Api
from tests.support.sdk import applied, fleet_of
from tests.support.servers import InLoopServer, eventually, running_server

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InLoopServer]:
    """A server that leaves a backend which hangs its connection for a minute."""
    patient = {"ping_interval_seconds": 60.0, "ping_timeout_seconds": 60.0}
    async with running_server(tmp_path / "data", **patient) as running:
        (running.data_dir / "server.url").write_text(f"{running.url}\n")
        yield running


@contextlib.contextmanager
def backend_process(server: InLoopServer, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the backend of docs/operating.md as a process for the block's length."""
    (code,) = re.findall(r"```python\n(.*?)```", OPERATING.read_text(), re.DOTALL)
    assert "http://127.0.0.1:8760" in code
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8760", server.url), name],
        env=environment(SLM_TOKEN_FILE=str(server.data_dir / "backend.token")),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_a_backend_explains_itself(server: InLoopServer, admin: Api) -> None:
    """Each step says what it said; the one that answered is marked, and the key is not shown."""
    made = await admin.create(
        "a", llm_provider="openai", llm_model="gpt-6.1-sol", llm_api_key=CANARY
    )
    with backend_process(server, "billing") as process:
        await eventually(lambda: applied(admin, made.revision, "billing"), 30)
        full_name = (await fleet_of(admin))["billing"]["backend"]
        own = await slm("explain", "a", "--on", "billing", data=server.data_dir)
        assert (own.code, own.err) == (0, "")
        assert own.out.splitlines() == [
            f"a on {full_name}: answered by agent",
            "the client is live, at revision 2",
            "→ agent        the SLM's present config",
            "               openai/gpt-6.1-sol of agent a, revision 2, 0 s old, "
            "key set at revision 2, came with the snapshot of all agents",
            "  default      the SLM's present config",
            "               ollama/mistral:7b-instruct of agent default, revision 1, 0 s old, "
            "no key",
            "  environment  no AUTOBOT_LLM_* variable is set",
            "  hardcoded    the last resort",
            "               ollama/mistral:7b-instruct at http://localhost:11434, no key",
        ]
        other = await slm("explain", "b", "--on", full_name, "--json", data=server.data_dir)
        assert other.code == 0
        told = Explanation.model_validate(other.json)
        assert told.answered_by == "default"
        assert told.steps[0].said == "the SLM has no agent of this name that this token may see"
        assert process.poll() is None


async def test_no_such_backend(server: InLoopServer, admin: Api) -> None:
    """A name under which nobody is connected: exit 1, and the line says who is."""
    asked = ("explain", "a", "--on", "nobody")
    alone = await slm(*asked, data=server.data_dir)
    assert (alone.code, alone.out) == (1, "")
    assert alone.error == "No backend is connected."
    with backend_process(server, "billing"):
        await eventually(lambda: applied(admin, 1, "billing"), 30)
        name = (await fleet_of(admin))["billing"]["backend"]
        missing = await slm(*asked, "--json", data=server.data_dir)
        assert (missing.code, missing.out) == (1, "")
        assert missing.error == f"No connected backend has this name; connected: {name}."
    nowhere = await slm("explain", "a", data=server.data_dir)
    assert nowhere.code == 2
    assert "--on" in nowhere.error


async def test_a_backend_that_hangs(
    server: InLoopServer, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process does not answer: exit 1, and the line names it; it answers once it runs."""
    with backend_process(server, "billing") as process:
        await eventually(lambda: applied(admin, 1, "billing"), 30)
        os.kill(process.pid, signal.SIGSTOP)
        with monkeypatch.context() as impatient:
            impatient.setattr("slm.server.fleet.explain.ANSWER_SECONDS", 0.5)
            silent = await slm("explain", "a", "--on", "billing", data=server.data_dir)
        assert (silent.code, silent.out) == (1, "")
        name = (await fleet_of(admin))["billing"]["backend"]
        assert silent.error.startswith(f"{name} did not answer within 0.5 s")
        os.kill(process.pid, signal.SIGCONT)
        again = await slm("explain", "a", "--on", "billing", data=server.data_dir)
        assert again.code == 0, again
