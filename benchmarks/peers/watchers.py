"""A process of N watching clients of one peer.

Run as `python -m benchmarks.peers.watchers PEER N ADDRESS OUT`.

Says READY when all watch; keeps when each callback was called for which change; on a line of stdin
writes that to OUT and ends. The clients share one loop and one core's worth of Python, as the
callbacks of a real backend do.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks import peers

CONNECTING_AT_ONCE = 20


async def main(peer: str, count: int, address: str, out: Path) -> None:
    cls = peers.load(peer)
    times: dict[int, list[int]] = {}
    slots = asyncio.Semaphore(CONNECTING_AT_ONCE)
    all_watch = asyncio.Event()
    watching = 0

    def record(watcher: int, sequence: int) -> None:
        now = time.monotonic_ns()
        row = times.get(sequence)
        if row is None:
            row = times[sequence] = [0] * count
        if not row[watcher]:
            row[watcher] = now

    def ready() -> None:
        nonlocal watching
        watching += 1
        slots.release()
        if watching == count:
            all_watch.set()

    async def run(number: int) -> None:
        await slots.acquire()
        await cls.watcher().watch(json.loads(address), ready, partial(record, number))

    tasks = [asyncio.create_task(run(number)) for number in range(count)]
    waiting = asyncio.create_task(all_watch.wait())
    async with asyncio.timeout(90):
        done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in done - {waiting}:
        task.result()
        raise RuntimeError("a watcher ended")
    gc.collect()
    gc.freeze()  # for every peer alike: a full collection would be a spike of its own
    print("READY", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    out.write_text(json.dumps(times))
    print("DONE", flush=True)
    os._exit(0)  # 500 connections are closed by the kernel faster than one by one


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
