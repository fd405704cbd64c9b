"""docs/performance.md, written from the kept results and from nothing else."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import reading
from benchmarks.report import notes, sections, targets
from benchmarks.report.figures import table
from benchmarks.report.sections import SECTIONS

_ENVELOPE = {"title", "taken", "seconds", "repeats", "commit", "machine", "versions"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


@dataclass(frozen=True)
class Kept:
    """The kept results of a folder by the bench's name: whole files, with where and when."""

    files: dict[str, dict[str, Any]]

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """What was measured."""
        return {name: one["data"] for name, one in self.files.items() if "data" in one}

    @property
    def missing(self) -> dict[str, str]:
        """What a bench needs and did not find, where nothing was measured for that."""
        return {name: one["missing"] for name, one in self.files.items() if "missing" in one}


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
    return Kept(files)


def write(folder: Path, document: Path | None) -> str:
    """Write the document with its plots, if one is named; return the table of targets."""
    kept = read(folder)
    if document is not None:
        text = render(kept)
        from benchmarks.report import plots

        plots.draw(kept.results, document.with_suffix(""))
        document.write_text(text)
    return "\n\n".join([*_caveats(kept), _targets(kept, targets.rows(kept.results, kept.missing))])


def render(kept: Kept) -> str:
    """Return the document's text.

    Raises:
        Malformed: a result lacks what its bench always writes.
    """
    rows = targets.rows(kept.results, kept.missing)
    parts = [notes.INTRODUCTION, *_caveats(kept), "## Targets", _targets(kept, rows)]
    if missed := [row.target.label for row in rows if row.met is False]:
        parts.append("### What is missed")
    parts += [f"**{label}.** {notes.MISSED.get(label, notes.NOT_EXPLAINED)}" for label in missed]
    parts += [sections.render(name, kept.files[name]) for name in SECTIONS if name in kept.files]
    if kept.files:
        parts += ["## Where and when", *_where(kept)]
    return "\n\n".join(map(_fill, "\n\n".join(parts).split("\n\n"))) + "\n"


def _fill(paragraph: str) -> str:
    if paragraph.startswith(("|", "#", "-", "!")):
        return paragraph
    return textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)


def _targets(kept: Kept, rows: list[targets.Row]) -> str:
    lines = []
    for row in rows:
        bench = row.target.bench
        of = f"{kept.files[bench]['taken'][:10]}, {bench}.json" if bench in kept.files else ""
        lines.append([row.target.label, row.target.limit, row.measured, row.verdict, of])
    return table(["what", "target", "measured", "", "figures"], lines)


def _caveats(kept: Kept) -> list[str]:
    """Say what the figures cannot be trusted for."""
    found = []
    loads = [one["machine"]["load_before"] for one in kept.files.values()]
    cores = min((one["machine"]["cores"] for one in kept.files.values()), default=1)
    # One bench's own work is a load of about the number of cores.
    if loads and max(loads) > 2 * cores:
        found.append(notes.LOADED.format(lowest=min(loads), highest=max(loads), cores=cores))
    if unfinished := [name for name in SECTIONS if name not in kept.files]:
        found.append(notes.UNFINISHED.format(names=", ".join(unfinished)))
    return found


def _where(kept: Kept) -> list[str]:
    machines: dict[str, list[str]] = defaultdict(list)
    versions: dict[str, set[str]] = defaultdict(set)
    for name, one in kept.files.items():
        machines[notes.MACHINE.format(**one["machine"]).replace("\n", " ")].append(name)
        for package, version in one["versions"].items():
            versions[package].add(version)
    places = "\n".join(f"- {', '.join(names)}: {place}" for place, names in machines.items())
    listed = ", ".join(
        f"{name} {' and '.join(sorted(versions[name]))}" for name in sorted(versions)
    )
    return [places, notes.PLACE, f"Versions: {listed}."]
