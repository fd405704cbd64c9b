"""What each target's judge finds in the kept result of one bench.

A judge answers only for the size that its target names: a quick run measures smaller ones, whose
figures are shown and not judged. A field that is not there raises; what may be absent, such as a
peer, is asked for as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.stats import Figure, figure, ratios

Data = dict[str, Any]
"""What one bench measured."""

MANY_SUBSCRIBERS = 10_000
MANY_AGENTS = 10_000
READ_AGENTS = 1_000
CONNECTIONS = 3_000
GROWTH = (10, 100_000)
HISTORY = 1_000_000


@dataclass(frozen=True)
class Judged:
    """What was measured, and whether it meets the target; `why_not` says why that stays open."""

    measured: str
    met: bool | None
    why_not: str = ""


Judge = Callable[[Data], Judged]


def show(value: Figure, unit: str = "", digits: int = 3) -> str:
    """Return a median with its spread over the repeats."""
    low, high = f"{_round(value.low, digits)}", f"{_round(value.high, digits)}"
    text = f"**{_round(value.median, digits)}**{unit}"
    return text if value.repeats == 1 else f"{text} ({low} to {high})"


def _round(value: float, digits: int) -> str:
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def column(repeats: list[dict[str, Any]], name: str) -> list[float]:
    """Return a field that every repeat has."""
    return [repeat[name] for repeat in repeats]


def maybe(repeats: list[dict[str, Any]], name: str) -> Figure | None:
    """Return the figure of a field that not every version of the bench writes."""
    values = [repeat[name] for repeat in repeats if repeat.get(name) is not None]
    return figure(values) if values else None


def _at_size(measured: str, met: bool, size: int, wanted: int) -> Judged:
    """Judge only what was measured at the size that the target names."""
    if size == wanted:
        return Judged(measured, met)
    return Judged(measured, None, f"not judged (at {size:,})")


def _size(sizes: Iterable[str], wanted: int) -> int:
    """Return the size that is wanted, or else the largest there is."""
    found = {int(size) for size in sizes}
    return wanted if wanted in found else max(found)


def fan_ratio(wanted: int, limit: float) -> Judge:
    def judge(data: Data) -> Judged:
        size = _size(data["per_size"], wanted)
        repeats = data["per_size"][str(size)]
        value = figure(column(repeats, "change_ratio"))
        text = (
            f"{show(value, ' times')}; {show(figure(column(repeats, 'change_ms')), ' ms')} beside"
            f" the C loop's {show(figure(column(repeats, 'floor_ms')), ' ms')}; the naive loop:"
            f" {show(figure(column(repeats, 'naive_ratio')), ' times')}"
        )
        if acking := maybe(repeats, "acking_ratio"):
            text += f"; to subscribers that all ack: {show(acking, ' times')}"
        return _at_size(text, value.median <= limit, size, wanted)

    return judge


def memory(data: Data) -> Judged:
    """The stream by itself is held against 6 KiB; with the acks kept of a backend, against 32."""
    size = _size(data["per_size"], MANY_SUBSCRIBERS)
    kib = _kib(figure(column(data["per_size"][str(size)], "bytes_a_subscriber")))
    text, met = show(kib, " KiB"), kib.median <= 6
    if data["memory_acked"]:
        acked = _kib(figure(data["memory_acked"]))
        text += f"; {show(acked, ' KiB')} once it has acked 1,300 changes, as a backend does"
        met = met and acked.median <= 32
    return _at_size(text, met, size, MANY_SUBSCRIBERS)


def _kib(value: Figure) -> Figure:
    return Figure(value.median / 1024, value.low / 1024, value.high / 1024, value.repeats)


def accepted(data: Data) -> Judged:
    plain = figure(data["plain"])
    text = f"{show(plain, ' a second')}; TLS "
    if data["tls"]:
        text += show(figure(data["tls"]), " a second")
    else:
        text += f"not measured here: {data['missing']}"
    return _at_size(text, plain.median >= 1500, data["connections"], CONNECTIONS)


def commit_to_callback(watchers: int, p50: float, p99: float) -> Judge:
    def judge(data: Data) -> Judged:
        ours = data["peers"]["slm"]
        size = _size(ours, watchers)
        half = figure(column(ours[str(size)], "commit_p50"))
        late = figure(column(ours[str(size)], "commit_p99"))
        met = half.median <= p50 and late.median <= p99
        return _at_size(f"p50 {show(half, ' ms')}, p99 {show(late, ' ms')}", met, size, watchers)

    return judge


def ahead(watchers: int, others: list[str]) -> Judge:
    """Judge whether we are no slower than any of the others."""

    def judge(data: Data) -> Judged:
        size = _size(data["peers"]["slm"], watchers)
        ours = column(data["peers"]["slm"][str(size)], "sent_p50")
        texts, met, absent = [f"{show(figure(ours), ' ms')} p50"], True, []
        for peer in others:
            theirs = column(data["peers"].get(peer, {}).get(str(size), []), "sent_p50")
            if len(theirs) != len(ours):
                texts.append(f"{peer} not measured here: {data['missing'][peer]}")
                absent.append(peer)
                continue
            ratio = figure(ratios(ours, theirs))
            label = data["labels"][peer]
            texts.append(f"{show(ratio, ' times')} that of {label} ({show(figure(theirs), ' ms')})")
            met = met and ratio.median <= 1
        judged = _at_size("; ".join(texts), met, size, watchers)
        if judged.met and absent:
            # Ahead of those who are here says nothing of the one that is not.
            return Judged(judged.measured, None, f"not judged (without {', '.join(absent)})")
        return judged

    return judge


def reads(data: Data) -> Judged:
    """The peers' ratios count for those that were measured."""
    taken = data["ns"]
    resolve, config = figure(taken["resolve"]), figure(taken["get_agent_config"])
    texts = [f"{show(resolve, ' ns')} / {show(config, ' ns')}"]
    met = resolve.median <= 250 and config.median <= 400
    for name, label, least in (("launchdarkly", "LaunchDarkly", 50), ("unleash", "Unleash", 200)):
        if name in taken:
            ratio = figure(ratios(taken[name], taken["resolve"]))
            texts.append(f"{show(ratio, ' times')} under {label}")
            met = met and ratio.median >= least
        else:
            texts.append(f"{label} not measured here: {data['missing'][name]}")
    return _at_size("; ".join(texts), met, data["values"], READ_AGENTS)


def gets(data: Data) -> Judged:
    loads = data["loads"]
    one, many = loads["one agent"], loads["the list of 1,000"]
    rates = [figure(column(load, "per_second")) for load in (one, many)]
    late = [figure(column(load, "p99_ms")) for load in (one, many)]
    keyed = figure(column(loads["keyed snapshot of 1,000"], "per_second"))
    met = rates[0].median >= 6000 and rates[1].median >= 1500 and max(x.median for x in late) <= 20
    text = (
        f"{show(rates[0])} / {show(rates[1])} a second, p99 {show(late[0], ' ms')} /"
        f" {show(late[1], ' ms')}; keyed snapshot: {show(keyed, ' a second')}"
    )
    return Judged(text, met)


def during(data: Data) -> Judged:
    late = figure(column(data["during"], "p99_ms"))
    return _at_size(show(late, " ms"), late.median <= 30, data["subscribers"], MANY_SUBSCRIBERS)


def connect(data: Data) -> Judged:
    seconds = figure(column(data["connects"], "seconds"))
    kib = _kib(figure(column(data["connects"], "bytes_an_agent")))
    text = f"{show(seconds, ' s')}; {show(kib, ' KiB')} an agent"
    return _at_size(text, seconds.median <= 1 and kib.median <= 2, data["agents"], MANY_AGENTS)


def llm(data: Data) -> Judged:
    """Held against the SDK as it comes, and against one on a lean HTTP client."""
    texts, met = [], True
    for suffix, beside in (("", ""), (", same transport", " beside it on a lean HTTP client")):
        ratio = figure([100 * (value - 1) for value in data[f"cpu_ratio{suffix}"]])
        added = figure(data[f"added_ms{suffix}"])
        texts.append(f"{show(ratio, ' %')} more CPU, {show(added, ' ms')} more{beside}")
        met = met and ratio.median <= 5 and added.median <= 0.1
    return Judged("; ".join(texts), met)


def imports(data: Data) -> Judged:
    taken = data["imports_ms"]
    value = figure(ratios(taken["slm"], taken["aiohttp and pydantic"]))
    with_models = figure(ratios(taken["slm"], taken["aiohttp and pydantic's models"]))
    text = f"{show(value, ' times')}; {show(with_models, ' times')} with pydantic's models loaded"
    return Judged(text, value.median <= 1.3)


def growth(data: Data) -> Judged:
    sizes = sorted(map(int, data["per_size"]))
    whole = set(GROWTH) <= set(sizes)
    fewest, most = GROWTH if whole else (sizes[0], sizes[-1])
    few, many = data["per_size"][str(fewest)], data["per_size"][str(most)]
    texts, met = [], True
    for name, label in (("put_p50_ms", "PUT"), ("resolve_ns", "resolve")):
        value = figure(ratios(many[name], few[name]))
        texts.append(f"{label} {show(value, ' times')}")
        met = met and value.median <= 1.2
    text = f"{', '.join(texts)} at {most:,}"
    if not whole:
        return Judged(text, None, f"not judged ({fewest:,} to {most:,})")
    return Judged(text, met)


def history(data: Data) -> Judged:
    """The slowest list and the one that took the most memory count, on both engines."""
    texts, met = [], True
    for engine, lists in data["engines"].items():
        slowest = max((figure(taken["p50_ms"]) for taken in lists.values()), key=_median)
        largest = max((figure(taken["memory_mib"]) for taken in lists.values()), key=_median)
        texts.append(f"{engine}: {show(slowest, ' ms')}, {show(largest, ' MiB')}")
        met = met and slowest.median <= 20 and largest.median <= 5
    return _at_size("; ".join(texts), met, data["rows"], HISTORY)


def _median(value: Figure) -> float:
    return value.median
