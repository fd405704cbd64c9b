"""The sections of docs/performance.md: for each bench its tables and what they are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.errors import reading
from benchmarks.harness.stats import Figure, figure, quantile, ratios
from benchmarks.report import notes
from benchmarks.report.judges import Data, column, maybe, show

PLOTS = "performance"
"""The folder beside the document that has the plots."""

SAME_TRANSPORT = "sdk, same transport"


@dataclass(frozen=True)
class Section:
    """A heading, and what makes the paragraphs under it from what the bench measured."""

    heading: str
    parts: Callable[[Data], list[str]]


def render(name: str, data: Data | None, missing: str | None) -> str:
    """Return the section of a bench, or of it only what it needs and did not find.

    Raises:
        Malformed: the result lacks what its bench always writes.
    """
    section = SECTIONS[name]
    if data is None:
        parts = [notes.NOT_HERE.format(missing=missing)]
    else:
        with reading(name):
            parts = section.parts(data)
    return "\n\n".join([section.heading, *parts])


def table(head: list[str], lines: list[list[str]]) -> str:
    """Return a table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _fanout(data: Data) -> list[str]:
    per_size: dict[str, list[dict[str, Any]]] = data["per_size"]
    lines = {
        size: [
            f"{int(size):,}",
            show(figure(column(repeats, "change_ratio"))),
            show(figure(column(repeats, "push_ratio"))),
            show(figure(column(repeats, "naive_ratio"))),
            show(figure(column(repeats, "floor_ms")), " ms"),
            show(figure(column(repeats, "change_ms")), " ms"),
            show(figure(column(repeats, "naive_ms")), " ms"),
        ]
        for size, repeats in per_size.items()
    }
    head = ["subscribers", "SLM / C loop", "its writes alone / C loop", "naive / C loop"]
    head += ["C loop", "SLM", "naive"]
    explained = [notes.FANOUT]
    for more, note in ((_ACKING, notes.FANOUT_ACKING), (_FARM, notes.FANOUT_FARM)):
        found = {size: [maybe(taken, name) for name in more] for size, taken in per_size.items()}
        if not any(value for values in found.values() for value in values):
            continue
        explained.append(note)
        head += [label for label, _ in more.values()]
        for size, values in found.items():
            units = [unit for _, unit in more.values()]
            lines[size] += [_or_blank(v, unit) for v, unit in zip(values, units, strict=True)]
    return [
        *explained,
        table(head, list(lines.values())),
        f"![Fan-out against the number of subscribers]({PLOTS}/fanout.svg)",
    ]


_ACKING = {"acking_ratio": ("acking / C loop", ""), "acking_ms": ("acking", " ms")}
_FARM = {"farm_late_ms": ("farm late", " ms"), "farm_cpu": ("farm busy", "")}
"""Columns that not every version of the bench has: field, heading, unit."""


def _or_blank(value: Figure | None, unit: str) -> str:
    return "" if value is None else show(value, unit)


def limited_by_the_farm(data: Data) -> list[str]:
    """Return the sizes at which the subscribers' program was itself what was measured."""
    found = []
    with reading("fanout"):
        for size, repeats in data["per_size"].items():
            late, floor = (figure(column(repeats, name)) for name in ("farm_late_ms", "floor_ms"))
            if late.median > 0.05 * floor.median:
                found.append(f"{int(size):,}")
    return found


def _accept(data: Data) -> list[str]:
    tls = show(figure(data["tls"])) if data["tls"] else f"not measured here: {data['missing']}"
    lines = [["plain", show(figure(data["plain"]))], ["TLS 1.3, P-256", tls]]
    return [notes.ACCEPT.format(count=data["connections"]), table(["", "a second"], lines)]


def _propagation(data: Data) -> list[str]:
    parts = [notes.PROPAGATION]
    for shape in data["shapes"]:
        watchers = str(shape["watchers"])
        ours = [r["sent_p50"] for r in data["peers"].get("slm", {}).get(watchers, [])]
        lines = []
        for peer, per_shape in data["peers"].items():
            repeats = per_shape.get(watchers)
            if not repeats:
                continue
            half = column(repeats, "sent_p50")
            lines.append(
                [
                    data["labels"][peer],
                    show(figure(ratios(half, ours))) if len(ours) == len(half) else "",
                    show(figure(half), " ms"),
                    show(figure(column(repeats, "sent_p99")), " ms"),
                    show(figure(column(repeats, "last_p50")), " ms"),
                    show(figure(column(repeats, "write_p50")), " ms"),
                    f"{sum(column(repeats, 'missed')):.0f}",
                ]
            )
        head = [f"{watchers} watcher{'' if watchers == '1' else 's'}", "p50 / SLM", "p50", "p99"]
        head += ["last one, p50", "write answered, p50", "changes missed"]
        parts.append(table(head, lines))
    parts.append(f"![Cumulative curves against the peers]({PLOTS}/propagation.svg)")
    parts.append("What each has done when a write is answered:")
    parts.append(
        "\n".join(f"- {data['labels'][p]}: {text}." for p, text in data["durability"].items())
    )
    if data["missing"]:
        named = "; ".join(f"{peer}: {what}" for peer, what in data["missing"].items())
        parts.append(notes.NOT_HERE.format(missing=named))
    return parts


def _polling(data: Data) -> list[str]:
    seconds = data["seconds"]
    lines = [
        [
            "Unleash, Python SDK",
            f"{quantile(seconds, 0.5):.1f} s",
            f"{quantile(seconds, 0.99):.1f} s",
            f"{data['poll_seconds']} s",
        ]
    ]
    product = f"Unleash {data.get('server_version', '')}".strip()
    return [
        notes.POLLING.format(product=product, **data),
        table(["", "p50", "p99", "poll interval"], lines),
    ]


def _reads(data: Data) -> list[str]:
    ours = data["ns"]["resolve"]
    labels = data["labels"] | {
        "resolve": "SLM `resolve`, awaited",
        "get_agent_config": "SLM `get_agent_config`, awaited",
        "awaited dict": "a dict behind one `await`",
    }
    lines = [
        [labels[name], show(figure(ratios(values, ours))), show(figure(values), " ns")]
        for name, values in sorted(data["ns"].items(), key=lambda item: figure(item[1]).median)
    ]
    parts = [notes.READS.format(**data), table(["", "/ `resolve`", "one call"], lines)]
    if data["missing"]:
        parts.append(notes.NOT_HERE.format(missing=", ".join(data["missing"].values())))
    return parts


def _http(data: Data) -> list[str]:
    lines = [
        [
            name,
            show(figure(column(repeats, "per_second"))),
            show(figure(column(repeats, "p50_ms")), " ms"),
            show(figure(column(repeats, "p99_ms")), " ms"),
            f"{quantile(column(repeats, 'bytes'), 0.5):,.0f}",
        ]
        for name, repeats in data["loads"].items()
    ]
    during = data["during"]
    return [
        notes.HTTP.format(**data),
        table(["GET", "a second", "p50", "p99", "bytes"], lines),
        f"While changes go out to {data['subscribers']:,} subscribers: p50"
        f" {show(figure(column(during, 'p50_ms')), ' ms')}, p99"
        f" {show(figure(column(during, 'p99_ms')), ' ms')}"
        f" ({sum(column(during, 'requests')):.0f} requests under way during"
        f" {sum(column(during, 'broadcasts')):.0f} broadcasts).",
    ]


def _startup(data: Data) -> list[str]:
    reference = data["imports_ms"]["aiohttp and pydantic"]
    lines = [
        [f"`import {name}`", show(figure(ratios(v, reference))), show(figure(v), " ms")]
        for name, v in data["imports_ms"].items()
    ]
    connects = data["connects"]
    kib = [value / 1024 for value in column(connects, "bytes_an_agent")]
    return [
        notes.STARTUP,
        table(["", "/ aiohttp and pydantic", "time"], lines),
        f"`connect()` with {data['agents']:,} agents, each with a key:"
        f" {show(figure(column(connects, 'seconds')), ' s')}, of which"
        f" {show(figure(column(connects, 'cpu_seconds')), ' s')} are the backend's own CPU;"
        f" afterwards the process is larger by {show(figure(kib), ' KiB')} an agent.",
    ]


def _llm(data: Data) -> list[str]:
    head = ["", "ratio", "LLMInterface", "openai SDK", "openai SDK, lean client"]
    lines = [
        ["CPU a call", show(figure(data["cpu_ratio"])), *_each(data, "cpu_ms")],
        [
            "time a call, p50",
            show(figure(ratios(data["slm_p50_ms"], data["sdk_p50_ms"]))),
            *_each(data, "p50_ms"),
        ],
    ]
    return [notes.LLM, table(head, lines)]


def _each(data: Data, name: str) -> list[str]:
    return [show(figure(data[f"{who}_{name}"]), " ms") for who in ("slm", "sdk", SAME_TRANSPORT)]


def _growth(data: Data) -> list[str]:
    first = next(iter(data["per_size"].values()))
    lines = [
        [
            f"{int(size):,}",
            show(figure(ratios(taken["put_p50_ms"], first["put_p50_ms"]))),
            show(figure(ratios(taken["resolve_ns"], first["resolve_ns"]))),
            show(figure(taken["put_p50_ms"]), " ms"),
            show(figure(taken["resolve_ns"]), " ns"),
        ]
        for size, taken in data["per_size"].items()
    ]
    head = ["agents", "PUT / at the fewest", "resolve / at the fewest", "PUT p50", "resolve"]
    return [
        notes.GROWTH,
        table(head, lines),
        f"![Cost against the number of agents]({PLOTS}/growth.svg)",
    ]


def _history(data: Data) -> list[str]:
    engines: dict[str, dict[str, dict[str, list[float]]]] = data["engines"]
    lines = []
    for name in next(iter(engines.values())):
        line = [name]
        for lists in engines.values():
            line.append(show(figure(lists[name]["p50_ms"]), " ms"))
            line.append(show(figure(lists[name]["memory_mib"]), " MiB"))
        lines.append(line)
    head = ["a page of"]
    for engine in engines:
        head += [f"{engine}, p50", f"{engine}, memory"]
    return [notes.HISTORY.format(**data), table(head, lines)]


SECTIONS = {
    "fanout": Section("## One change to many subscribers", _fanout),
    "accept": Section("## Connections accepted", _accept),
    "propagation": Section("## From the write to the callback", _propagation),
    "polling": Section("### A product that polls", _polling),
    "reads": Section("## What one read costs a backend", _reads),
    "http": Section("## GETs", _http),
    "startup": Section("## A backend's start", _startup),
    "llm": Section("## LLMInterface beside the bare SDK", _llm),
    "growth": Section("## Cost against the number of agents", _growth),
    "history": Section("## Pages of a long history", _history),
}
"""In the order in which they are told, by the bench's name."""
