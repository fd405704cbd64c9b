"""The targets' rows, on the committed results and on doctored ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from benchmarks.harness.errors import Malformed
from benchmarks.harness.run import RESULTS
from benchmarks.report import notes, report
from benchmarks.report.targets import TARGETS, Row, Target, rows

Results = dict[str, Any]
COMMITTED = report.read(RESULTS)
PUT_ETCD = "PUT sent to callback, 500 watchers: SLM / etcd watch"


@pytest.fixture
def results() -> Results:
    """Return a copy of what the committed results say was measured."""
    return copy.deepcopy(COMMITTED.results)


def row_of(results: Results, label: str, missing: dict[str, str] | None = None) -> Row:
    (row,) = [row for row in rows(results, missing or {}) if row.target.label == label]
    return row


def fill(data: Any, path: str, value: float) -> None:
    """Set every repeat's value at a path, as the table of targets has it."""
    step, _, rest = path.partition("/")
    if isinstance(data, list):
        for repeat in data:
            fill(repeat, path, value)
        return
    for key in list(data) if step == "*" else [step]:
        if rest:
            fill(data[key], rest, value)
        else:
            data[key] = [value] * len(data[key]) if isinstance(data[key], list) else value


def measure(results: Results, target: Target, value: float) -> None:
    """Let every repeat measure this for a target, in the target's unit."""
    if target.unit == "KiB":
        value *= 1024
    elif target.unit == "%":
        value = 1 + value / 100
    if target.over:
        fill(results[target.bench], target.over.format(size=target.size), 1)
    fill(results, target.path.format(size=target.size), value)


def test_the_committed_results_judge_every_target() -> None:
    """A full run on a machine with every peer leaves nothing open, and each miss is explained."""
    found = rows(COMMITTED.results, COMMITTED.missing)
    assert len({row.target.label for row in found}) == len(found)
    assert {row.verdict for row in found} <= {"met", "**missed**"}
    assert {row.target.label for row in found if row.met is False} == set(notes.MISSED)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_a_target_is_met_up_to_its_limit(target: Target, results: Results) -> None:
    """Just within the limit it is met, just beyond it missed."""
    limit, better = (target.at_most, 0.999) if target.at_most else (target.at_least, 1.001)
    assert limit is not None
    measure(results, target, limit * better)
    assert row_of(results, target.label).verdict == "met"
    measure(results, target, limit / better)
    row = row_of(results, target.label)
    assert (row.met, row.verdict) == (False, "**missed**")


@pytest.mark.parametrize(
    ("label", "limit"),
    [("commit to callback, 1 backend, p50", 0.5), ("connections accepted, of 3,000", 1_500)],
)
def test_the_limit_itself_is_met(label: str, limit: float, results: Results) -> None:
    """A figure that is exactly the limit is good enough."""
    (target,) = [target for target in TARGETS if target.label == label]
    measure(results, target, limit)
    assert row_of(results, label).met is True


def test_the_worst_of_many_counts(results: Results) -> None:
    """One slow list among the fast ones misses the target of all lists."""
    target = TARGETS[-2]
    measure(results, target, 1)
    results["history"]["engines"]["PostgreSQL"]["audit of one agent"]["p50_ms"] = [21.0] * 3
    row = row_of(results, target.label)
    assert (row.met, row.measured) == (False, "**21** ms")


WITHOUT_TARGET = {"polling"}
"""Benches that are measured and not judged."""


@pytest.mark.parametrize("bench", sorted(COMMITTED.results.keys() - WITHOUT_TARGET))
def test_a_bench_without_a_result(bench: str, results: Results) -> None:
    """Its rows say so and nothing else changes; what it needs is named where it is known."""
    before = rows(results, {})
    del results[bench]
    changed = [row for row in rows(results, {}) if row not in before]
    assert {row.target.bench for row in changed} == {bench}
    for row in changed:
        assert (row.met, row.verdict, row.measured) == (None, "not measured", "no result")
        named = row_of(results, row.target.label, {bench: "a C compiler"})
        assert (named.met, named.measured) == (None, "not measured here: a C compiler")


def cut(bench: str, field: str, value: int) -> Callable[[Results], None]:
    return lambda results: results[bench].update({field: value})


def only_sizes(bench: str, *sizes: str) -> Callable[[Results], None]:
    def doctor(results: Results) -> None:
        per_size = results[bench]["per_size"]
        results[bench]["per_size"] = {size: per_size[size] for size in sizes}

    return doctor


def fewer_watchers(results: Results) -> None:
    for per_shape in results["propagation"]["peers"].values():
        per_shape["100"] = per_shape.pop("500")


@pytest.mark.parametrize(
    ("bench", "full", "quick", "doctor"),
    [
        ("fanout", 10_000, "1,000", only_sizes("fanout", "100", "1000")),
        ("fanout", 1_000, "100", only_sizes("fanout", "100")),
        ("accept", 3_000, "500", cut("accept", "connections", 500)),
        ("propagation", 500, "100", fewer_watchers),
        ("reads", 1_000, "10", cut("reads", "values", 10)),
        ("http", 10_000, "1,000", cut("http", "subscribers", 1_000)),
        ("startup", 10_000, "1,000", cut("startup", "agents", 1_000)),
        ("growth", 100_000, "10,000", only_sizes("growth", "10", "10000")),
        ("history", 1_000_000, "20,000", cut("history", "rows", 20_000)),
    ],
)
def test_another_size_is_shown_and_not_judged(
    bench: str, full: int, quick: str, doctor: Callable[[Results], None], results: Results
) -> None:
    """What a quick run measures stands in its row without a verdict that it did not earn."""
    doctor(results)
    found = [each for each in rows(results, {}) if each.target.bench == bench]
    sized = [row for row in found if row.target.size == full]
    assert sized
    for row in sized:
        assert (row.met, row.verdict) == (None, f"not judged (at {quick})")
        assert "**" in row.measured


def test_what_a_quick_run_leaves_out_is_not_measured(results: Results) -> None:
    """The memory with acks is no error where it is absent, and no verdict."""
    results["fanout"]["memory_acked"] = []
    row = row_of(results, TARGETS[3].label)
    assert (row.met, row.verdict) == (None, "not measured")


@pytest.mark.parametrize(
    ("bench", "field", "peer", "label"),
    [
        ("propagation", "peers", "etcd", PUT_ETCD),
        ("reads", "ns", "unleash", "Unleash `get_variant` / `resolve`"),
    ],
)
def test_a_peer_that_is_not_installed(
    bench: str, field: str, peer: str, label: str, results: Results
) -> None:
    """The ratio to it is open and says what it needs; the other rows keep their verdicts."""
    before = rows(results, {})
    del results[bench][field][peer]
    results[bench]["missing"][peer] = f"{peer} (apt-get install {peer})"
    row = row_of(results, label)
    assert (row.met, row.verdict) == (None, "not measured")
    assert row.measured == f"not measured here: {peer} (apt-get install {peer})"
    changed = [row for row in rows(results, {}) if row not in before]
    assert {row.target.peer for row in changed} == {peer}


def renamed(repeats: list[dict[str, Any]], name: str) -> None:
    for repeat in repeats:
        repeat[f"{name}_new"] = repeat.pop(name)


@pytest.mark.parametrize(
    ("bench", "doctor"),
    [
        ("fanout", lambda r: renamed(r["fanout"]["per_size"]["10000"], "change_ratio")),
        ("accept", lambda r: r["accept"].pop("connections")),
        ("propagation", lambda r: renamed(r["propagation"]["peers"]["slm"]["1"], "commit_p50")),
        ("propagation", lambda r: r["propagation"]["peers"].pop("etcd")),
        ("reads", lambda r: r["reads"]["ns"].pop("unleash")),
        ("http", lambda r: renamed(r["http"]["during"], "p99_ms")),
        ("startup", lambda r: r["startup"].update(connects=[])),
        ("llm", lambda r: r["llm"]["cpu_ratio"].clear()),
        ("growth", lambda r: r["growth"]["per_size"]["10"]["resolve_ns"].pop()),
    ],
)
def test_a_field_of_another_name_is_an_error(
    bench: str, doctor: Callable[[Results], None], results: Results
) -> None:
    """It does not pass for something that was not measured."""
    doctor(results)
    with pytest.raises(Malformed, match=f"result of {bench} "):
        rows(results, {})


def test_the_reasons_are_those_of_the_figures() -> None:
    """Each sentence on why a target is missed holds for the committed results."""
    slm, etcd = (COMMITTED.results["propagation"]["peers"][name]["1"] for name in ("slm", "etcd"))
    for ours, theirs in zip(slm, etcd, strict=True):
        assert ours["commit_p50"] < ours["sent_p50"] / 2
        assert theirs["sent_p50"] < ours["sent_p50"]
    durability = COMMITTED.results["propagation"]["durability"]
    assert all("fsync before the answer" in durability[name] for name in ("slm", "etcd"))
    imports = COMMITTED.results["startup"]["imports_ms"]
    ways = ("slm", "aiohttp and pydantic's models", "aiohttp and pydantic")
    for whole, models, base in zip(*(imports[name] for name in ways), strict=True):
        assert base > whole / 2
        assert base < models < whole
