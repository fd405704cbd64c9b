"""How a run of benches is kept: nothing of an earlier run stands in for one that failed."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import __main__ as command
from benchmarks.harness import run
from benchmarks.harness.errors import Missing
from benchmarks.harness.run import Bench, Options
from benchmarks.report import report


async def measures(options: Options) -> dict[str, Any]:
    return {"repeats": options.repeats}


async def fails(options: Options) -> dict[str, Any]:
    raise RuntimeError("broken on purpose")


async def lacks(options: Options) -> dict[str, Any]:
    raise Missing("a C compiler (apt-get install gcc)")


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """Run the command on three benches that are in no target."""
    benches = [
        Bench(name, name, measure)
        for name, measure in (("good", measures), ("bad", fails), ("poor", lacks))
    ]
    monkeypatch.setattr(command, "BENCHES", benches)
    monkeypatch.setattr(run, "RESULTS", folder)
    # The limit on open files would outlive the test.
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", *arguments])
    return command.main()


def test_a_bench_that_fails_leaves_no_old_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are kept, the failed one is named, and the command ends in 1."""
    quick = tmp_path / "quick"
    quick.mkdir()
    for name in ("good", "bad", "poor"):
        (quick / f"{name}.json").write_text("an earlier run's")
    assert call(monkeypatch, tmp_path) == 1
    assert {path.stem for path in quick.iterdir()} == {"good", "poor"}
    assert "Failed: bad\n" in capsys.readouterr().err
    kept = report.read(quick)
    assert kept.results == {"good": {"repeats": 1}}
    assert kept.missing == {"poor": "a C compiler (apt-get install gcc)"}
    assert kept.files["good"]["run"] == kept.files["poor"]["run"]


def test_what_is_not_installed_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said and kept, and the command ends in 0."""
    assert call(monkeypatch, tmp_path, "good", "poor") == 0
    assert "poor: not measured here: a C compiler" in capsys.readouterr().err


def test_a_malformed_result_ends_in_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told of by its bench's name, without a traceback."""
    folder = tmp_path / "quick"
    folder.mkdir()
    (folder / "growth.json").write_text(json.dumps({"data": {}}))
    assert call(monkeypatch, tmp_path, "good") == 1
    assert "the kept result of growth" in capsys.readouterr().err
