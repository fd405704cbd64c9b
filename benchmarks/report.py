"""docs/performance.md, written from the kept results and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import machine, notes, targets
from benchmarks.stats import figure, quantile, ratios
from benchmarks.targets import show

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
PLOTS = "performance"
"""The folder beside the document that has the plots."""

Kept = dict[str, dict[str, Any]]


def read(folder: Path) -> Kept:
    """Return every kept result of a folder, by the bench's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def write(folder: Path, document: Path | None) -> str:
    """Write the document with its plots, if one is named; return the table of targets."""
    kept = read(folder)
    results = {name: each["data"] for name, each in kept.items()}
    table = _targets(results)
    if document is not None:
        from benchmarks import plots

        plots.draw(results, document.parent / PLOTS)
        document.write_text(_document(kept, results, table))
    return table


def _targets(results: targets.Results) -> str:
    verdicts = {True: "met", False: "**missed**", None: "missing"}
    lines = [
        [row.what, row.target, row.measured, verdicts[row.met]] for row in targets.rows(results)
    ]
    return _table(["what", "target", "measured", ""], lines)


def _document(kept: Kept, results: targets.Results, table: str) -> str:
    parts = [notes.INTRODUCTION, *_caveats(kept), "## Targets", table]
    missed = [row for row in targets.rows(results) if row.met is False]
    if missed:
        parts.append("### What is missed, and why")
        parts += [
            f"**{row.what}** — {notes.MISSED.get(row.key, notes.NOT_EXPLAINED)}" for row in missed
        ]
    for name, section in _SECTIONS.items():
        if name in results:
            parts.append(section(results[name]))
    parts += ["## Where and when", _where(kept)]
    return "\n\n".join(parts) + "\n"


def _caveats(kept: Kept) -> list[str]:
    """Say what the figures cannot be trusted for: a busy machine, benches that did not finish."""
    found = []
    loads = [one["machine"]["load_before"] for one in kept.values()]
    cores = min((one["machine"]["cores"] for one in kept.values()), default=1)
    # One bench's own work is a load of about the number of cores.
    if loads and max(loads) > 2 * cores:
        found.append(notes.LOADED.format(lowest=min(loads), highest=max(loads), cores=cores))
    if unfinished := [name for name in _SECTIONS if name not in kept]:
        found.append(notes.UNFINISHED.format(names=", ".join(unfinished)))
    return found


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _column(repeats: list[dict[str, Any]], name: str) -> list[float]:
    return [repeat[name] for repeat in repeats]


def _fanout(data: dict[str, Any]) -> str:
    lines = [
        [
            f"{int(size):,}",
            show(figure(_column(repeats, "change_ratio"))),
            show(figure(_column(repeats, "push_ratio"))),
            show(figure(_column(repeats, "naive_ratio"))),
            show(figure(_column(repeats, "floor_ms")), " ms"),
            show(figure(_column(repeats, "change_ms")), " ms"),
            show(figure(_column(repeats, "naive_ms")), " ms"),
        ]
        for size, repeats in data["per_size"].items()
    ]
    head = ["subscribers", "SLM / C loop", "its writes alone / C loop", "naive / C loop"]
    head += ["C loop", "SLM", "naive"]
    return "\n\n".join(
        [
            "## One change to many subscribers",
            notes.FANOUT,
            _table(head, lines),
            f"![Fan-out against the number of subscribers]({PLOTS}/fanout.svg)",
        ]
    )


def _accept(data: dict[str, Any]) -> str:
    lines = [["plain", show(figure(data["plain"]))]]
    lines.append(
        [
            "TLS 1.3, P-256",
            show(figure(data["tls"])) if data["tls"] else f"missing: {data['missing']}",
        ]
    )
    return "\n\n".join(
        [
            "## Connections accepted",
            notes.ACCEPT.format(count=data["connections"]),
            _table(["", "a second"], lines),
        ]
    )


def _propagation(data: dict[str, Any]) -> str:
    parts = ["## From the write to the callback", notes.PROPAGATION]
    for shape in data["shapes"]:
        watchers = str(shape["watchers"])
        ours = [r["sent_p50"] for r in data["peers"].get("slm", {}).get(watchers, [])]
        lines = []
        for peer, per_shape in data["peers"].items():
            repeats = per_shape.get(watchers)
            if not repeats:
                continue
            half = _column(repeats, "sent_p50")
            lines.append(
                [
                    data["labels"][peer],
                    show(figure(ratios(half, ours))) if len(ours) == len(half) else "",
                    show(figure(half), " ms"),
                    show(figure(_column(repeats, "sent_p99")), " ms"),
                    show(figure(_column(repeats, "last_p50")), " ms"),
                    show(figure(_column(repeats, "write_p50")), " ms"),
                    f"{sum(_column(repeats, 'missed')):.0f}",
                ]
            )
        head = [f"{watchers} watcher{'' if watchers == '1' else 's'}", "p50 / SLM", "p50", "p99"]
        head += ["last one, p50", "write answered, p50", "changes missed"]
        parts.append(_table(head, lines))
    parts.append(f"![Cumulative curves against the peers]({PLOTS}/propagation.svg)")
    parts.append("What each has done when a write is answered:")
    parts.append(
        "\n".join(f"- {data['labels'][p]}: {text}." for p, text in data["durability"].items())
    )
    if data["missing"]:
        named = "; ".join(f"{peer}: {what}" for peer, what in data["missing"].items())
        parts.append(f"Missing on this machine: {named}.")
    return "\n\n".join(parts)


def _polling(data: dict[str, Any]) -> str:
    seconds = data["seconds"]
    lines = [
        [
            "Unleash, Python SDK",
            f"{quantile(seconds, 0.5):.1f} s",
            f"{quantile(seconds, 0.99):.1f} s",
            f"{data['poll_seconds']} s",
        ]
    ]
    return "\n\n".join(
        [
            "### A product that polls",
            notes.POLLING.format(**data),
            _table(["", "p50", "p99", "poll interval"], lines),
        ]
    )


def _reads(data: dict[str, Any]) -> str:
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
    parts = [
        "## What one read costs a backend",
        notes.READS.format(**data),
        _table(["", "/ `resolve`", "one call"], lines),
    ]
    if data["missing"]:
        parts.append("Missing on this machine: " + ", ".join(data["missing"].values()) + ".")
    return "\n\n".join(parts)


def _http(data: dict[str, Any]) -> str:
    lines = [
        [
            name,
            show(figure(_column(repeats, "per_second"))),
            show(figure(_column(repeats, "p50_ms")), " ms"),
            show(figure(_column(repeats, "p99_ms")), " ms"),
            f"{quantile(_column(repeats, 'bytes'), 0.5):,.0f}",
        ]
        for name, repeats in data["loads"].items()
    ]
    during = data["during"]
    return "\n\n".join(
        [
            "## GETs",
            notes.HTTP.format(**data),
            _table(["GET", "a second", "p50", "p99", "bytes"], lines),
            f"While changes go out to {data['subscribers']:,} subscribers: p50"
            f" {show(figure(_column(during, 'p50_ms')), ' ms')}, p99"
            f" {show(figure(_column(during, 'p99_ms')), ' ms')}"
            f" ({sum(_column(during, 'requests')):.0f} requests under way during"
            f" {sum(_column(during, 'broadcasts')):.0f} broadcasts).",
        ]
    )


def _startup(data: dict[str, Any]) -> str:
    reference = data["imports_ms"]["aiohttp and pydantic"]
    lines = [
        [f"`import {name}`", show(figure(ratios(v, reference))), show(figure(v), " ms")]
        for name, v in data["imports_ms"].items()
    ]
    connects = data["connects"]
    kib = [value / 1024 for value in _column(connects, "bytes_an_agent")]
    return "\n\n".join(
        [
            "## A backend's start",
            notes.STARTUP,
            _table(["", "/ aiohttp and pydantic", "time"], lines),
            f"`connect()` with {data['agents']:,} agents, each with a key:"
            f" {show(figure(_column(connects, 'seconds')), ' s')}, of which"
            f" {show(figure(_column(connects, 'cpu_seconds')), ' s')} are the backend's own CPU;"
            f" afterwards the process is larger by {show(figure(kib), ' KiB')} an agent.",
        ]
    )


def _llm(data: dict[str, Any]) -> str:
    lines = [
        ["CPU a call", show(figure(data["cpu_ratio"])), *(_pair(data, "cpu_ms"))],
        [
            "time a call, p50",
            show(figure(ratios(data["slm_p50_ms"], data["sdk_p50_ms"]))),
            *(_pair(data, "p50_ms")),
        ],
    ]
    return "\n\n".join(
        [
            "## LLMInterface beside the bare SDK",
            notes.LLM,
            _table(["", "ratio", "LLMInterface", "openai SDK"], lines),
        ]
    )


def _pair(data: dict[str, Any], name: str) -> list[str]:
    return [show(figure(data[f"{who}_{name}"]), " ms") for who in ("slm", "sdk")]


def _growth(data: dict[str, Any]) -> str:
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
    return "\n\n".join(
        [
            "## Cost against the number of agents",
            notes.GROWTH,
            _table(head, lines),
            f"![Cost against the number of agents]({PLOTS}/growth.svg)",
        ]
    )


def _where(kept: Kept) -> str:
    each = max(kept.values(), key=lambda one: one["taken"])
    about, parts = each["machine"], []
    parts.append(
        f"{about['cores']} cores of {about['cpu']}, {about['memory_gib']} GiB, {about['system']},"
        f" Linux {about['kernel']}, Python {about['python']}, SQLite {about['sqlite']},"
        f" {about['openssl']}. The server runs on the first core and whatever loads it on the last,"
        " except where both sides' processes are said to be unpinned. All traffic is loopback."
    )
    lines = [
        [
            one["title"],
            one["taken"],
            str(one["repeats"]),
            f"{one['seconds']:.0f} s",
            one["commit"],
            f"{one['machine']['load_before']:.1f}",
        ]
        for one in kept.values()
    ]
    parts.append(_table(["bench", "taken", "repeats", "took", "commit", "load after"], lines))
    listed = ", ".join(f"{name} {number}" for name, number in sorted(each["versions"].items()))
    parts.append(f"Versions: {listed}.")
    parts.append(
        f"The raw figures of every repeat are in `benchmarks/results/`; {len(machine.PACKAGES)}"
        " packages were asked for their version, and one that is not named is not installed."
    )
    return "\n\n".join(parts)


_SECTIONS = {
    "fanout": _fanout,
    "accept": _accept,
    "propagation": _propagation,
    "polling": _polling,
    "reads": _reads,
    "http": _http,
    "startup": _startup,
    "llm": _llm,
    "growth": _growth,
}
