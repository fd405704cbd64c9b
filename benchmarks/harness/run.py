"""What a bench is, and how its results are kept: one JSON file each, raw repeats and all.

A file has `data`, what the bench measured, or `missing`, what it needs and did not find.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.errors import Missing

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Options:
    """How thoroughly to measure."""

    repeats: int
    quick: bool


@dataclass(frozen=True)
class Bench:
    """One bench: `measure` returns plain JSON, with a list of one value a repeat per figure."""

    name: str
    title: str
    measure: Callable[[Options], Awaitable[dict[str, Any]]]


def new_run() -> str:
    """Return the name of a run: when it began."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


async def run(bench: Bench, options: Options, folder: Path, run_name: str) -> str | None:
    """Measure, and keep what was measured with where and when.

    The result of an earlier run goes first, so that a bench that fails leaves none that would pass
    for this run's.

    Returns:
        What the bench needs and is not installed, which is kept in the place of figures.
    """
    kept_file = folder / f"{bench.name}.json"
    kept_file.unlink(missing_ok=True)
    begin = time.monotonic()
    outcome: dict[str, Any]
    missing = None
    try:
        outcome = {"data": await bench.measure(options)}
    except Missing as error:
        missing = str(error)
        outcome = {"missing": missing}
    kept = {
        "bench": bench.name,
        "title": bench.title,
        "run": run_name,
        "taken": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "seconds": round(time.monotonic() - begin, 1),
        "repeats": options.repeats,
        "quick": options.quick,
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    kept_file.write_text(json.dumps(kept | outcome, indent=1) + "\n")
    return missing


def say(what: str, figures: dict[str, Any]) -> None:
    """Print a line as things are measured."""
    shown = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in figures.items()
        if not isinstance(value, list | dict)
    )
    print(f"{what}: {shown}", file=sys.stderr, flush=True)
