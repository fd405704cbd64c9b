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


def test_every_miss_has_its_reason_and_a_remedy(kept: Kept) -> None:
    """Each row that is missed is in the list under the table."""
    told = section(report.render(kept), "## Targets")
    table, _, explained = told.partition("### What is missed, and why")
    missed = table.count("| **missed** |")
    assert " ".join(explained.split()).count("What would change it:") == missed


def test_results_of_two_runs_are_told_of_at_the_top(kept: Kept) -> None:
    """One bench that was measured again, or of another commit, is no longer "one run"."""
    one_run, caveat = "in one run", "**This is not one run.**"
    for one in kept.files.values():
        one.update(run="2026-01-01 00:00:00 UTC", commit="abc1234")
    text = report.render(kept)
    assert one_run in text
    assert caveat not in text
    for change in ({"commit": "def5678"}, {"run": "2026-01-02 00:00:00 UTC"}):
        other = copy.deepcopy(kept)
        other.files["growth"].update(change)
        text = report.render(other)
        assert one_run not in text
        assert text.index(caveat) < text.index("## Targets")


def test_what_was_not_measured_here_is_named(kept: Kept) -> None:
    """A bench without what it needs keeps its heading and says what that is; nothing was cut."""
    kept.missing["polling"] = "unleash-server (npm install)"
    kept.missing["llm"] = "openai (PyPI)"
    for name in kept.missing:
        del kept.results[name]
    text = report.render(kept)
    assert "### A product that polls\n\nNot measured here: unleash-server (npm install)." in text
    assert "## LLMInterface beside the bare SDK\n\nNot measured here: openai (PyPI)." in text
    assert "| not measured here: openai (PyPI) | not measured |" in text
    assert "Not everything was measured" not in text


def test_a_bench_without_a_result_is_told_of(kept: Kept) -> None:
    """One that failed has no section, and the top of the page names it."""
    del kept.files["growth"], kept.results["growth"]
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


def test_subscribers_that_ack_have_their_columns(kept: Kept) -> None:
    """What a change costs among subscribers that ack stands beside those that only listen."""
    for repeat in fan_repeats(kept)["10000"]:
        repeat.update(acking_ratio=1.4)
    kept.results["fanout"]["memory_acked"] = [5 * 1024]
    text = report.render(kept)
    fan = section(text, "## One change to many subscribers")
    assert '"Acking"' in fan
    assert '"Farm late"' in fan
    rows = [line for line in fan.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "to subscribers that all ack: **1.4** times" in section(text, "## Targets")
    assert "**5** KiB once it has acked" in section(text, "## Targets")


def test_a_farm_that_limits_is_a_caveat(kept: Kept) -> None:
    """A ratio that the measuring program flatters is not passed off as the server's."""
    for repeat in fan_repeats(kept)["5000"]:
        repeat.update(farm_late_ms=1e3)
    text = report.render(kept)
    assert text.index("was a limit itself.** At 5,000 subscribers") < text.index("## Targets")


def test_the_sdk_on_a_lean_client_is_a_column(kept: Kept) -> None:
    """The third contestant of the LLM bench is shown beside the other two."""
    for name in ("cpu_ms", "p50_ms"):
        kept.results["llm"][f"sdk, same transport_{name}"] = [1.0] * 5
    told = section(report.render(kept), "## LLMInterface beside the bare SDK")
    assert "| openai SDK, lean client |" in told
    assert told.count("**1** ms (1 to 1) |") == 2


def test_the_version_of_unleash_is_the_one_measured(kept: Kept) -> None:
    """It comes from the result, or is not named."""
    kept.results["polling"].pop("server_version", None)
    assert "Unleash on PostgreSQL" in report.render(kept)
    kept.results["polling"]["server_version"] = "7.5.1"
    assert "Unleash 7.5.1 on PostgreSQL" in report.render(kept)
