"""From the write to the callback, against what people know for it: one watcher, and 500.

Each repeat takes every peer in turn, and begins with another one. The writer is this process, all
watchers are one other process; nothing is pinned, as on a real machine.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.harness import stats
from benchmarks.harness.errors import Missing
from benchmarks.harness.run import Bench, Options, say
from benchmarks.peers import Peer

WARM_UP = 5


@dataclass(frozen=True)
class Shape:
    """How many watchers, how many changes, how long between them."""

    watchers: int
    changes: int
    gap_seconds: float


FULL = (Shape(1, 200, 0.005), Shape(500, 25, 0.12))
QUICK = (Shape(1, 60, 0.005), Shape(100, 15, 0.05))


async def measure(options: Options) -> dict[str, Any]:
    shapes = QUICK if options.quick else FULL
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    missing: dict[str, str] = {}
    for repeat in range(options.repeats):
        for name in _rotated(list(peers.PEERS), repeat):
            if name in missing:
                continue
            try:
                cls = peers.load(name)
            except ImportError as error:
                missing[name] = f"{error.name} (make bench installs it)"
                continue
            for shape in shapes:
                try:
                    taken = await _one(name, cls, shape)
                except Missing as error:
                    missing[name] = str(error)
                    break
                except Exception as error:
                    if name == "slm":
                        raise
                    # A peer that fails once is told of and left out; the others go on.
                    missing[name] = (
                        f"failed at × {shape.watchers} in repeat {repeat + 1}: {error!r}"
                    )
                    rows.pop(name, None)
                    break
                say(f"propagation {repeat + 1}: {name} × {shape.watchers}", taken)
                per_shape = rows.setdefault(name, {})
                per_shape.setdefault(str(shape.watchers), []).append(taken)
    # As they are listed, whoever was taken first.
    rows = {name: rows[name] for name in peers.PEERS if name in rows}
    missing = {name: missing[name] for name in peers.PEERS if name in missing}
    labels = {n: peers.load(n).label for n in rows}
    durability = {n: peers.load(n).durability for n in rows}
    return {
        "shapes": [vars(shape) for shape in shapes],
        "peers": rows,
        "labels": labels,
        "durability": durability,
        "missing": missing,
    }


def _rotated(names: list[str], by: int) -> list[str]:
    """Return the names beginning with another one: nobody always comes after the same peer."""
    first = by % len(names)
    return [*names[first:], *names[:first]]


async def _one(name: str, cls: type[Peer], shape: Shape) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="slm-bench-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        peer = cls(Path(folder) / name)
        try:
            await peer.start()
            return await _changes(name, peer, shape, Path(folder) / "times.json")
        finally:
            await peer.stop()


async def _changes(name: str, peer: Peer, shape: Shape, out: Path) -> dict[str, Any]:
    arguments = [name, str(shape.watchers), json.dumps(peer.address), str(out)]
    watchers = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.peers.watchers",
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert watchers.stdin is not None
    assert watchers.stdout is not None
    try:
        async with asyncio.timeout(100):
            if (await watchers.stdout.readline()).strip() != b"READY":
                raise RuntimeError(f"the watchers of {name} failed")
        await asyncio.sleep(0.3)
        sent, answered = {}, {}
        for sequence in range(1, WARM_UP + shape.changes + 1):
            begin = time.monotonic_ns()
            key = await peer.write(sequence)
            answered[key] = time.monotonic_ns()
            sent[key] = begin
            await asyncio.sleep(shape.gap_seconds)
        await asyncio.sleep(1)
        commits = await peer.commit_times()
        watchers.stdin.write(b"STOP\n")
        async with asyncio.timeout(60):
            await watchers.stdout.readline()
            await watchers.wait()
    finally:
        if watchers.returncode is None:
            watchers.kill()
            await watchers.wait()
    received = {int(key): times for key, times in json.loads(out.read_text()).items()}
    return _figures(shape, sent, answered, commits, received)


def _figures(
    shape: Shape,
    sent: dict[int, int],
    answered: dict[int, int],
    commits: dict[int, int],
    received: dict[int, list[int]],
) -> dict[str, Any]:
    """All in milliseconds: over every callback of every change, the warm-up left out."""
    write, from_sent, from_commit, last, missed = [], [], [], [], 0
    for key in list(sent)[WARM_UP:]:
        times = [t for t in received.get(key, []) if t]
        missed += shape.watchers - len(times)
        if not times:
            continue
        write.append((answered[key] - sent[key]) / 1e6)
        from_sent += [(t - sent[key]) / 1e6 for t in times]
        last.append((max(times) - sent[key]) / 1e6)
        if key in commits:
            from_commit += [(t - commits[key]) / 1e6 for t in times]
    found: dict[str, Any] = {
        "missed": missed,
        "write_p50": stats.quantile(write, 0.5),
        "sent_p50": stats.quantile(from_sent, 0.5),
        "sent_p99": stats.quantile(from_sent, 0.99),
        "last_p50": stats.quantile(last, 0.5),
        "curve": stats.curve(from_sent),
    }
    if from_commit:
        found["commit_p50"] = stats.quantile(from_commit, 0.5)
        found["commit_p99"] = stats.quantile(from_commit, 0.99)
    return found


BENCH = Bench("propagation", "From the write to the callback", measure)
