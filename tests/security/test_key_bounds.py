"""Never a key at the wrong place: whatever is done to the rows, by SQL or over the API.

Somebody who can write to the database, but has no encryption key, moves ciphertexts about, changes
bytes, edits endpoints; somebody with agents:write edits endpoints over the API. A key that is
handed out is always one that was given for this very agent, provider and origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from slm.endpoints import origin
from slm.errors import AgentInactive, AgentNotFound, KeyUndecryptable
from slm.server.agents.schemas import AgentUpdate
from slm.server.security.audit import Who
from slm.server.settings import Settings
from tests.support.http import Caller, agent
from tests.support.servers import InLoopServer
from tests.support.store import KEY, Store, new_agent

NAMES = ("a", "b", "c", "d")
ENDPOINTS = (
    None,
    "https://one.example/v1",
    "https://one.example:443/other",
    "https://two.example/v1",
    "http://one.example/v1",
    "https://one.example.evil.example/v1",
)
PROVIDERS = ("openai", "anthropic", "ollama")
NAME, ENDPOINT, PROVIDER = map(st.sampled_from, (NAMES, ENDPOINTS, PROVIDERS))
BARE = Fernet(KEY).encrypt(b"sk-bare-from-an-old-backup").decode()

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("swap"), NAME, NAME),
        st.tuples(st.just("copy"), NAME, NAME),
        st.tuples(st.just("byte"), NAME, st.tuples(st.integers(0, 400), st.integers(1, 127))),
        st.tuples(st.just("cut"), NAME, st.integers(0, 400)),
        st.tuples(st.just("sql endpoint"), NAME, ENDPOINT),
        st.tuples(st.just("sql provider"), NAME, PROVIDER),
        st.tuples(st.just("sql rename"), NAME, st.sampled_from(("e", "A", "a ", "á"))),
        st.tuples(st.just("sql state"), NAME, st.sampled_from((None, "unbound", "x"))),
        st.tuples(st.just("sql bare"), NAME, st.none()),
        st.tuples(st.just("sql check"), NAME, st.none()),
        st.tuples(st.just("put"), NAME, st.tuples(ENDPOINT, PROVIDER, st.booleans())),
        st.tuples(st.just("restart"), NAME, st.none()),
    ),
    max_size=12,
)


class World:
    """A store, and what every key in it was given for."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(
            data_dir=folder, encryption_keys=SecretStr(KEY), lock_timeout_seconds=1
        )
        self.given: set[tuple[str, str, str, str]] = set()
        self._count = 0
        self.store: Store

    async def open(self) -> None:
        self.store = await Store.open(self.settings)

    async def fill(self) -> None:
        for name, endpoint in zip(NAMES, ENDPOINTS[1:], strict=False):
            key = self._new_key(name, "openai", endpoint)
            fields = {"llm_provider": "openai", "llm_endpoint": endpoint, "llm_api_key": key}
            await self.store.registry.create(new_agent(name, **fields), who=Who("tester"))

    def _new_key(self, name: str, provider: str, endpoint: str | None) -> str:
        self._count += 1
        key = f"sk-{self._count:04}"
        self.given.add((name, provider, origin(provider, endpoint), key))
        return key

    async def do(self, verb: str, name: str, value: Any) -> None:
        sql = self.store.sql
        one = "UPDATE agents SET {} WHERE agent_id = :name"
        token = await self._token(name)
        match verb:
            case "swap" | "copy":
                other = await self._token(value)
                await sql(one.format("llm_api_key_encrypted = :t"), t=other, name=name)
                if verb == "swap":
                    await sql(one.format("llm_api_key_encrypted = :t"), t=token, name=value)
            case "byte" if token:
                at, by = value[0] % len(token), value[1]
                changed = token[:at] + chr(ord(token[at]) ^ by) + token[at + 1 :]
                await sql(one.format("llm_api_key_encrypted = :t"), t=changed, name=name)
            case "cut" if token:
                await sql(
                    one.format("llm_api_key_encrypted = :t"),
                    t=token[: value % len(token)],
                    name=name,
                )
            case "sql endpoint":
                await sql(one.format("llm_endpoint = :v"), v=value, name=name)
            case "sql provider":
                await sql(one.format("llm_provider = :v"), v=value, name=name)
            case "sql rename":
                await sql(
                    "UPDATE OR IGNORE agents SET agent_id = :v WHERE agent_id = :name",
                    v=value,
                    name=name,
                )
            case "sql state":
                await sql(one.format("key_state = :v"), v=value, name=name)
            case "sql bare":
                await sql(one.format("llm_api_key_encrypted = :t"), t=BARE, name=name)
            case "sql check":
                ((check,),) = await sql("SELECT check_token FROM encryption_keys")
                await sql(one.format("llm_api_key_encrypted = :t"), t=check, name=name)
            case "put":
                await self._put(name, *value)
            case "restart":
                await self.store.close()
                await self.open()

    async def _put(self, name: str, endpoint: str | None, provider: str, with_key: bool) -> None:
        fields: dict[str, Any] = {"llm_endpoint": endpoint, "llm_provider": provider}
        if with_key:
            fields["llm_api_key"] = self._new_key(name, provider, endpoint)
        with contextlib.suppress(AgentNotFound):
            await self.store.registry.update(
                name, AgentUpdate.model_validate(fields), who=Who("tester")
            )

    async def _token(self, name: str) -> str:
        rows = await self.store.sql(
            "SELECT llm_api_key_encrypted FROM agents WHERE agent_id = :name", name=name
        )
        return (rows[0][0] or "") if rows else ""

    async def check(self) -> None:
        for name in await self.store.agents():
            try:
                config, _, _ = await self.store.reads.llm(name)
            except (KeyUndecryptable, AgentInactive):
                continue
            self._check(config)
        for config in (await self.store.reads.snapshot()).agents:
            self._check(config)

    def _check(self, config: Any) -> None:
        if config.llm_api_key is None:
            return
        place = (
            config.agent_id,
            config.llm_provider,
            origin(config.llm_provider, config.llm_endpoint),
        )
        assert (*place, config.llm_api_key.get_secret_value()) in self.given, place


async def _live(folder: Path, steps: list[tuple[str, str, Any]]) -> None:
    world = World(folder)
    await world.open()
    try:
        await world.fill()
        await world.check()
        for step in steps:
            await world.do(*step)
            await world.check()
    finally:
        await world.store.close()


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_no_key_is_ever_handed_out_for_another_place(steps: list[tuple[str, str, Any]]) -> None:
    """Swapped, copied, changed, cut, renamed, moved to another endpoint: the right key or none."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_live(Path(folder) / "data", steps))


async def test_a_moved_ciphertext_is_told_and_counted(ask: Caller, server: InLoopServer) -> None:
    """409 on /llm, an error in the snapshot, counted in readyz's body and in the metrics."""
    for name in ("a", "b"):
        body = agent(name, llm_api_key=f"sk-{name}", llm_endpoint=f"https://{name}.example")
        assert (await ask("POST", "/api/agents", body)).status == 201
    assert (await ask("GET", "/readyz")).body["keys_undecryptable"] == 0
    database = server.running.services.database
    sql = (
        "UPDATE agents SET llm_api_key_encrypted ="
        " (SELECT llm_api_key_encrypted FROM agents WHERE agent_id = 'b') WHERE agent_id = 'a'"
    )
    await database.run(lambda connection: connection.exec_driver_sql(sql) and None)
    refused = await ask("GET", "/api/agents/a/llm")
    assert (refused.status, refused.code) == (409, "key-undecryptable")
    rows = {row["agent_id"]: row for row in (await ask("GET", "/api/snapshot")).body["agents"]}
    assert (rows["a"]["llm_api_key"], rows["a"]["key_error"]) == (None, "undecryptable")
    assert rows["a"]["has_api_key"], "never told as no key"
    assert rows["b"]["llm_api_key"] == "sk-b"
    ready = await ask("GET", "/readyz")
    assert (ready.status, ready.body["keys_undecryptable"]) == (200, 1)
    assert "slm_keys_undecryptable 1.0" in (await ask("GET", "/metrics")).body
    await server.stop()
    await server.start()
    assert (await ask("GET", "/readyz")).body["keys_undecryptable"] == 1, "known from the start"
    assert (await ask("PUT", "/api/agents/a", {"llm_api_key": "sk-new"})).status == 200
    assert (await ask("GET", "/readyz")).body["keys_undecryptable"] == 0
    assert (await ask("GET", "/api/agents/a/llm")).body["llm_api_key"] == "sk-new"


async def test_an_edited_endpoint_takes_no_key_along(ask: Caller) -> None:
    """Another provider or origin clears the key and the answer says so; another path keeps it."""
    body = agent("a", llm_api_key="sk-a", llm_endpoint="https://one.example/v1")
    await ask("POST", "/api/agents", body)
    same = await ask("PUT", "/api/agents/a", {"llm_endpoint": "https://ONE.example:443/v2"})
    assert "api_key_cleared" not in same.body
    assert (await ask("GET", "/api/agents/a/llm")).body["llm_api_key"] == "sk-a"
    for change in (
        {"llm_endpoint": "https://evil.example/v1"},
        {"llm_endpoint": "http://one.example/v1"},
        {"llm_endpoint": "https://one.example:8443/v1"},
        {"llm_endpoint": None},
        {"llm_provider": "anthropic"},
    ):
        moved = await ask("PUT", "/api/agents/a", change)
        assert (moved.body["api_key_cleared"], moved.body["has_api_key"]) == (True, False), change
        read = await ask("GET", "/api/agents/a/llm")
        assert (read.status, read.body["llm_api_key"]) == (200, None)
        back = {"llm_endpoint": "https://one.example/v1", "llm_provider": "openai"}
        again = await ask("PUT", "/api/agents/a", back)
        assert again.body["has_api_key"] is False, "it does not come back with the endpoint"
        both = await ask("PUT", "/api/agents/a", back | {"llm_api_key": "sk-a"})
        assert both.body["has_api_key"] is True


DISGUISED = {
    "http://192.0.2.7/v1": (
        "http://192.0.2.7%2e.evil.example/v1",
        "http://192.0.2.7%25.evil.example/v1",
        "http://192.0.2.7%.evil.example/v1",
        "http://192.0.2.7.evil.example/v1",
        "http://192.0.2.7,evil.example/v1",
        "http://192.0.2.7;evil.example/v1",
        "http://192.0.2.7@evil.example/v1",
        "http://192.0.2.7:80@evil.example/v1",
        "http://192.0.2.7:80:80/v1",
        "http://192.0.2.7\\.evil.example/v1",
        "http://192.0.2.7\t.evil.example/v1",
        # Whoever has an IPv4 address need not be who answers at these.
        "http://[2002:c000:0207::bad]/v1",
        "http://[64:ff9b::c000:207]/v1",
        "https://192.0.2.7/v1",
        "http://192.0.2.7:8080/v1",
    ),
    "http://[2001:db8::7]/v1": (
        "http://[2001:db8::7].evil.example/v1",
        "http://[2001:db8::7]evil.example/v1",
        "http://evil.example[2001:db8::7]/v1",
        "http://[2001:db8::7%25.evil.example]/v1",
        "http://[2001:db8::7%.evil.example]/v1",
        "http://[2001:db8::7]@evil.example/v1",
        "http://[2001:db8::77]/v1",
    ),
    "https://one.example/v1": (
        "https://one%2eexample/v1",
        "https://one.example%2f.evil.example/v1",
        "https://one.example.evil.example/v1",
        "https://one.example:443@evil.example/v1",
        "https://evil.example?@one.example/v1",
        "https://evil.example\\@one.example/v1",
        "https://one\N{IDEOGRAPHIC FULL STOP}example/v1",
        "https://one.exampl\N{CYRILLIC SMALL LETTER IE}/v1",
        "//one.example/v1",
    ),
}


async def test_no_spelling_of_another_host_passes_for_the_old_one(ask: Caller) -> None:
    """Escapes, zones, brackets, user names, look-alikes: refused, or the key is cleared."""
    for endpoint, others in DISGUISED.items():
        for other in others:
            key = {"llm_endpoint": endpoint, "llm_api_key": "sk-a"}
            assert (await ask("POST", "/api/agents", agent("a", **key))).status == 201
            moved = await ask("PUT", "/api/agents/a", {"llm_endpoint": other})
            if moved.status != 422:
                assert (moved.status, moved.body.get("api_key_cleared")) == (200, True), other
            assert (await ask("DELETE", "/api/agents/a")).status == 204
            assert origin("openai", other) != origin("openai", endpoint), other
    same = {
        "http://192.0.2.7:80/": "http://0xC0.0.519",
        "http://[::ffff:c000:207]": "http://192.0.2.7",
    }
    for one, another in same.items():
        assert origin("openai", one) == origin("openai", another)
