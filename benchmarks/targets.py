"""The targets, each held against what was measured; what was not measured is said to be missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.stats import Figure, figure, ratios

Results = dict[str, dict[str, Any]]
"""What each bench measured, by its name."""


@dataclass(frozen=True)
class Row:
    """One target: what was measured for it, and whether that meets it; None: not measured."""

    key: str
    what: str
    target: str
    measured: str
    met: bool | None


def show(value: Figure, unit: str = "", digits: int = 3) -> str:
    """Return a median with its spread over the repeats."""
    low, high = f"{_round(value.low, digits)}", f"{_round(value.high, digits)}"
    text = f"**{_round(value.median, digits)}**{unit}"
    return text if value.repeats == 1 else f"{text} ({low} to {high})"


def _round(value: float, digits: int) -> str:
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def rows(results: Results) -> list[Row]:
    """Return every target, in the order in which they are told."""
    found = []
    for key, what, target, judge in _TARGETS:
        try:
            measured, met = judge(results)
        except (KeyError, IndexError, ValueError):
            measured, met = "not measured", None
        found.append(Row(key, what, target, measured, met))
    return found


Judge = Callable[[Results], tuple[str, bool | None]]


def _at_most(value: Figure, limit: float, unit: str = "") -> tuple[str, bool]:
    return show(value, unit), value.median <= limit


def _fanout(size: str, name: str) -> Callable[[Results], Figure]:
    return lambda results: figure([r[name] for r in results["fanout"]["per_size"][size]])


def _fan_ratio(size: str, limit: float) -> Judge:
    def judge(results: Results) -> tuple[str, bool | None]:
        value = _fanout(size, "change_ratio")(results)
        naive = _fanout(size, "naive_ratio")(results)
        floor = _fanout(size, "floor_ms")(results)
        change = _fanout(size, "change_ms")(results)
        text = (
            f"{show(value, ' times')}; {show(change, ' ms')} beside the C loop's"
            f" {show(floor, ' ms')}; the naive loop: {show(naive, ' times')}"
        )
        return text, value.median <= limit

    return judge


def _memory(results: Results) -> tuple[str, bool | None]:
    largest = str(max(map(int, results["fanout"]["per_size"])))
    return _at_most(
        figure([r["bytes_a_subscriber"] / 1024 for r in results["fanout"]["per_size"][largest]]),
        6,
        " KiB",
    )


def _accepted(results: Results) -> tuple[str, bool | None]:
    plain = figure(results["accept"]["plain"])
    tls = results["accept"].get("tls")
    text = f"{show(plain, ' a second')}; TLS "
    text += show(figure(tls), " a second") if tls else f"missing: {results['accept']['missing']}"
    return text, plain.median >= 1500


def _prop(results: Results, peer: str, shape: str, name: str) -> Figure:
    return figure([r[name] for r in results["propagation"]["peers"][peer][shape]])


def _commit_to_callback(shape: str, p50: float, p99: float) -> Judge:
    def judge(results: Results) -> tuple[str, bool | None]:
        half = _prop(results, "slm", shape, "commit_p50")
        late = _prop(results, "slm", shape, "commit_p99")
        met = half.median <= p50 and late.median <= p99
        return f"p50 {show(half, ' ms')}, p99 {show(late, ' ms')}", met

    return judge


def _beside_etcd(results: Results) -> tuple[str, bool | None]:
    return _ahead(results, "1", ["etcd"])


def _ahead(results: Results, shape: str, others: list[str]) -> tuple[str, bool | None]:
    ours = [r["sent_p50"] for r in results["propagation"]["peers"]["slm"][shape]]
    texts, met, absent = [f"{show(figure(ours), ' ms')} p50"], True, False
    for peer in others:
        theirs = results["propagation"]["peers"].get(peer, {}).get(shape)
        if theirs is None:
            texts.append(f"{peer} is missing")
            absent = True
            continue
        values = [r["sent_p50"] for r in theirs]
        ratio = figure(ratios(ours, values))
        label = results["propagation"]["labels"][peer]
        texts.append(f"{show(ratio, ' times')} that of {label} ({show(figure(values), ' ms')})")
        met = met and ratio.median <= 1
    # Ahead of those who are here says nothing of the one that is not.
    return "; ".join(texts), None if met and absent else met


def _reads(results: Results) -> tuple[str, bool | None]:
    taken = results["reads"]["ns"]
    resolve, config = figure(taken["resolve"]), figure(taken["get_agent_config"])
    texts = [f"{show(resolve, ' ns')} / {show(config, ' ns')}"]
    for name, label in (("launchdarkly", "LaunchDarkly"), ("unleash", "Unleash")):
        if name in taken:
            ratio = figure(ratios(taken[name], taken["resolve"]))
            texts.append(f"{show(ratio, ' times')} under {label}")
    return "; ".join(texts), resolve.median <= 250 and config.median <= 400


def _gets(results: Results) -> tuple[str, bool | None]:
    loads = results["http"]["loads"]
    one, many = loads["one agent"], loads["the list of 1,000"]
    rates = [figure([r["per_second"] for r in load]) for load in (one, many)]
    late = [figure([r["p99_ms"] for r in load]) for load in (one, many)]
    keyed = figure([r["per_second"] for r in loads["keyed snapshot of 1,000"]])
    met = rates[0].median >= 6000 and rates[1].median >= 1500 and max(x.median for x in late) <= 20
    text = (
        f"{show(rates[0])} / {show(rates[1])} a second, p99 {show(late[0], ' ms')} /"
        f" {show(late[1], ' ms')}; keyed snapshot: {show(keyed, ' a second')}"
    )
    return text, met


def _during(results: Results) -> tuple[str, bool | None]:
    return _at_most(figure([r["p99_ms"] for r in results["http"]["during"]]), 30, " ms")


def _connect(results: Results) -> tuple[str, bool | None]:
    connects = results["startup"]["connects"]
    seconds = figure([r["seconds"] for r in connects])
    memory = figure([r["bytes_an_agent"] / 1024 for r in connects])
    text = f"{show(seconds, ' s')}; {show(memory, ' KiB')} an agent"
    return text, seconds.median <= 1 and memory.median <= 2


def _llm(results: Results) -> tuple[str, bool | None]:
    ratio = figure([100 * (value - 1) for value in results["llm"]["cpu_ratio"]])
    added = figure(results["llm"]["added_ms"])
    text = f"{show(ratio, ' %')} more CPU, {show(added, ' ms')} more"
    return text, ratio.median <= 5 and added.median <= 0.1


def _import(results: Results) -> tuple[str, bool | None]:
    taken = results["startup"]["imports_ms"]
    value = figure(ratios(taken["slm"], taken["aiohttp and pydantic"]))
    with_models = figure(ratios(taken["slm"], taken["aiohttp and pydantic's models"]))
    text = f"{show(value, ' times')}; {show(with_models, ' times')} with pydantic's models loaded"
    return text, value.median <= 1.3


def _growth(results: Results) -> tuple[str, bool | None]:
    per_size = results["growth"]["per_size"]
    sizes = sorted(per_size, key=int)
    texts, met = [], True
    for name, label in (("put_p50_ms", "PUT"), ("resolve_ns", "resolve")):
        value = figure(ratios(per_size[sizes[-1]][name], per_size[sizes[0]][name]))
        texts.append(f"{label} {show(value, ' times')}")
        met = met and value.median <= 1.2
    return f"{', '.join(texts)} at {int(sizes[-1]):,}", met


_TARGETS: list[tuple[str, str, str, Judge]] = [
    (
        "fanout-10000",
        "10,000 subscribers, one change: commit to the last frame received",
        "at most 1.3 times a C send() loop over the same sockets",
        _fan_ratio("10000", 1.3),
    ),
    ("fanout-1000", "the same at 1,000", "at most 1.5 times", _fan_ratio("1000", 1.5)),
    ("memory", "memory a subscriber, handed to a slim protocol", "at most 6 KiB", _memory),
    ("accept", "connections accepted a second", "at least 1,500; TLS: as measured", _accepted),
    (
        "commit-1",
        "commit to callback, 1 backend",
        "p50 at most 0.5 ms, p99 at most 3 ms",
        _commit_to_callback("1", 0.5, 3),
    ),
    (
        "commit-500",
        "commit to callback, 500 backends in one process",
        "p50 at most 22 ms, p99 at most 35 ms",
        _commit_to_callback("500", 22, 35),
    ),
    (
        "put-1",
        "PUT sent to callback, SQLite FULL, 1 backend",
        "no slower than etcd put-to-watch",
        _beside_etcd,
    ),
    (
        "put-500",
        "the same with 500 backends",
        "ahead of etcd, NATS KV and PostgreSQL NOTIFY",
        lambda results: _ahead(results, "500", ["etcd", "nats", "postgres"]),
    ),
    (
        "reads",
        "`resolve` / `get_agent_config`, awaited, while live",
        "at most 250 / 400 ns",
        _reads,
    ),
    (
        "gets",
        "GET one agent / the list of 1,000, one core",
        "at least 6,000 / 1,500 a second, p99 at most 20 ms",
        _gets,
    ),
    (
        "during",
        "GET latency during a broadcast to 10,000",
        "p99 at most 30 ms",
        _during,
    ),
    (
        "connect",
        "`connect()` with 10,000 agents with keys",
        "at most 1 s; 2 KiB of memory an agent",
        _connect,
    ),
    (
        "llm",
        "LLMInterface over the bare official SDK, same call",
        "at most 5 % CPU, at most 0.1 ms",
        _llm,
    ),
    (
        "import",
        "`import slm` with SLMClient and LLMInterface",
        "at most 1.3 times `import aiohttp` plus `import pydantic`",
        _import,
    ),
    (
        "growth",
        "growth from 10 to 100,000 agents: PUT, resolve",
        "flat (at most 1.2 times)",
        _growth,
    ),
]
