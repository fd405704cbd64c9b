"""The sections of docs/performance.md: for each bench its tables and what they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.errors import reading
from benchmarks.harness.stats import figure, quantile, ratios
from benchmarks.report import notes
from benchmarks.report.figures import Data, at, show, table, values


@dataclass(frozen=True)
class Column:
    """A column of figures: where each row has them; `beside` names the row to divide by."""

    head: str
    path: str = ""
    unit: str = ""
    beside: str = ""
    optional: bool = False


def render(name: str, kept: Mapping[str, Any]) -> str:
    """Return the section of a bench, or of it only what it needs and did not find.

    Raises:
        Malformed: the result lacks what its bench always writes.
    """
    heading, section = SECTIONS[name]
    taken = notes.TAKEN.format(name=name, **kept)
    if "missing" in kept:
        parts = [notes.NOT_HERE.format(missing=kept["missing"])]
    else:
        with reading(name):
            parts = section(kept["data"])
    return "\n\n".join([heading, taken, *parts])


def _figures(first: str, rows: Mapping[str, Any], *columns: Column) -> str:
    lines = []
    for label, row in rows.items():
        cells = []
        for column in columns:
            try:
                taken = values(row, column.path)
                if column.beside:
                    taken = ratios(taken, values(rows[column.beside], column.path))
            except LookupError:
                if not column.optional:
                    raise
                cells.append("")
            else:
                cells.append(show(taken, column.unit))
        lines.append([label, *cells])
    return table([first, *(column.head for column in columns)], lines)


def _by_size(data: Data) -> dict[str, Any]:
    return {f"{int(size):,}": taken for size, taken in at(data, "per_size").items()}


def _missing(missing: Mapping[str, str]) -> list[str]:
    named = "; ".join(f"{peer}: {what}" for peer, what in missing.items())
    return [notes.NOT_HERE.format(missing=named)] if named else []


def _fanout(data: Data) -> list[str]:
    told = _figures(
        "",
        {f"{size} subscribers": taken for size, taken in _by_size(data).items()},
        Column("SLM / C loop", "change_ratio"),
        Column("if all ack / C loop", "acking_ratio", optional=True),
        Column("writes alone / C loop", "push_ratio"),
        Column("naive / C loop", "naive_ratio"),
        Column("SLM if all ack", "acking_ms", " ms", optional=True),
        Column("SLM", "change_ms", " ms"),
        Column("C loop", "floor_ms", " ms"),
        Column("naive", "naive_ms", " ms"),
        Column("program late", "farm_late_ms", " ms"),
        Column("program busy", "farm_cpu"),
    )
    return [notes.FANOUT, told, "![Time against the number of subscribers](performance/fanout.svg)"]


def _accept(data: Data) -> list[str]:
    tls = {} if data["missing"] else {"TLS 1.3, P-256": values(data, "tls")}
    rows = {"plain": values(data, "plain"), **tls}
    missing = _missing({"TLS": data["missing"]} if data["missing"] else {})
    return [notes.ACCEPT.format(**data), _figures("", rows, Column("a second")), *missing]


def _propagation(data: Data) -> list[str]:
    parts, labels = [notes.PROPAGATION], data["labels"]
    for shape in data["shapes"]:
        count = shape["watchers"]
        rows = {labels[peer]: taken[str(count)] for peer, taken in data["peers"].items()}
        told = _figures(
            f"{count} watcher{'' if count == 1 else 's'}",
            rows,
            Column("p50 / SLM", "sent_p50", beside=labels["slm"]),
            Column("p50", "sent_p50", " ms"),
            Column("p99", "sent_p99", " ms"),
            Column("last one, p50", "last_p50", " ms"),
            Column("write answered, p50", "write_p50", " ms"),
            Column("changes missed", "missed"),
        )
        parts.append(told)
    durable = [f"- {labels[peer]}: {text}." for peer, text in data["durability"].items()]
    parts.append("![Cumulative curves of all contestants](performance/propagation.svg)")
    parts += ["What is guaranteed when a write is answered:", "\n".join(durable)]
    return [*parts, *_missing(data["missing"])]


def _polling(data: Data) -> list[str]:
    product = f"Unleash {data.get('server_version', '')}".strip()
    p50, p99 = (quantile(data["seconds"], fraction) for fraction in (0.5, 0.99))
    return [notes.POLLING.format(product=product, p50=p50, p99=p99, **data)]


def _reads(data: Data) -> list[str]:
    ours = "SLM `resolve`, awaited"
    labels = data["labels"] | {
        "resolve": ours,
        "get_agent_config": "SLM `get_agent_config`, awaited",
        "awaited dict": "a dict behind one `await`",
    }
    fastest_first = sorted(data["ns"].items(), key=lambda item: figure(item[1]).median)
    rows = {labels[name]: taken for name, taken in fastest_first}
    told = _figures("", rows, Column("/ `resolve`", beside=ours), Column("one call", unit=" ns"))
    return [notes.READS.format(**data), told, *_missing(data["missing"])]


def _http(data: Data) -> list[str]:
    told = _figures(
        "GET",
        data["loads"],
        Column("a second", "per_second"),
        Column("p50", "p50_ms", " ms"),
        Column("p99", "p99_ms", " ms"),
        Column("bytes", "bytes"),
    )
    during = notes.DURING.format(
        subscribers=data["subscribers"],
        p50=show(values(data, "during/p50_ms"), " ms"),
        p99=show(values(data, "during/p99_ms"), " ms"),
        requests=sum(values(data, "during/requests")),
        broadcasts=sum(values(data, "during/broadcasts")),
    )
    return [notes.HTTP.format(**data), told, during]


def _startup(data: Data) -> list[str]:
    rows = {f"`import {name}`": taken for name, taken in at(data, "imports_ms").items()}
    told = _figures(
        "",
        rows,
        Column("/ aiohttp and pydantic", beside="`import aiohttp and pydantic`"),
        Column("/ with pydantic's models", beside="`import aiohttp and pydantic's models`"),
        Column("time", unit=" ms"),
    )
    connect = notes.CONNECT.format(
        agents=data["agents"],
        seconds=show(values(data, "connects/seconds"), " s"),
        cpu=show(values(data, "connects/cpu_seconds"), " s"),
        memory=show([size / 1024 for size in values(data, "connects/bytes_an_agent")], " KiB"),
    )
    return [notes.STARTUP, told, connect]


def _llm(data: Data) -> list[str]:
    rows = {
        label: {field: data[f"{who}_{field}"] for field in ("cpu_ms", "p50_ms")}
        for label, who in _CLIENTS.items()
    }
    rows["LLMInterface"]["cpu_ratio"] = data["cpu_ratio"]
    told = _figures(
        "",
        rows,
        Column("CPU / openai SDK", "cpu_ratio", optional=True),
        Column("p50 / openai SDK", "p50_ms", beside="openai SDK"),
        Column("CPU a call", "cpu_ms", " ms"),
        Column("time a call, p50", "p50_ms", " ms"),
    )
    return [notes.LLM, told]


_CLIENTS = {"LLMInterface": "slm", "openai SDK": "sdk", "openai SDK, lean": "sdk, same transport"}


def _growth(data: Data) -> list[str]:
    rows = _by_size(data)
    fewest = next(iter(rows))
    told = _figures(
        "agents",
        rows,
        Column(f"PUT / at {fewest}", "put_p50_ms", beside=fewest),
        Column(f"resolve / at {fewest}", "resolve_ns", beside=fewest),
        Column("PUT p50", "put_p50_ms", " ms"),
        Column("resolve", "resolve_ns", " ns"),
    )
    return [notes.GROWTH, told, "![Cost against the number of agents](performance/growth.svg)"]


def _history(data: Data) -> list[str]:
    engines = data["engines"]
    columns = [
        Column(f"{engine}, {what}", f"{engine}/{path}", unit)
        for engine in engines
        for what, path, unit in (("p50", "p50_ms", " ms"), ("memory", "memory_mib", " MiB"))
    ]
    rows = {
        name: {engine: lists[name] for engine, lists in engines.items()}
        for name in next(iter(engines.values()))
    }
    return [notes.HISTORY.format(**data), _figures("a page of", rows, *columns)]


SECTIONS: dict[str, tuple[str, Callable[[Data], list[str]]]] = {
    "fanout": ("## One change to many subscribers", _fanout),
    "accept": ("## Connections accepted", _accept),
    "propagation": ("## From the write to the callback", _propagation),
    "polling": ("### A product that polls", _polling),
    "reads": ("## What one read costs a backend", _reads),
    "http": ("## GETs", _http),
    "startup": ("## A backend's start", _startup),
    "llm": ("## LLMInterface beside the bare SDK", _llm),
    "growth": ("## Cost against the number of agents", _growth),
    "history": ("## Pages of a long history", _history),
}
"""In the order of the page, by the bench's name."""
