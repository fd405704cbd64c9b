"""Rotation of encryption keys: step by step, on many replicas, broken off anywhere, under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from slm.errors import StartupError
from slm.server.encryption.vault import fingerprint
from slm.server.lifecycle.startup import prepare
from slm.server.settings import Settings
from tests.support.command import slm
from tests.support.http import Caller, admin, agent
from tests.support.servers import (
    InLoopServer,
    ServerProcess,
    eventually,
    read_token,
    running_server,
)

AGENTS = 30
FIRST_KILL = 8
"""A start has this many transactions, give or take the feed's."""


async def _fill(ask: Caller, count: int = AGENTS) -> dict[str, str]:
    """Make agents with keys and return the keys by agent_id."""
    keys = {f"agent-{n:02}": f"sk-{n:02}" for n in range(count)}
    for agent_id, key in keys.items():
        made = await ask("POST", "/api/agents", agent(agent_id, llm_api_key=key))
        assert made.status == 201
    return keys


async def _held(ask: Caller) -> dict[str, str]:
    snapshot = (await ask("GET", "/api/snapshot")).body
    assert not [a for a in snapshot["agents"] if a.get("key_error")]
    return {a["agent_id"]: a["llm_api_key"] for a in snapshot["agents"] if a["llm_api_key"]}


async def _keys(ask: Caller) -> dict[str, dict[str, Any]]:
    return {key["fingerprint"]: key for key in (await ask("GET", "/api/admin/keys")).body["keys"]}


async def _reencrypt(ask: Caller, limit: int = 7) -> int:
    """Run the re-encryption to its end and return how many rows changed."""
    changed, last_id = 0, 0
    while last_id is not None:
        step = await ask("POST", f"/api/admin/keys/reencrypt?after_id={last_id}&limit={limit}")
        assert step.status == 200, step
        changed += step.body["changed"]
        last_id = step.body["last_id"]
    return changed


async def test_from_one_key_to_the_next_in_the_data_directory(
    ask: Caller, server: InLoopServer
) -> None:
    """Add, rotate, prune: every key stays readable, no revision moves, the old key is gone."""
    keys = await _fill(ask)
    before = (await ask("GET", "/api/agents")).body
    (old,) = await _keys(ask)

    added = await ask("POST", "/api/admin/keys")
    new = added.body["fingerprint"]
    state = await _keys(ask)
    assert [state[old]["is_active"], state[new]["is_active"]] == [True, False]
    assert (state[old]["rows"], state[new]["rows"]) == (AGENTS, 0)
    assert state[new]["here"]
    file = server.data_dir / "encryption.key"
    assert len(file.read_text().split()) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    refused = await ask("POST", "/api/admin/keys/prune")
    assert refused.status == 200, "a key that nobody needs is pruned, here the new one"
    new = (await ask("POST", "/api/admin/keys")).body["fingerprint"]

    rotated = await ask("POST", "/api/admin/keys/rotate", {})
    assert rotated.body == {"fingerprint": new}
    needed = await ask("POST", "/api/admin/keys/prune")
    assert (needed.status, needed.code) == (409, "keys-not-ready")
    assert await _reencrypt(ask) == AGENTS
    assert await _reencrypt(ask) == 0, "a second run has nothing to do"
    state = await _keys(ask)
    assert (state[old]["rows"], state[new]["rows"]) == (0, AGENTS)
    assert (await ask("POST", "/api/admin/keys/prune")).body == {"fingerprints": [old]}
    assert [fingerprint(key) for key in file.read_text().split()] == [new]

    assert (await ask("GET", "/api/agents")).body == before, "revisions and times are as they were"
    assert await _held(ask) == keys
    await server.stop()
    await server.start()
    async with admin(server) as again:
        assert await _held(again) == keys
        back = await again("POST", "/api/admin/keys/rotate", {"fingerprint": old})
        assert (back.status, back.code) == (409, "keys-not-ready"), "a pruned key never comes back"
        actions = [e["action"] for e in (await again("GET", "/api/admin/audit")).body["entries"]]
    assert {"encryption_key.add", "encryption_key.rotate", "encryption_key.prune"} <= set(actions)


async def test_the_commands_say_what_they_did(ask: Caller, server: InLoopServer) -> None:
    """`slm keys add`, `rotate`, `list` and `prune` against a running server."""
    keys = await _fill(ask, 5)
    added = await slm("keys", "add", data=server.data_dir, SLM_URL=server.url)
    assert (added.code, added.err.count("rotate")) == (0, 1), added
    rotated = await slm("keys", "rotate", data=server.data_dir, SLM_URL=server.url)
    assert rotated.code == 0, rotated
    assert "5 rows were re-encrypted" in rotated.out
    listed = await slm("keys", "list", "--json", data=server.data_dir, SLM_URL=server.url)
    assert [key["rows"] for key in listed.json["keys"]] == [0, 5]
    pruned = await slm("keys", "prune", data=server.data_dir, SLM_URL=server.url)
    assert pruned.out.startswith("Pruned "), pruned
    assert await _held(ask) == keys
    secrets = (server.data_dir / "encryption.key").read_text().split()
    said = "".join(d.out + d.err for d in (added, rotated, listed, pruned))
    assert not [secret for secret in secrets if secret in said]


async def test_a_key_from_a_command_is_found_by_the_rotation(tmp_path: Path) -> None:
    """SLM_ENCRYPTION_KEY_COMMAND prints another key: the rotation runs it again and takes that."""
    first, second = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    vault = tmp_path / "vault"
    vault.write_text(first)
    command = f"{sys.executable} -c \"print(open('{vault}').read())\""
    async with (
        running_server(tmp_path / "data", encryption_key_command=command) as server,
        admin(server) as ask,
    ):
        keys = await _fill(ask, 3)
        assert (await ask("POST", "/api/admin/keys")).code == "conflict", "it is added there"
        told = await slm("keys", "add", "--json", data=server.data_dir, SLM_URL=server.url)
        assert set(told.json) == {"source", "key"}
        Fernet(told.json["key"])
        vault.write_text(f"{first},{second}")
        rotated = await ask("POST", "/api/admin/keys/rotate", {})
        assert rotated.body == {"fingerprint": fingerprint(second)}
        await _reencrypt(ask)
        await ask("POST", "/api/admin/keys/prune")
        vault.write_text(second)
        await server.stop()
        await server.start()
        async with admin(server) as again:
            assert await _held(again) == keys


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("/no/such/program", "No such file"),
        ("false", "ended with 1"),
        ("echo sk-not-a-fernet-key", "not a Fernet key"),
        ("sleep 60", "took longer"),
        ("'", "not a command"),
    ],
)
async def test_a_command_that_gives_no_key_stops_the_start(
    tmp_path: Path, command: str, why: str
) -> None:
    """One sentence says what is wrong with it, and nothing that it printed."""
    settings = Settings(
        data_dir=tmp_path / "data", encryption_key_command=command, key_command_seconds=0.2
    )
    with pytest.raises(StartupError, match=why) as refused:
        await prepare(settings)
    assert "sk-not-a-fernet-key" not in repr(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


@contextlib.asynccontextmanager
async def _replicas(
    tmp_path: Path, url: str, *keys: list[str]
) -> AsyncIterator[list[InLoopServer]]:
    """Servers on one database, each with its own list of encryption keys."""
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for number, own in enumerate(keys):
            settings = {
                "database_url": SecretStr(url),
                "encryption_keys": SecretStr(",".join(own)),
                "lease_seconds": 0.9,
            }
            folder = tmp_path / f"replica-{number}"
            servers.append(await stack.enter_async_context(running_server(folder, **settings)))
        yield servers


async def test_a_rotation_waits_until_every_live_replica_has_the_key(
    tmp_path: Path, postgres_url: str
) -> None:
    """Refused while one lacks it; from the commit on all encrypt with it and none fails a read."""
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    async with _replicas(tmp_path, postgres_url, [old], [old, new]) as (behind, ahead):
        token = read_token(behind.data_dir, "admin")
        async with aiohttp.ClientSession() as session:
            here = Caller(ahead.url, token, session)
            keys = await _fill(here, 6)
            refused = await here("POST", "/api/admin/keys/rotate", {})
            assert (refused.status, refused.code) == (409, "keys-not-ready")
            assert str(os.getpid()) in refused.body["detail"], "it says which server"
            named = await here("POST", "/api/admin/keys/rotate", {"fingerprint": "0" * 16})
            assert named.code == "keys-not-ready"
            await behind.stop()
        await behind.start(encryption_keys=SecretStr(f"{old},{new}"))
        async with aiohttp.ClientSession() as session:
            reads = behind.backend_token
            here, there = (Caller(s.url, token, session, key_token=reads) for s in (ahead, behind))

            async def rotated() -> bool:
                return (await here("POST", "/api/admin/keys/rotate", {})).status == 200

            await eventually(rotated)
            # At once, before it has looked: the other replica's next write is with the new key.
            changed = await there("PUT", "/api/agents/agent-00", {"llm_api_key": "sk-new"})
            assert changed.status == 200
            state = await _keys(here)
            assert (state[fingerprint(old)]["rows"], state[fingerprint(new)]["rows"]) == (5, 1)
            assert await _reencrypt(there) == 5
            keys["agent-00"] = "sk-new"
            assert await _held(here) == await _held(there) == keys
            assert (await here("POST", "/api/admin/keys/prune")).body["fingerprints"]


async def test_a_replica_without_the_active_key_serves_no_key_and_says_so(
    tmp_path: Path, postgres_url: str
) -> None:
    """Asleep while the others went on to a new key: 503 and not ready, no key called "wrong"."""
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    sleeper = ServerProcess(
        tmp_path / "sleeper",
        env={"SLM_DATABASE_URL": postgres_url, "SLM_ENCRYPTION_KEYS": old},
        lease_seconds=0.9,
    )
    async with (
        sleeper,
        _replicas(tmp_path, postgres_url, [old, new]) as (awake,),
        aiohttp.ClientSession() as session,
    ):
        here = Caller(awake.url, sleeper.admin_token, session, key_token=sleeper.backend_token)
        there = Caller(sleeper.url, sleeper.admin_token, session, key_token=sleeper.backend_token)
        keys = await _fill(here, 2)
        sleeper.send_signal(signal.SIGSTOP)

        async def rotated() -> bool:
            return (await here("POST", "/api/admin/keys/rotate", {})).status == 200

        await eventually(rotated)
        sleeper.send_signal(signal.SIGCONT)
        read = await there("GET", "/api/agents/agent-00/llm")
        assert (read.status, read.code) == (503, "encryption-key-missing")
        write = await there("PUT", "/api/agents/agent-00", {"llm_model": "n"})
        assert (write.status, write.code) == (503, "encryption-key-missing")

        async def told() -> bool:
            ready = await there("GET", "/readyz")
            return ready.status == 503 and ready.body["encryption_key"] is False

        await eventually(told)
        assert (await there("GET", "/readyz")).body["keys_undecryptable"] == 0
        assert (await there("GET", "/api/agents/agent-00")).status == 200
        assert await _held(here) == keys


class Load:
    """Reads and writes of keys that go on until they are stopped; every failure is kept."""

    def __init__(self, ask: Caller, keys: dict[str, str]) -> None:
        self.keys = keys
        self.failures: list[Any] = []
        self.count = 0
        self._ask = ask
        self._stop = False

    async def run(self) -> None:
        names = sorted(self.keys)
        while not self._stop:
            name = names[self.count % len(names)]
            self.count += 1
            if self.count % 3 == 0:
                fresh = f"sk-{name}-{self.count}"
                self._note(await self._ask("PUT", f"/api/agents/{name}", {"llm_api_key": fresh}))
                self.keys[name] = fresh
            read = await self._ask("GET", f"/api/agents/{name}/llm")
            self._note(read)
            if read.status == 200 and read.body["llm_api_key"] != self.keys[name]:
                self.failures.append((name, "another key"))

    def _note(self, answer: Any) -> None:
        if answer.status != 200:
            self.failures.append(answer)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.run())
        try:
            yield
            at = self.count
            await eventually(lambda: self.count > at + 10)
        finally:
            self._stop = True
            await task


async def test_broken_off_at_any_step_and_run_again_under_load(
    ask: Caller, server: InLoopServer
) -> None:
    """The rotation's client is killed after each request: nothing fails and nothing is lost."""
    keys = await _fill(ask, 12)
    load = Load(ask, dict(keys))
    async with load.running():
        for broken_after in range(6):
            await ask("POST", "/api/admin/keys")
            await ask("POST", "/api/admin/keys/rotate", {})
            last_id = 0
            for _ in range(broken_after):
                path = f"/api/admin/keys/reencrypt?after_id={last_id}&limit=3"
                last_id = (await ask("POST", path)).body["last_id"] or 0
            # The next request is cut while it is under way.
            cut = asyncio.create_task(ask("POST", "/api/admin/keys/reencrypt?limit=12"))
            await asyncio.sleep(0)
            cut.cancel()
            await asyncio.gather(cut, return_exceptions=True)
        await _reencrypt(ask)
        assert (await ask("POST", "/api/admin/keys/prune")).status == 200
    assert load.failures == []
    assert await _held(ask) == load.keys
    assert [k["rows"] for k in (await _keys(ask)).values() if k["retired_at"] is None] == [12]


async def _rotation(ask: Caller) -> None:
    """Add a key, go on to it, re-encrypt in small steps, drop the old one."""
    assert (await ask("POST", "/api/admin/keys")).status == 201
    assert (await ask("POST", "/api/admin/keys/rotate", {})).status == 200
    await _reencrypt(ask, limit=2)
    assert (await ask("POST", "/api/admin/keys/prune")).status == 200


async def test_killed_before_any_transaction_of_a_rotation_no_key_is_lost(tmp_path: Path) -> None:
    """Keys in the data directory, the only server killed at every stage: the next run ends it."""
    victim = ServerProcess(tmp_path / "data", testing=True)
    async with victim, aiohttp.ClientSession() as session:
        keys = await _fill(
            Caller(victim.url, victim.admin_token, session, key_token=victim.backend_token), 6
        )
        killed = 0
        # The start has 6 transactions, the rotation 14.
        for passing in range(6, 20, 2):
            victim.kill()
            with contextlib.suppress(AssertionError):  # killed before it was ready
                await victim.start(failpoint=f"database:kill@{passing}")
            ask = Caller(victim.url, victim.admin_token, session, key_token=victim.backend_token)
            try:
                await _rotation(ask)
            except aiohttp.ClientError:
                killed += 1
            victim.kill()
            await victim.start(failpoint=None)
            assert await _held(ask) == keys, passing
            await _rotation(ask)
            assert await _held(ask) == keys, passing
            rows = [k["rows"] for k in (await _keys(ask)).values() if k["retired_at"] is None]
            assert rows == [6]
        assert killed >= 5


async def test_a_server_killed_in_mid_rotation_harms_nobody(
    tmp_path: Path, postgres_url: str
) -> None:
    """Killed before any transaction: on the other replica no request fails, no key is lost."""
    ring = [Fernet.generate_key().decode() for _ in range(9)]
    env = {"SLM_DATABASE_URL": postgres_url, "SLM_ENCRYPTION_KEYS": ",".join(ring)}
    victim = ServerProcess(tmp_path / "victim", env=env, testing=True)
    async with (
        _replicas(tmp_path, postgres_url, ring) as (steady,),
        victim,
        aiohttp.ClientSession() as session,
    ):
        token, reads = (read_token(steady.data_dir, name) for name in ("admin", "backend"))
        here, there = (
            Caller(url, token, session, key_token=reads) for url in (steady.url, victim.url)
        )
        load = Load(here, await _fill(here, 12))
        killed = 0
        async with load.running():
            # The feed's looks count too, so where exactly it dies differs; that it dies does not.
            for passing, key in enumerate(ring[1:]):
                victim.kill()
                with contextlib.suppress(AssertionError):  # killed before it was ready
                    await victim.start(failpoint=f"database:kill@{FIRST_KILL + 2 * passing}")
                wanted = {"fingerprint": fingerprint(key)}
                try:
                    assert (await there("POST", "/api/admin/keys/rotate", wanted)).status == 200
                    await _reencrypt(there, limit=2)
                except aiohttp.ClientError:
                    killed += 1
                victim.kill()
                await victim.start(failpoint=None)
                assert (await there("POST", "/api/admin/keys/rotate", wanted)).status == 200
                await _reencrypt(there)
                in_use = {f for f, k in (await _keys(here)).items() if k["rows"]}
                assert in_use == {fingerprint(key)}, passing
            pruned = await here("POST", "/api/admin/keys/prune")
            assert len(pruned.body["fingerprints"]) == 8
        assert load.failures == []
        assert killed >= 5
    async with (
        running_server(
            tmp_path / "last",
            database_url=SecretStr(postgres_url),
            encryption_keys=SecretStr(ring[-1]),
        ) as alone,
        aiohttp.ClientSession() as session,
    ):
        assert await _held(Caller(alone.url, token, session, key_token=reads)) == load.keys
