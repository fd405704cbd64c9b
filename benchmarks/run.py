"""What a bench is, and how its results are kept: one JSON file each, raw repeats and all."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"


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


async def run(bench: Bench, options: Options, folder: Path) -> None:
    """Measure, and keep what was measured with where and when."""
    begin = time.monotonic()
    data = await bench.measure(options)
    kept = {
        "bench": bench.name,
        "title": bench.title,
        "taken": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "seconds": round(time.monotonic() - begin, 1),
        "repeats": options.repeats,
        "quick": options.quick,
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "data": data,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{bench.name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def say(what: str, figures: dict[str, Any]) -> None:
    """Print a line as things are measured."""
    shown = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in figures.items()
        if not isinstance(value, list | dict)
    )
    print(f"{what}: {shown}", file=sys.stderr, flush=True)
