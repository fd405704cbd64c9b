"""The law over real sockets: cut, delay, double or stall the stream, the cache ends right.

`test_cache_laws.py` says the same of the cache alone, and much more often.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from slm import AgentKeyUnavailable, ClientStatus, SLMClient, Timings
from tests.support.faults.backends import TENTH
from tests.support.faults.network import Proxy, proxied
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server

AGENTS = ["a", "b", "c"]
FIELDS = ("llm_provider", "llm_endpoint", "llm_model", "llm_temperature", "revision")

steps = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(AGENTS), st.integers(0, 9)),
    st.tuples(st.just("set key"), st.sampled_from(AGENTS), st.integers(0, 9)),
    st.tuples(st.just("drop key"), st.sampled_from(AGENTS), st.just(0)),
    st.tuples(st.just("switch"), st.sampled_from(AGENTS), st.integers(0, 1)),
    st.tuples(st.just("delete"), st.sampled_from(AGENTS), st.just(0)),
    st.tuples(st.just("default"), st.sampled_from([*AGENTS, "default"]), st.just(0)),
    st.tuples(
        st.sampled_from(["cut", "double", "delay", "stall", "resume", "wait"]),
        st.just(""),
        st.just(0),
    ),
)


async def operate(
    admin: Api, proxy: Proxy, client: SLMClient, step: str, agent: str, n: int
) -> None:
    """Do one step; what the rules forbid (the default's deletion) is refused and does nothing."""
    if step == "set":
        answer = await admin.put(agent, llm_model=f"m{n}", llm_provider="openai")
        if answer.status == 404:
            await admin.create(
                agent, llm_model=f"m{n}", llm_api_key=f"sk-first-{n}", llm_provider="openai"
            )
    elif step == "set key":
        await admin.put(agent, llm_api_key=f"sk-{n}", llm_endpoint=f"https://{n}.example/v1")
    elif step == "drop key":
        await admin.put(agent, llm_api_key=None)
    elif step == "switch":
        await admin.put(agent, is_active=bool(n))
    elif step == "delete":
        await admin.delete(agent)
    elif step == "default":
        await admin.put(agent, is_default=True)
    elif step == "cut":
        proxy.cut()
    elif step == "double":
        proxy.doubled = 1.0 - proxy.doubled
    elif step == "delay":
        proxy.delay_seconds = (0.0, 0.02)
    elif step == "stall":
        proxy.stall()
    elif step == "resume":
        proxy.resume()
    else:
        # Let what is on its way arrive, so that later faults meet a client in any state.
        await asyncio.sleep(0)
        if client.status is ClientStatus.LIVE:
            await client.resolve("a") if client.peek("a") else None


async def truth(admin: Api, backend: Api) -> dict[str, dict[str, Any]]:
    """Return every active agent as the database has it, with its key."""
    agents = (await admin.get("/api/agents")).json["agents"]
    found = {}
    for agent in agents:
        if agent["is_active"]:
            keyed = (await backend.get(f"/api/agents/{agent['agent_id']}/llm")).json
            found[agent["agent_id"]] = {name: keyed[name] for name in FIELDS} | {
                "key": keyed["llm_api_key"],
                "is_default": keyed["is_default"],
            }
    return found


async def believed(client: SLMClient) -> dict[str, dict[str, Any]]:
    """Return every agent as the client serves it."""
    found = {}
    default = (await client.resolve("no such agent")).source_agent_id
    for agent_id in [*AGENTS, "default"]:
        config = await client.resolve(agent_id)
        if config.source_agent_id == agent_id and config.step == "agent":
            key = config.llm_api_key
            found[agent_id] = {name: getattr(config, name) for name in FIELDS} | {
                "key": None if key is None else key.get_secret_value(),
                "is_default": agent_id == default,
            }
    return found


async def converges(server: InLoopServer, script: list[tuple[str, str, int]]) -> None:
    timings = Timings(**(TENTH | {"request_timeout_seconds": 0.5, "backoff_max_seconds": 0.2}))
    async with (
        aiohttp.ClientSession() as session,
        proxied(server.url) as proxy,
        SLMClient(proxy.url, token=server.backend_token, timings=timings, key_wait=0.1) as client,
    ):
        admin = Api(server, session, server.admin_token)
        backend = Api(server, session, server.backend_token)
        for step in script:
            await operate(admin, proxy, client, *step)
        proxy.resume()
        head = (await admin.get("/api/agents")).revision
        expected = await truth(admin, backend)

        async def equal() -> bool:
            if client.revision != head or client.status is not ClientStatus.LIVE:
                return False
            try:
                return await believed(client) == expected
            except AgentKeyUnavailable:
                return False

        await eventually(equal, 30)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(script=st.lists(steps, min_size=10, max_size=60))
def test_any_stream_leaves_the_client_equal_to_the_database(
    script: list[tuple[str, str, int]],
) -> None:
    """Creates, updates, key changes, deletes and default changes, through a network gone mad."""

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with running_server(Path(folder) / "data", heartbeat_seconds=0.2) as server:
                await converges(server, script)

    asyncio.run(run())
