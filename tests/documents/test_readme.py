"""The README, played from an empty directory with the wheel that a release builds; its figures."""

from __future__ import annotations

import asyncio
import json
import os
import re
from datetime import date
from pathlib import Path

import pytest

from tests.documents.blocks import ROOT, blocks
from tests.documents.replay import Replay
from tests.documents.test_tutorial import free_ports
from tests.support.recorder import recording_provider
from tests.test_packaging import environment, wheel

__all__ = ["wheel"]

README = (ROOT / "README.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.documents
@pytest.mark.timeout(180)
@pytest.mark.xdist_group("packaging")
async def test_the_readme_works_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    """Server, agent, token, backend, in that order, as they are printed; then FastAPI and sync."""
    python = environment(tmp_path / "env", wheel, "server")
    program = python.parent / "slm"
    program.write_text(f'#!/bin/sh\nexec {python} -I -m slm "$@"\n')
    program.chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir()
    ports = dict(zip(("8760", "8000"), free_ports(2), strict=True))
    environ = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "OPENAI_API_KEY": "sk-readme-canary",
        "SLM_PORT": ports["8760"],
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    async with recording_provider() as provider:
        here = {"--model gpt-6.1-sol": f"--model gpt-6.1-sol --endpoint {provider.openai_url}"}

        def play() -> None:
            with Replay(folder, environ, ports | here) as replay:
                replay.play(blocks("README.md", "python", "console"))

        await asyncio.to_thread(play)


@pytest.mark.parametrize(
    ("target", "figure", "shown"),
    [
        ("commit to callback, 1 backend, p50", r"\*\*([\d.]+)\*\* ms", r"([\d.]+) ms \(p50, one"),
        (
            "commit to callback, 500 backends, p50",
            r"\*\*([\d.]+)\*\* ms",
            r"([\d.]+) ms \(500 back",
        ),
        ("`resolve` of 1,000 agents", r"\*\*([\d.]+)\*\* ns", r"costs ([\d.]+) ns while"),
        ("10,000 subscribers", r"\*\*([\d.]+)\*\* ms", r"backends in ([\d.]+) ms"),
    ],
)
def test_the_figures_are_those_of_the_bench(target: str, figure: str, shown: str) -> None:
    """What the README claims is what docs/performance.md says, rounded."""
    (row,) = re.findall(rf"^\| {re.escape(target)}.*$", PERFORMANCE, re.MULTILINE)
    measured, told = re.search(figure, row), re.search(shown, README)
    assert measured is not None
    assert told is not None
    digits = len(told[1].partition(".")[2])
    assert float(told[1]) == round(float(measured[1]), digits)


def test_the_dates_are_those_of_the_results() -> None:
    """Each file of figures that the README names was taken on the day that stands beside it."""
    named = re.findall(r"\((benchmarks/results/\w+\.json)\), (\d+) (\w+) (\d{4})", README)
    assert len(named) >= 3
    for file, day, month, year in named:
        taken = json.loads((ROOT / file).read_text())["taken"]
        assert f"{date.fromisoformat(taken[:10]):%-d %B %Y}" == f"{day} {month} {year}"
