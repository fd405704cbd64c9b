"""The targets: a table of paths into the results with their limits, and what evaluates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.harness.errors import reading
from benchmarks.harness.stats import figure, ratios
from benchmarks.report.figures import Data, at, show, values


@dataclass(frozen=True)
class Target:
    """One figure and its limit.

    Attributes:
        label: names the figure, and the reason in `notes.MISSED`.
        path: the bench, then where its result has each repeat's value; `{size}` stands for the size
            that was measured.
        at_most: the highest median that meets the target; `at_least` is the lowest.
        unit: KiB are shown of bytes, and % of a ratio: how much more than 1 it is.
        size: the only one at which it is judged; a quick run measures a smaller one.
        over: the path in the same result of what each repeat's value is divided by.
        peer: the product that the figure needs, by its name in the result's `missing`.
        optional: not measured by a quick run.
    """

    label: str
    path: str
    at_most: float | None
    unit: str
    size: int | None = None
    at_least: float | None = None
    over: str = ""
    peer: str = ""
    optional: bool = False

    @property
    def bench(self) -> str:
        return self.path.partition("/")[0]

    @property
    def limit(self) -> str:
        if self.at_most is None:
            return f"at least {self.at_least:,g} {self.unit}"
        return f"at most {self.at_most:,g} {self.unit}"


@dataclass(frozen=True)
class Row:
    """A target beside what was measured for it; `met` is None if the figures do not say."""

    target: Target
    measured: str
    met: bool | None
    verdict: str


def rows(results: Mapping[str, Data], missing: Mapping[str, str]) -> list[Row]:
    """Return every target with what was measured for it.

    Args:
        results: what was measured, by bench.
        missing: what a bench that could not be measured here needs, by bench.

    Raises:
        Malformed: a result lacks what its bench always writes.
    """
    found = []
    for target in TARGETS:
        if target.bench in results:
            with reading(target.bench):
                found.append(_row(target, results[target.bench]))
        else:
            needs = missing.get(target.bench)
            found.append(_open(target, f"not measured here: {needs}" if needs else "no result"))
    return found


def _row(target: Target, data: Data) -> Row:
    if target.peer and target.peer in data["missing"]:
        return _open(target, f"not measured here: {data['missing'][target.peer]}")
    size = _size(at(data, _SIZES[target.bench]), target.size) if target.size else None
    path = target.path.partition("/")[2].format(size=size)
    try:
        taken = values(data, path)
    except LookupError:
        if target.optional:
            return _open(target, "not measured in this run")
        raise
    if target.over:
        taken = ratios(taken, values(data, target.over.format(size=size)))
    if target.unit == "KiB":
        taken = [value / 1024 for value in taken]
    elif target.unit == "%":
        taken = [100 * (value - 1) for value in taken]
    measured, median = show(taken, f" {target.unit}"), figure(taken).median
    if size != target.size:
        return _open(target, measured, f"not judged (at {size:,})")
    met = median >= (target.at_least or 0) if target.at_most is None else median <= target.at_most
    return Row(target, measured, met, "met" if met else "**missed**")


def _open(target: Target, measured: str, verdict: str = "not measured") -> Row:
    return Row(target, measured, None, verdict)


def _size(measured: int | Data, wanted: int) -> int:
    """Return the size that is wanted if it was measured, or else the largest."""
    if isinstance(measured, int):
        return measured
    sizes = [int(size) for size in measured]
    return wanted if wanted in sizes else max(sizes)


_SIZES = {
    "fanout": "per_size",
    "accept": "connections",
    "propagation": "peers/slm",
    "reads": "values",
    "http": "subscribers",
    "startup": "agents",
    "growth": "per_size",
    "history": "rows",
}
"""Where a result says how large it is: a number, or an object by sizes."""

_FAN, _OURS = "fanout/per_size/{size}/", "propagation/peers/slm/{size}/"
_ONE, _LIST = "http/loads/one agent/", "http/loads/the list of 1,000/"


def _put(size: int, peer: str, label: str) -> Target:
    label = f"PUT sent to callback, {size} watcher{'' if size == 1 else 's'}: SLM / {label}"
    theirs = f"peers/{peer}/{{size}}/sent_p50"
    return Target(label, _OURS + "sent_p50", 1, "times", size, over=theirs, peer=peer)


def _grown(label: str, field: str) -> Target:
    path, base = f"growth/per_size/{{size}}/{field}", f"per_size/10/{field}"
    return Target(f"{label} at 100,000 agents / at 10", path, 1.2, "times", 100_000, over=base)


def _slower(peer: str, label: str, times: float) -> Target:
    path, over = f"reads/ns/{peer}", "ns/resolve"
    return Target(label, path, None, "times", 1_000, at_least=times, over=over, peer=peer)


def _page(engine: str, field: str, limit: float, unit: str) -> Target:
    label = f"worst page of 100 of 1,000,000 rows: {engine}, {field.partition('_')[0]}"
    return Target(label, f"history/engines/{engine}/*/{field}", limit, unit, 1_000_000)


TARGETS = (
    Target(
        "one change to 10,000 that only listen: SLM / C loop",
        _FAN + "change_ratio",
        1.3,
        "times",
        10_000,
    ),
    Target(
        "one change to 1,000 that only listen: SLM / C loop",
        _FAN + "change_ratio",
        1.5,
        "times",
        1_000,
    ),
    Target("server memory a subscriber, of 10,000", _FAN + "bytes_a_subscriber", 6, "KiB", 10_000),
    Target(
        "server memory a subscriber, of 1,000, after 1,300 acks, measured once",
        "fanout/memory_acked",
        32,
        "KiB",
        optional=True,
    ),
    Target("connections accepted, of 3,000", "accept/plain", None, "a second", 3_000, 1_500),
    Target("commit to callback, 1 backend, p50", _OURS + "commit_p50", 0.5, "ms", 1),
    Target("commit to callback, 1 backend, p99", _OURS + "commit_p99", 3, "ms", 1),
    Target("commit to callback, 500 backends, p50", _OURS + "commit_p50", 22, "ms", 500),
    Target("commit to callback, 500 backends, p99", _OURS + "commit_p99", 35, "ms", 500),
    _put(1, "etcd", "etcd watch"),
    _put(500, "etcd", "etcd watch"),
    _put(500, "nats", "NATS KV watch"),
    _put(500, "postgres", "PostgreSQL NOTIFY"),
    Target("`resolve` of 1,000 agents, awaited, while live", "reads/ns/resolve", 250, "ns", 1_000),
    Target(
        "`get_agent_config` of 1,000, awaited, while live",
        "reads/ns/get_agent_config",
        400,
        "ns",
        1_000,
    ),
    _slower("launchdarkly", "LaunchDarkly `variation` / `resolve`", 50),
    _slower("unleash", "Unleash `get_variant` / `resolve`", 200),
    Target("GET one agent, one core", _ONE + "per_second", None, "a second", at_least=6_000),
    Target("GET one agent, p99", _ONE + "p99_ms", 20, "ms"),
    Target("GET the list of 1,000", _LIST + "per_second", None, "a second", at_least=1_500),
    Target("GET the list of 1,000, p99", _LIST + "p99_ms", 20, "ms"),
    Target("GET during a broadcast to 10,000, p99", "http/during/p99_ms", 30, "ms", 10_000),
    Target("`connect()` with 10,000 agents and keys", "startup/connects/seconds", 1, "s", 10_000),
    Target("`connect()`: memory an agent", "startup/connects/bytes_an_agent", 2, "KiB", 10_000),
    Target("LLMInterface: CPU over the SDK's", "llm/cpu_ratio", 5, "%"),
    Target("LLMInterface: time over the SDK's", "llm/added_ms", 0.1, "ms"),
    Target("LLMInterface: CPU over the lean SDK's", "llm/cpu_ratio, same transport", 5, "%"),
    Target("LLMInterface: time over the lean SDK's", "llm/added_ms, same transport", 0.1, "ms"),
    Target(
        "`import slm` / `import aiohttp, pydantic`",
        "startup/imports_ms/slm",
        1.3,
        "times",
        over="imports_ms/aiohttp and pydantic",
    ),
    _grown("PUT", "put_p50_ms"),
    _grown("`resolve`", "resolve_ns"),
    _page("SQLite", "p50_ms", 20, "ms"),
    _page("SQLite", "memory_mib", 5, "MiB"),
    _page("PostgreSQL", "p50_ms", 20, "ms"),
    _page("PostgreSQL", "memory_mib", 5, "MiB"),
)
