"""Unleash as a product: from the write to a client that sees it, at its SDK's own poll interval.

Its server keeps to PostgreSQL and its clients ask every 15 seconds, so the answer is known within a
few per cent beforehand; it is measured all the same.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.harness import stats
from benchmarks.harness.errors import Missing
from benchmarks.harness.run import Bench, Options, say
from benchmarks.peers.base import Program, free_port

FOLDER = Path(__file__).parents[1] / "unleash"
CLIENTS = 6
POLL_SECONDS = 15
FLAG = "agent-00007"


async def measure(options: Options) -> dict[str, Any]:
    try:
        from UnleashClient import UnleashClient
    except ImportError:
        raise Missing("UnleashClient (PyPI)") from None
    try:
        from benchmarks.peers.postgres_server import PostgresServer
    except ImportError:
        raise Missing("asyncpg (PyPI)") from None
    if not (FOLDER / "node_modules").exists() or shutil.which("node") is None:
        raise Missing("unleash-server (npm install in benchmarks/unleash, with Node 20 or later)")
    logging.getLogger("UnleashClient").setLevel(logging.ERROR)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    changes = 1 if options.quick else max(5, options.repeats)
    with tempfile.TemporaryDirectory(prefix="slm-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        database = PostgresServer(folder / "postgres")
        try:
            await database.start()
            url, server = await _start(folder, database.port)
            try:
                taken = await _changes(url, folder, changes, UnleashClient)
                return taken | {"server_version": _server_version()}
            finally:
                await asyncio.to_thread(server.stop)
        finally:
            await database.stop()


def _server_version() -> str:
    package = FOLDER / "node_modules" / "unleash-server" / "package.json"
    return str(json.loads(package.read_text())["version"])


async def _start(folder: Path, database_port: int) -> tuple[str, Program]:
    port = free_port()
    server = Program([str(shutil.which("node")), str(FOLDER / "start.mjs")], folder / "unleash")
    server.start(
        {
            "PORT": str(port),
            "DATABASE_URL": f"postgres://bench@127.0.0.1:{database_port}/postgres",
            "NODE_ENV": "production",
        }
    )
    await server.wait_port(port, 90)
    return f"http://127.0.0.1:{port}", server


async def _changes(url: str, folder: Path, changes: int, client_class: Any) -> dict[str, Any]:
    clients = []
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        strategy = await _make_flag(session, url)
        try:
            for number in range(CLIENTS):
                client = client_class(
                    f"{url}/api",
                    f"bench-{number}",
                    environment="development",
                    instance_id=f"bench-{number}",
                    refresh_interval=POLL_SECONDS,
                    disable_metrics=True,
                    disable_registration=True,
                    cache_directory=str(folder / f"cache-{number}"),
                    custom_headers={"Authorization": "default:development.bench"},
                )
                await asyncio.to_thread(client.initialize_client)
                clients.append(client)
                # Real backends do not start in the same instant.
                await asyncio.sleep(POLL_SECONDS / CLIENTS)
            taken: list[float] = []
            writes: list[float] = []
            for value in range(1, changes + 1):
                await asyncio.sleep(random.uniform(0, 2))
                begin = time.monotonic()
                await session.put(strategy, json=_strategy(value))
                writes.append(time.monotonic() - begin)
                taken += await _seen(clients, value, begin)
                say(f"unleash change {value}", {"p50_s": stats.quantile(taken, 0.5)})
        finally:
            for client in clients:
                await asyncio.to_thread(client.destroy)
    return {
        "clients": CLIENTS,
        "changes": changes,
        "poll_seconds": POLL_SECONDS,
        "seconds": taken,
        "write_seconds": writes,
    }


async def _make_flag(session: aiohttp.ClientSession, url: str) -> str:
    """Make the flag, on for everyone; return the URL of its one strategy."""
    base = f"{url}/api/admin/projects/default/features"
    await session.post(base, json={"name": FLAG, "type": "release"})
    environment = f"{base}/{FLAG}/environments/development"
    async with session.post(f"{environment}/strategies", json=_strategy(0)) as answer:
        made = await answer.json()
    await session.post(f"{environment}/on", json={})
    return f"{environment}/strategies/{made['id']}"


def _strategy(value: int) -> dict[str, Any]:
    payload = {"type": "json", "value": _payload(value)}
    variant = {"name": "config", "weight": 1000, "weightType": "variable"}
    return {
        "name": "flexibleRollout",
        "constraints": [],
        "parameters": {"rollout": "100", "stickiness": "default", "groupId": FLAG},
        "variants": [variant | {"stickiness": "default", "payload": payload}],
    }


def _payload(value: int) -> str:
    return json.dumps({"llm_max_tokens": value})


async def _seen(clients: list[Any], value: int, begin: float) -> list[float]:
    """Return after how many seconds each client answered the new value."""
    wanted = _payload(value)
    waiting, took = list(clients), []
    while waiting:
        if time.monotonic() - begin > 4 * POLL_SECONDS:
            raise RuntimeError(f"{len(waiting)} Unleash clients did not see the change")
        for client in list(waiting):
            payload = client.get_variant(FLAG, {"userId": "1"}).get("payload")
            if payload is not None and payload["value"] == wanted:
                took.append(time.monotonic() - begin)
                waiting.remove(client)
        await asyncio.sleep(0.005)
    return took


BENCH = Bench("polling", "Unleash at its poll interval", measure)
