"""docs/performance.md says what the committed results say, and what is wrong with a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.harness.errors import Malformed
from benchmarks.harness.run import RESULTS
from benchmarks.report import report
from benchmarks.report.report import Kept
from benchmarks.report.sections import SECTIONS


@pytest.fixture
def kept() -> Kept:
    """Return a copy of the committed results."""
    return copy.deepcopy(report.read(RESULTS))


def fan_repeats(kept: Kept) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = kept.results["fanout"]["per_size"]
    return found


def section(text: str, heading: str) -> str:
    return text.partition(f"{heading}\n")[2].partition("\n## ")[0]


def test_the_document_is_that_of_the_committed_results(kept: Kept) -> None:
    """Results or notes that change without it need `python -m benchmarks --report`."""
    assert report.DOCUMENT.read_text() == report.render(kept)


def test_every_miss_is_shown_as_missed(kept: Kept) -> None:
    """Each row that is missed has its paragraph under the table, though its reason be unknown."""
    for repeat in fan_repeats(kept)["10000"]:
        repeat.update(change_ratio=1.31)
    told = section(report.render(kept), "## Targets")
    table, _, explained = told.partition("### What is missed")
    assert "| at most 1.3 times | **1.31** times | **missed** |" in table
    assert "SLM / C loop.** The results do not show why." in " ".join(explained.split())
    assert explained.count("\n\n**") == table.count("| **missed** |") == 4


def test_every_figure_names_its_date_and_file(kept: Kept) -> None:
    """Each section says when its figures were taken and where they are kept; each target, too."""
    text = report.render(kept)
    for name, (heading, _) in SECTIONS.items():
        one = kept.files[name]
        taken = " ".join(section(text, heading).strip().split("\n\n")[0].split())
        assert taken.startswith(f"Taken {one['taken']}, {one['repeats']} repeats")
        assert taken.endswith(f"`benchmarks/results/{name}.json`.")
    for line in section(text, "## Targets").splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| what")):
            file = line.rsplit(", ", 1)[1].removesuffix(" |")
            assert f"| {kept.files[file.removesuffix('.json')]['taken'][:10]}, {file} |" in line


def test_what_was_not_measured_here_is_named(kept: Kept) -> None:
    """A bench without what it needs keeps its heading and says what that is; nothing was cut."""
    for name, needs in (("polling", "unleash-server (npm install)"), ("llm", "openai (PyPI)")):
        del kept.files[name]["data"]
        kept.files[name]["missing"] = needs
    text = report.render(kept)
    assert "Not measured here: unleash-server" in section(text, "### A product that polls")
    assert "Not measured here: openai" in section(text, "## LLMInterface beside the bare SDK")
    assert "| not measured here: openai (PyPI) | not measured |" in text
    assert "Not everything was measured" not in text


def test_a_bench_without_a_result_is_told_of(kept: Kept) -> None:
    """One that failed has no section, and the top of the page names it."""
    del kept.files["growth"]
    text = report.render(kept)
    assert "## Cost against" not in text
    caveat = text[text.index("**Not everything was measured.**") : text.index("## Targets")]
    assert "run: growth." in caveat


def test_a_malformed_result_is_an_error(kept: Kept, tmp_path: Path) -> None:
    """A field that only a section shows counts too, and so does a file that is cut off."""
    for repeat in kept.results["http"]["loads"]["one agent, not modified"]:
        del repeat["p50_ms"]
    with pytest.raises(Malformed, match="result of http "):
        report.render(kept)
    for text in ("{", "{}", json.dumps({**kept.files["llm"], "missing": "and data too"})):
        (tmp_path / "llm.json").write_text(text)
        with pytest.raises(Malformed, match="result of llm "):
            report.read(tmp_path)


def test_what_only_some_sizes_measure_leaves_a_blank(kept: Kept) -> None:
    """Every row of a table has as many cells, whether or not its size has subscribers that ack."""
    fan = section(report.render(kept), "## One change to many subscribers")
    lines = [line for line in fan.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "|  |" in next(line for line in lines if line.startswith("| 100 subscribers |"))


def test_a_busy_machine_is_named_before_the_figures(kept: Kept) -> None:
    """Figures that were taken under load are not passed off as those of a quiet machine."""
    assert "was not quiet" not in report.render(kept)
    kept.files["http"]["machine"]["load_before"] = 9.0
    text = report.render(kept)
    assert text.index("**The machine was not quiet.**") < text.index("## Targets")


def test_results_of_two_machines_name_both(kept: Kept) -> None:
    """The benches are listed under the machine and the versions that they were taken with."""
    kept.files["growth"]["machine"]["cpu"] = "another processor"
    kept.files["growth"]["versions"] = {"fastapi": "0.1"}
    told = " ".join(section(report.render(kept), "## Where and when").split())
    assert "- growth: 2 cores of another processor" in told
    assert "fastapi 0.1 and 0.165.0" in told


def test_the_version_of_unleash_is_the_one_measured(kept: Kept) -> None:
    """It comes from the result, or is not named."""
    kept.results["polling"].pop("server_version", None)
    assert "Unleash on PostgreSQL" in report.render(kept)
    kept.results["polling"]["server_version"] = "7.5.1"
    assert "Unleash 7.5.1 on PostgreSQL" in report.render(kept)
