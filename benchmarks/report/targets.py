"""The targets, each held against what was measured; what was not measured is said to be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.harness.errors import reading
from benchmarks.report import judges
from benchmarks.report.judges import Data, Judge, Judged

Results = Mapping[str, Data]
"""What each bench measured, by its name."""

NO_RESULT = Judged("no result", None, "not measured")


@dataclass(frozen=True)
class Row:
    """One target: what was measured for it, and whether that meets it.

    Attributes:
        key: names the target in `notes.MISSED`.
        what: what is measured, with its size.
        target: what it should be.
        measured: the figures.
        met: None when they do not say.
        verdict: `met` in words, with why it is None.
    """

    key: str
    what: str
    target: str
    measured: str
    met: bool | None
    verdict: str


@dataclass(frozen=True)
class _Target:
    key: str
    bench: str
    what: str
    target: str
    judge: Judge


def rows(results: Results, missing: Mapping[str, str]) -> list[Row]:
    """Return every target, in the order in which they are told.

    Args:
        results: what was measured, by bench.
        missing: what a bench that could not be measured here needs, by bench.

    Raises:
        Malformed: a result lacks what its bench always writes.
    """
    found = []
    for target in _TARGETS:
        judged = _judge(target, results, missing)
        verdict = {True: "met", False: "**missed**", None: judged.why_not}[judged.met]
        found.append(
            Row(target.key, target.what, target.target, judged.measured, judged.met, verdict)
        )
    return found


def _judge(target: _Target, results: Results, missing: Mapping[str, str]) -> Judged:
    if target.bench in missing:
        return Judged(f"not measured here: {missing[target.bench]}", None, "not measured")
    if target.bench not in results:
        return NO_RESULT
    with reading(target.bench):
        return target.judge(results[target.bench])


_TARGETS = (
    _Target(
        "fanout-10000",
        "fanout",
        "10,000 subscribers, one change: commit to the last frame received",
        "at most 1.3 times a C send() loop over the same sockets",
        judges.fan_ratio(10_000, 1.3),
    ),
    _Target(
        "fanout-1000",
        "fanout",
        "1,000 subscribers, one change: the same",
        "at most 1.5 times",
        judges.fan_ratio(1_000, 1.5),
    ),
    _Target(
        "memory",
        "fanout",
        "memory a subscriber, of 10,000, handed to a slim protocol",
        "at most 6 KiB; at most 32 KiB with the acks that are kept of it",
        judges.memory,
    ),
    _Target(
        "accept",
        "accept",
        "connections accepted a second, over 3,000",
        "at least 1,500; TLS: as measured",
        judges.accepted,
    ),
    _Target(
        "commit-1",
        "propagation",
        "commit to callback, 1 backend",
        "p50 at most 0.5 ms, p99 at most 3 ms",
        judges.commit_to_callback(1, 0.5, 3),
    ),
    _Target(
        "commit-500",
        "propagation",
        "commit to callback, 500 backends in one process",
        "p50 at most 22 ms, p99 at most 35 ms",
        judges.commit_to_callback(500, 22, 35),
    ),
    _Target(
        "put-1",
        "propagation",
        "PUT sent to callback, SQLite FULL, 1 backend",
        "no slower than etcd put-to-watch",
        judges.ahead(1, ["etcd"]),
    ),
    _Target(
        "put-500",
        "propagation",
        "PUT sent to callback, SQLite FULL, 500 backends",
        "ahead of etcd, NATS KV and PostgreSQL NOTIFY",
        judges.ahead(500, ["etcd", "nats", "postgres"]),
    ),
    _Target(
        "reads",
        "reads",
        "`resolve` / `get_agent_config`, of 1,000 agents, awaited, while live",
        "at most 250 / 400 ns; `resolve` 50 times under LaunchDarkly, 200 under Unleash",
        judges.reads,
    ),
    _Target(
        "gets",
        "http",
        "GET one agent / the list of 1,000, one core",
        "at least 6,000 / 1,500 a second, p99 at most 20 ms",
        judges.gets,
    ),
    _Target(
        "during",
        "http",
        "GET latency during a broadcast to 10,000",
        "p99 at most 30 ms",
        judges.during,
    ),
    _Target(
        "connect",
        "startup",
        "`connect()` with 10,000 agents with keys",
        "at most 1 s; 2 KiB of memory an agent",
        judges.connect,
    ),
    _Target(
        "llm",
        "llm",
        "LLMInterface over the bare official SDK, same call",
        "at most 5 % CPU, at most 0.1 ms",
        judges.llm,
    ),
    _Target(
        "import",
        "startup",
        "`import slm` with SLMClient and LLMInterface",
        "at most 1.3 times `import aiohttp` plus `import pydantic`",
        judges.imports,
    ),
    _Target(
        "growth",
        "growth",
        "growth from 10 to 100,000 agents: PUT, resolve",
        "flat (at most 1.2 times)",
        judges.growth,
    ),
    _Target(
        "history",
        "history",
        "a page of 100 of the history or the audit, of 1,000,000 rows, any filter, both engines",
        "p50 at most 20 ms; 5 MiB of the server's memory",
        judges.history,
    ),
)
