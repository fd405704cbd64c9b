"""docs/reference/codes.md has every code, status and exit code that there is, and no other."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tools.docs.commands import commands

import slm.errors
from slm import ClientStatus
from slm.cli import app
from slm.errors import ProblemError, SLMError, problem_classes

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "codes.md").read_text()


def rows(title: str) -> list[list[str]]:
    """Return the cells of the table under this title, without its head."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]


def test_every_problem_has_its_status_and_a_remedy() -> None:
    """The first table is that of the errors that the server answers, each once."""
    told = rows("Problems of the server")
    there = {code: str(cls.status) for code, cls in problem_classes().items()}
    del there[ProblemError.code]
    assert sorted((code, status) for code, status, *_ in told) == sorted(there.items())
    assert all(len(row) == 4 and row[2] and row[3] for row in told)
    assert f"`{ProblemError.code}`" in PAGE


def test_every_error_of_the_sdk_has_its_code_and_a_remedy() -> None:
    """The second table has each other error of slm.errors, each once."""
    told = rows("Errors of the SDK")
    kinds = [each for each in vars(slm.errors).values() if isinstance(each, type)]
    there = {
        each.__name__: each.code
        for each in kinds
        if issubclass(each, SLMError) and not issubclass(each, ProblemError)
    }
    assert sorted((name, code) for name, code, *_ in told) == sorted(there.items())
    assert all(len(row) == 4 and row[2] and row[3] for row in told)


def test_every_status_of_a_client_is_explained() -> None:
    """The third table has each ClientStatus, in the order of the code."""
    assert [row[0] for row in rows("Statuses of a client")] == [each.value for each in ClientStatus]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `slm` with these arguments, away from any server."""
    return subprocess.run(
        [sys.executable, "-m", "slm", *arguments], capture_output=True, text=True, timeout=60
    )


def test_every_exit_code_is_what_a_command_ends_with(tmp_path: Path) -> None:
    """Done, failed and not understood, each by a command that ends so; 130 is in the table too."""
    told = [row[0] for row in rows("Exit codes of the command line")]
    ended = [
        run("--version").returncode,
        run("agents", "list", "--url", "http://127.0.0.1:9", "--data", str(tmp_path)).returncode,
        run("agents", "--no-such-option").returncode,
        app.EXIT_INTERRUPTED,
    ]
    assert told == [str(code) for code in ended] == ["0", "1", "2", "130"]


def test_an_interrupted_command_ends_with_130(tmp_path: Path) -> None:
    """Ctrl-C in a command that runs until it is stopped."""
    process = subprocess.Popen(
        [sys.executable, "-m", "slm", "serve", "--port", "0", "--data", str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watching: subprocess.Popen[str] | None = None
    try:
        assert process.stdout is not None
        url = next(re.findall(r"http://\S+", line) for line in process.stdout if "ready" in line)[0]
        watching = subprocess.Popen(
            [sys.executable, "-m", "slm", "watch", "--url", url, "--data", str(tmp_path / "data")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert watching.stdout is not None
        watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=60)
        assert watching.returncode == 130
    finally:
        for each in (watching, process):
            if each is not None and each.poll() is None:
                each.kill()
            if each is not None:
                each.communicate()


@pytest.mark.parametrize("command", ["`slm agents key-status`", "`slm audit verify`"])
def test_commands_of_the_exit_codes_exist(command: str) -> None:
    """A command named beside exit code 1 is one."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "commands.md").read_text()
    assert command in page.partition("## Exit codes")[2].partition("<!-- generated")[0]
    assert command.strip("`") in dict(commands())
