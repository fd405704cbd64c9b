"""`python -m benchmarks`: measure everything and write docs/performance.md; see `--help`.

It ends in 1 when a bench failed; that something it needs is not installed is no failure.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import time
from pathlib import Path

from benchmarks.benches import (
    accept,
    fanout,
    growth,
    history,
    http_reads,
    llm_calls,
    polling,
    propagation,
    reads,
    startup,
)
from benchmarks.harness import run
from benchmarks.harness.errors import Malformed
from benchmarks.report import report

BENCHES = [
    each.BENCH
    for each in (
        reads,
        llm_calls,
        startup,
        fanout,
        accept,
        http_reads,
        propagation,
        growth,
        history,
        polling,
    )
]
SLOW = {"polling"}
"""Left out of the quick run: their peer cannot be hurried."""

MOST_SECONDS = 900
"""A bench that takes longer is given up, so that the others have their turn."""

QUICK_REPEATS = 1
FULL_REPEATS = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [bench.name for bench in BENCHES]
    parser.add_argument("names", nargs="*", help=f"which benches, of {', '.join(names)}; all")
    parser.add_argument("--quick", action="store_true", help="one repeat of little, in two minutes")
    parser.add_argument("--repeats", type=int, help=f"how often; {FULL_REPEATS}, or at least that")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no such bench: {', '.join(unknown)}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder = run.RESULTS / "quick" if options.quick else run.RESULTS
    failed = [] if options.report else _measure(options, folder)
    # A quick run is a look, not a figure: it prints its table and leaves the document alone.
    try:
        print(report.write(folder, None if options.quick else report.DOCUMENT))
    except Malformed as error:
        print(error, file=sys.stderr)
        return 1
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _measure(options: argparse.Namespace, folder: Path) -> list[str]:
    repeats = options.repeats or (QUICK_REPEATS if options.quick else FULL_REPEATS)
    run_name, failed = run.new_run(), []
    for bench in BENCHES:
        if (options.names and bench.name not in options.names) or (
            options.quick and bench.name in SLOW and bench.name not in options.names
        ):
            continue
        begin = time.monotonic()
        try:
            print(f"{bench.name}: begins", file=sys.stderr, flush=True)
            work = run.run(bench, run.Options(repeats, options.quick), folder, run_name)
            if missing := asyncio.run(asyncio.wait_for(work, MOST_SECONDS)):
                print(f"{bench.name}: not measured here: {missing}", file=sys.stderr)
        except Exception as error:
            # The others are worth having all the same.
            print(f"{bench.name}: failed: {error!r}", file=sys.stderr)
            failed.append(bench.name)
        print(f"{bench.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
