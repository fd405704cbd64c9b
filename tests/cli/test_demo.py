"""`slm demo`: the whole way with real parts, that ends by itself and leaves nothing."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path

import pytest

from slm.cli.demo import local_model
from tests.support.command import environment, slm, slm_at_a_terminal
from tests.support.servers import eventually

pytestmark = [
    pytest.mark.real_llm,
    pytest.mark.xdist_group("real_llm"),
    pytest.mark.skipif(local_model.missing() is not None, reason=str(local_model.missing())),
]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """An environment in which the demo's temporary files can be seen."""
    (tmp_path / "temporary").mkdir()
    return {"TMPDIR": str(tmp_path / "temporary")}


def processes_of(places: dict[str, str]) -> list[str]:
    """Return the command lines of the running processes that came from this demo."""
    mark = f"TMPDIR={places['TMPDIR']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]


def files_of(places: dict[str, str]) -> list[Path]:
    """Return the temporary files that are there."""
    return list(Path(places["TMPDIR"]).iterdir())


async def test_each_change_is_used_by_the_very_next_request(
    places: dict[str, str], tmp_path: Path
) -> None:
    """Five steps, each answered by the revision just written; it ends with 0 and leaves nothing.

    At a terminal of 160 columns, where each line stands whole, and in colour.
    """
    done = await asyncio.to_thread(
        slm_at_a_terminal, "demo", data=tmp_path / "unused", answers={}, columns=160, env=places
    )
    assert done.code == 0, done.out
    assert "\x1b[" in done.out
    # A spinner goes back to the start of its line to draw itself anew.
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|(?<=\r)\r", "", done.out).replace("\r\n", "\n")
    shown = shown.replace("\r", "\n")
    told = re.findall(
        r"^by +(\w+)/\S+, step (\w+), revision (\d+).*client (\w+)\)", shown, re.MULTILINE
    )
    assert told == [
        ("openai", "agent", "2", "live"),
        ("openai", "agent", "3", "live"),
        ("anthropic", "agent", "4", "live"),
        ("anthropic", "agent", "4", "disconnected"),
        ("anthropic", "agent", "5", "live"),
    ]
    answers = re.findall(r"^answer +(.+)$", shown, re.MULTILINE)
    assert len(answers) == 5
    assert len(answers[1]) < len(answers[0]), "fewer tokens make a shorter answer"
    assert "demo-key" not in shown
    assert max(map(len, shown.splitlines())) <= 160
    assert processes_of(places) == []
    assert files_of(places) == []


async def started(places: dict[str, str], *arguments: str, until: str) -> tuple[Process, str]:
    """Start the demo and read its output until a text has come."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "slm", "demo", *arguments),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env=environment(env=places),
    )
    assert process.stdout is not None
    shown = ""
    async with asyncio.timeout(60):
        while until not in shown:
            line = (await process.stdout.readline()).decode()
            assert line, shown
            shown += line
    return process, shown


@pytest.mark.documents
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_it_can_be_stopped_anywhere(places: dict[str, str], number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM or a closed terminal: no process and no file of it is left."""
    process, shown = await started(places, until="took")
    assert "\x1b" not in shown, "plain where it is no terminal"
    assert len(processes_of(places)) >= 4, "the demo, its SLM, its backend and its model"
    process.send_signal(number)
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    assert process.returncode == 130
    assert err == b""
    await eventually(lambda: processes_of(places) == [])
    assert files_of(places) == []


@pytest.mark.documents
async def test_the_commands_that_it_prints_work(places: dict[str, str], tmp_path: Path) -> None:
    """With --stay everything goes on running, and each printed line does what it says."""
    process, shown = await started(places, "--stay", until="agents show")
    try:
        folder = Path(re.findall(r"export SLM_DATA_DIR=(\S+)", shown)[0])
        lines = [
            line.split(maxsplit=1)[1]
            for line in map(str.strip, shown.splitlines())
            if re.match(r"\S*slm (agents|ask)", line)
        ]
        assert len(lines) == 3
        for line in lines:
            words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
            done = await slm(*words, data=folder, cwd=tmp_path)
            assert done.code == 0, done.err
        assert "1.2" in done.out, "the change of the line before"
    finally:
        process.send_signal(signal.SIGINT)
        await process.communicate()


def test_without_a_model_it_says_what_to_install(tmp_path: Path) -> None:
    """Where there is neither Ollama nor the local model, one line says what to do."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\nsys.modules['xllamacpp'] = None\n"
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'xllamacpp' else find(name, *a)\n"
    )
    process = subprocess.run(
        [sys.executable, "-m", "slm", "demo"],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(hidden)),
        timeout=60,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: ")
    assert "pip install --no-deps" in process.stderr
