"""docs/performance.md, written from the kept results and from nothing else."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import reading
from benchmarks.report import notes, sections, targets
from benchmarks.report.sections import PLOTS, SECTIONS, table

_ENVELOPE = {"title", "taken", "seconds", "repeats", "commit", "machine", "versions"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


@dataclass(frozen=True)
class Kept:
    """The kept results of a folder, by the bench's name.

    Attributes:
        files: all that is kept of each, with where and when.
        results: what was measured.
        missing: what a bench needs and did not find, where nothing was measured for that.
    """

    files: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Any]]
    missing: dict[str, str]


def read(folder: Path) -> Kept:
    """Return every kept result of a folder.

    Raises:
        Malformed: a file does not say when it was taken and where, or has neither figures nor what
            is missing for them.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        with reading(path.stem):
            one = files[path.stem] = json.loads(path.read_text())
            if absent := _ENVELOPE - set(one):
                raise KeyError(*sorted(absent))
            if ("data" in one) == ("missing" in one):
                raise KeyError("data")
    return Kept(
        files,
        {name: one["data"] for name, one in files.items() if "data" in one},
        {name: one["missing"] for name, one in files.items() if "missing" in one},
    )


def write(folder: Path, document: Path | None) -> str:
    """Write the document with its plots, if one is named; return the table of targets."""
    kept = read(folder)
    if document is not None:
        text = render(kept)
        from benchmarks.report import plots

        plots.draw(kept.results, document.parent / PLOTS)
        document.write_text(text)
    return "\n\n".join([*caveats(kept), _targets(kept)])


def render(kept: Kept) -> str:
    """Return the document's text.

    Raises:
        Malformed: a result lacks what its bench always writes.
    """
    when = notes.SEVERAL_RUNS if _several_runs(kept) else notes.ONE_RUN
    introduction = notes.INTRODUCTION.format(when=when).split("\n\n")
    parts = [*map(_fill, introduction), *caveats(kept), "## Targets", _targets(kept)]
    missed = [row for row in targets.rows(kept.results, kept.missing) if row.met is False]
    if missed:
        parts.append("### What is missed, and why")
    for row in missed:
        explained = notes.MISSED.get(row.key, notes.NOT_EXPLAINED)
        parts.append(
            _fill(f"**{row.what}.** {explained.why} What would change it: {explained.remedy}")
        )
    parts += [
        sections.render(name, kept.results.get(name), kept.missing.get(name))
        for name in SECTIONS
        if name in kept.files
    ]
    if kept.files:
        parts += ["## Where and when", _where(kept)]
    return "\n\n".join(parts) + "\n"


def _fill(paragraph: str) -> str:
    return textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)


def _targets(kept: Kept) -> str:
    lines = [
        [row.what, row.target, row.measured, row.verdict]
        for row in targets.rows(kept.results, kept.missing)
    ]
    return table(["what", "target", "measured", ""], lines)


def caveats(kept: Kept) -> list[str]:
    """Say what the figures cannot be trusted for, the gravest first."""
    found = []
    if _several_runs(kept):
        runs = "; ".join(
            f"{name} {one['taken']} of {one['commit']}" for name, one in kept.files.items()
        )
        found.append(notes.NOT_ONE_RUN.format(runs=runs))
    loads = [one["machine"]["load_before"] for one in kept.files.values()]
    cores = min((one["machine"]["cores"] for one in kept.files.values()), default=1)
    # One bench's own work is a load of about the number of cores.
    if loads and max(loads) > 2 * cores:
        found.append(notes.LOADED.format(lowest=min(loads), highest=max(loads), cores=cores))
    if unfinished := [name for name in SECTIONS if name not in kept.files]:
        found.append(notes.UNFINISHED.format(names=", ".join(unfinished)))
    if "fanout" in kept.results and (sizes := sections.limited_by_the_farm(kept.results["fanout"])):
        found.append(notes.FARM_LIMITS.format(sizes=" and ".join(sizes)))
    return found


def _several_runs(kept: Kept) -> bool:
    """Whether the results are of several commits, or were taken by several calls of the bench."""
    return len({(one["commit"], one.get("run")) for one in kept.files.values()}) > 1


def _where(kept: Kept) -> str:
    each = max(kept.files.values(), key=lambda one: str(one["taken"]))
    about, parts = each["machine"], []
    parts.append(
        f"{about['cores']} cores of {about['cpu']}, {about['memory_gib']} GiB, {about['system']},"
        f" Linux {about['kernel']}, Python {about['python']}, SQLite {about['sqlite']},"
        f" {about['openssl']}; databases on {about['file_system']}. The server runs on the first"
        " core and whatever loads it on the last,"
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
            f"`benchmarks/results/{name}.json`",
        ]
        for name, one in kept.files.items()
    ]
    header = ["bench", "taken", "repeats", "took", "commit", "load before", "figures"]
    parts.append(table(header, lines))
    listed = ", ".join(f"{name} {number}" for name, number in sorted(each["versions"].items()))
    parts.append(f"Versions: {listed}.")
    parts.append(
        "The file of the last column has the raw figures of every repeat. A package or program of"
        " the bench that is not named here was not installed."
    )
    return "\n\n".join(parts)
