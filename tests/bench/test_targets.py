"""The targets' rows, on the committed results and on doctored ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from benchmarks.harness.errors import Malformed
from benchmarks.harness.run import RESULTS
from benchmarks.report import notes, report, targets

Results = dict[str, Any]
Doctor = Callable[[Results], None]

COMMITTED = report.read(RESULTS)


@pytest.fixture
def results() -> Results:
    """Return a copy of what the committed results say was measured."""
    return copy.deepcopy(COMMITTED.results)


def row_of(results: Results, key: str, missing: dict[str, str] | None = None) -> targets.Row:
    (row,) = [row for row in targets.rows(results, missing or {}) if row.key == key]
    return row


def fan(size: str, **fields: float) -> Doctor:
    def doctor(results: Results) -> None:
        for repeat in results["fanout"]["per_size"][size]:
            repeat.update(fields)

    return doctor


def propagated(peer: str, watchers: str, **fields: float) -> Doctor:
    def doctor(results: Results) -> None:
        for repeat in results["propagation"]["peers"][peer][watchers]:
            repeat.update(fields)

    return doctor


def listed(bench: str, *path: str, value: float) -> Doctor:
    """Set every repeat of a list of numbers."""

    def doctor(results: Results) -> None:
        holder = results[bench]
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = [value] * len(holder[path[-1]])

    return doctor


def repeated(bench: str, *path: str, **fields: float) -> Doctor:
    """Set fields of every repeat of a list of objects."""

    def doctor(results: Results) -> None:
        holder = results[bench]
        for step in path:
            holder = holder[step]
        for repeat in holder:
            repeat.update(fields)

    return doctor


def both(*doctors: Doctor) -> Doctor:
    def doctor(results: Results) -> None:
        for each in doctors:
            each(results)

    return doctor


GOOD_READS = both(
    listed("reads", "ns", "resolve", value=100),
    listed("reads", "ns", "unleash", value=20_000),
    listed("reads", "ns", "get_agent_config", value=400),
    listed("reads", "ns", "launchdarkly", value=5000),
)
GOOD_GETS = both(
    repeated("http", "loads", "one agent", per_second=6000, p99_ms=20),
    repeated("http", "loads", "the list of 1,000", per_second=1500, p99_ms=20),
)
SLOW_PEERS = both(*(propagated(peer, "500", sent_p50=9) for peer in ("etcd", "nats", "postgres")))
FLAT = both(
    *(
        listed("growth", "per_size", size, name, value=100)
        for size in ("10", "100000")
        for name in ("put_p50_ms", "resolve_ns")
    )
)
KIB = 1024


def pages(engine: str, **fields: float) -> Doctor:
    """Set the figures of every list of an engine."""

    def doctor(results: Results) -> None:
        for taken in results["history"]["engines"][engine].values():
            taken.update({name: [value] * 5 for name, value in fields.items()})

    return doctor


QUICK_PAGES = both(*(pages(each, p50_ms=20, memory_mib=5) for each in ("SQLite", "PostgreSQL")))

BESIDE_EITHER_SDK = both(
    *(
        listed("llm", f"{name}{which}", value=value)
        for name, value in (("cpu_ratio", 1.04), ("added_ms", 0.1))
        for which in ("", ", same transport")
    )
)

AT_THE_EDGE: list[tuple[str, Doctor, Doctor]] = [
    ("fanout-10000", fan("10000", change_ratio=1.3), fan("10000", change_ratio=1.31)),
    ("fanout-1000", fan("1000", change_ratio=1.5), fan("1000", change_ratio=1.51)),
    (
        "memory",
        both(
            fan("10000", bytes_a_subscriber=6 * KIB),
            listed("fanout", "memory_acked", value=32 * KIB),
        ),
        fan("10000", bytes_a_subscriber=6 * KIB + 1),
    ),
    (
        "memory",
        both(
            fan("10000", bytes_a_subscriber=6 * KIB),
            listed("fanout", "memory_acked", value=32 * KIB),
        ),
        listed("fanout", "memory_acked", value=32 * KIB + 1),
    ),
    (
        "accept",
        listed("accept", "plain", value=1500),
        listed("accept", "plain", value=1499),
    ),
    (
        "commit-1",
        propagated("slm", "1", commit_p50=0.5, commit_p99=3),
        propagated("slm", "1", commit_p99=3.1),
    ),
    (
        "commit-500",
        propagated("slm", "500", commit_p50=22, commit_p99=35),
        propagated("slm", "500", commit_p50=22.1),
    ),
    (
        "put-1",
        both(propagated("slm", "1", sent_p50=2), propagated("etcd", "1", sent_p50=2)),
        propagated("etcd", "1", sent_p50=1.9),
    ),
    (
        "put-500",
        both(propagated("slm", "500", sent_p50=9), SLOW_PEERS),
        propagated("nats", "500", sent_p50=8.9),
    ),
    ("reads", GOOD_READS, listed("reads", "ns", "get_agent_config", value=401)),
    ("reads", GOOD_READS, listed("reads", "ns", "launchdarkly", value=4900)),
    ("reads", GOOD_READS, listed("reads", "ns", "unleash", value=19_900)),
    ("gets", GOOD_GETS, repeated("http", "loads", "one agent", p99_ms=21)),
    ("gets", GOOD_GETS, repeated("http", "loads", "the list of 1,000", per_second=1499)),
    ("during", repeated("http", "during", p99_ms=30), repeated("http", "during", p99_ms=31)),
    (
        "connect",
        repeated("startup", "connects", seconds=1, bytes_an_agent=2048),
        repeated("startup", "connects", bytes_an_agent=2049),
    ),
    (
        "llm",
        BESIDE_EITHER_SDK,
        listed("llm", "added_ms", value=0.11),
    ),
    (
        "llm",
        BESIDE_EITHER_SDK,
        listed("llm", "cpu_ratio, same transport", value=1.06),
    ),
    (
        "import",
        both(
            listed("startup", "imports_ms", "slm", value=130),
            listed("startup", "imports_ms", "aiohttp and pydantic", value=100),
        ),
        listed("startup", "imports_ms", "slm", value=131),
    ),
    ("growth", FLAT, listed("growth", "per_size", "100000", "resolve_ns", value=121)),
    ("history", QUICK_PAGES, pages("PostgreSQL", p50_ms=20.1)),
    ("history", QUICK_PAGES, pages("SQLite", memory_mib=5.1)),
]


def test_the_committed_results_judge_every_target() -> None:
    """A full run on a machine with every peer leaves nothing open, and each miss is explained."""
    found = targets.rows(COMMITTED.results, COMMITTED.missing)
    assert len({row.key for row in found}) == len(found) == 16
    assert {row.verdict for row in found} <= {"met", "**missed**"}
    assert {row.key for row in found if row.met is False} <= set(notes.MISSED)
    assert set(notes.MISSED) <= {row.key for row in found}


@pytest.mark.parametrize(("key", "good", "bad"), AT_THE_EDGE)
def test_a_target_is_met_up_to_its_limit(
    key: str, good: Doctor, bad: Doctor, results: Results
) -> None:
    """At the limit it is met, just beyond it missed."""
    good(results)
    assert row_of(results, key).verdict == "met"
    bad(results)
    row = row_of(results, key)
    assert (row.met, row.verdict) == (False, "**missed**")


def test_every_target_has_an_edge() -> None:
    """The table above leaves none out."""
    assert {key for key, _, _ in AT_THE_EDGE} == {row.key for row in targets.rows({}, {})}


WITHOUT_TARGET = {"polling"}
"""Benches that are measured and not judged."""


@pytest.mark.parametrize("bench", sorted(COMMITTED.results.keys() - WITHOUT_TARGET))
def test_a_bench_without_a_result(bench: str, results: Results) -> None:
    """Its rows say so and nothing else changes; what it needs is named where it is known."""
    before = targets.rows(results, {})
    del results[bench]
    changed = [row for row in targets.rows(results, {}) if row not in before]
    assert changed
    for row in changed:
        assert (row.met, row.verdict, row.measured) == (None, "not measured", "no result")
        named = row_of(results, row.key, {bench: "a C compiler"})
        assert named.met is None
        assert named.measured == "not measured here: a C compiler"


def cut(bench: str, field: str, value: int) -> Doctor:
    return lambda results: results[bench].update({field: value})


def only_sizes(bench: str, *sizes: str) -> Doctor:
    def doctor(results: Results) -> None:
        per_size = results[bench]["per_size"]
        results[bench]["per_size"] = {size: per_size[size] for size in sizes}

    return doctor


def fewer_watchers(results: Results) -> None:
    for per_shape in results["propagation"]["peers"].values():
        per_shape["100"] = per_shape.pop("500")


@pytest.mark.parametrize(
    ("key", "small", "verdict"),
    [
        ("fanout-10000", only_sizes("fanout", "100", "1000"), "not judged (at 1,000)"),
        ("fanout-1000", only_sizes("fanout", "100"), "not judged (at 100)"),
        ("memory", only_sizes("fanout", "100", "1000"), "not judged (at 1,000)"),
        ("accept", cut("accept", "connections", 500), "not judged (at 500)"),
        ("commit-500", fewer_watchers, "not judged (at 100)"),
        ("put-500", fewer_watchers, "not judged (at 100)"),
        ("reads", cut("reads", "values", 10), "not judged (at 10)"),
        ("during", cut("http", "subscribers", 1_000), "not judged (at 1,000)"),
        ("connect", cut("startup", "agents", 1_000), "not judged (at 1,000)"),
        ("growth", only_sizes("growth", "10", "10000"), "not judged (10 to 10,000)"),
        ("history", cut("history", "rows", 20_000), "not judged (at 20,000)"),
    ],
)
def test_another_size_is_shown_and_not_judged(
    key: str, small: Doctor, verdict: str, results: Results
) -> None:
    """What a quick run measures stands in its row without a verdict that it did not earn."""
    small(results)
    row = row_of(results, key)
    assert (row.met, row.verdict) == (None, verdict)
    assert "**" in row.measured


def without(peer: str) -> Doctor:
    def doctor(results: Results) -> None:
        del results["propagation"]["peers"][peer]
        results["propagation"]["missing"][peer] = f"{peer} (apt-get install {peer})"

    return doctor


def test_ahead_of_those_who_are_here(results: Results) -> None:
    """An absent peer is named and leaves the target open, unless another is already ahead of us."""
    both(propagated("slm", "500", sent_p50=9), SLOW_PEERS, without("nats"))(results)
    row = row_of(results, "put-500")
    assert (row.met, row.verdict) == (None, "not judged (without nats)")
    assert "nats not measured here: nats (apt-get install nats)" in row.measured
    propagated("etcd", "500", sent_p50=5)(results)
    assert row_of(results, "put-500").met is False


def test_a_read_without_a_peer(results: Results) -> None:
    """The ratio to an SDK that is not installed is not judged; the rest is."""
    GOOD_READS(results)
    del results["reads"]["ns"]["unleash"]
    results["reads"]["missing"]["unleash"] = "UnleashClient"
    row = row_of(results, "reads")
    assert row.met is True
    assert "Unleash not measured here: UnleashClient" in row.measured


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
def test_a_field_of_another_name_is_an_error(bench: str, doctor: Doctor, results: Results) -> None:
    """It does not pass for something that was not measured."""
    doctor(results)
    with pytest.raises(Malformed, match=f"result of {bench} "):
        targets.rows(results, {})
