"""slm fleet, --wait, key-status, history, diff, rollback and changes, as they are run."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from slm import ResolvedConfig, SLMClient
from tests.support.command import CANARY, Done, slm, slm_at_a_terminal
from tests.support.raw import Api
from tests.support.sdk import applied, fleet_of, sdk
from tests.support.servers import InLoopServer, eventually

REASON = "anthropic is not approved here"
CREATE = ("agents", "create", "a", "--provider", "openai", "--model", "gpt-6.1-sol")


@pytest.fixture
async def backends(server: InLoopServer, admin: Api) -> AsyncIterator[list[SLMClient]]:
    """Two backends; the second one refuses anthropic."""

    def refuse(config: ResolvedConfig) -> str | None:
        return REASON if config.llm_provider == "anthropic" else None

    token = server.backend_token
    async with sdk(server.url, token, "billing") as one, sdk(server.url, token, "search") as two:
        two.register_validator(refuse)
        await eventually(lambda: applied(admin, one.revision, "billing", "search"))
        yield [one, two]


async def run(server: InLoopServer, *arguments: str, **options: Any) -> Done:
    return await slm(*arguments, data=server.data_dir, **options)


async def test_wait_exits_0_only_if_all_applied(
    server: InLoopServer, backends: list[SLMClient]
) -> None:
    """--wait tells how many took the change and how fast; who refused it is named, with exit 1."""
    created = await run(server, *CREATE, "--wait")
    assert created.code == 0
    assert "applied by 2 of 2 backends in " in created.out
    moved = await run(
        server,
        *("agents", "set", "a", "--provider", "anthropic", "--model", "claude-sonnet-5-5"),
        *("--wait-limit", "20s"),
    )
    assert moved.code == 1
    assert "applied by 1 of 2 backends" in moved.out
    (refusal,) = [line for line in moved.out.splitlines() if "refused" in line]
    assert "search/" in refusal
    assert REASON in refusal
    told = await run(server, "fleet", "--json")
    held_up = {each["name"]: each["not_in_force"] for each in told.json["backends"]}
    assert held_up["billing"] == {}
    assert held_up["search"]["a"]["reason"] == REASON
    shown = await run(server, "fleet", "search/*")
    assert REASON in shown.out
    assert "billing" not in shown.out
    back = await run(server, "agents", "rollback", "a", "--wait", "--comment", "wrong")
    assert back.code == 0, back
    assert "is as it was at revision 2" in back.out


async def test_wait_is_shown_live_at_a_terminal(
    server: InLoopServer, backends: list[SLMClient], admin: Api, backend: Api
) -> None:
    """A bar counts who has applied the change, while it waits; then the receipt takes its place.

    The third backend acks only once the bar has shown that it is missing.
    """
    loop, missing_one = asyncio.get_running_loop(), asyncio.Event()
    await admin.create("a")
    change = ("agents", "set", "a", "--model", "gpt-6.1-terra", "--wait-limit", "60s")
    async with backend.stream(client={"name": "slow", "instance": "1"}) as slow:
        await slow.send(ack=(await slow.frame())["revision"])
        await eventually(lambda: applied(admin, backends[0].revision, "billing", "search", "slow"))
        shown = asyncio.create_task(
            asyncio.to_thread(
                slm_at_a_terminal,
                *change,
                data=server.data_dir,
                answers={"2/3": lambda: loop.call_soon_threadsafe(missing_one.set)},
            )
        )
        changed = await slow.next()
        await eventually(missing_one.is_set, 30)
        assert not shown.done()
        await slow.send(ack=changed["revision"])
        done = await shown
        assert done.code == 0, done
        after = done.out.partition("2/3")[2]
        assert "applied by 3 of 3 backends" in after, after
        left_out = await run(
            server, "agents", "set", "a", "--model", "gpt-6", "--wait-limit", "300ms"
        )
        assert left_out.code == 1
        assert "  applied by 2 of 3 backends in " in left_out.out
        assert left_out.out.splitlines()[-1] == "  no answer  slow/1"


async def test_a_change_is_told_even_where_its_receipt_cannot_be_had(
    server: InLoopServer, admin: Api, backend: Api
) -> None:
    """A server that stops while the command waits: what was changed has been said, and exit 1."""
    loop, waits = asyncio.get_running_loop(), asyncio.Event()
    await admin.create("a")
    async with backend.stream(client={"name": "slow", "instance": "1"}) as slow:
        await slow.send(ack=(await slow.frame())["revision"])
        await eventually(lambda: applied(admin, 2, "slow"))
        shown = asyncio.create_task(
            asyncio.to_thread(
                slm_at_a_terminal,
                *("agents", "set", "a", "--model", "gpt-6.1-terra", "--wait-limit", "60s"),
                data=server.data_dir,
                answers={"0/1": lambda: loop.call_soon_threadsafe(waits.set)},
            )
        )
        await eventually(waits.is_set, 30)
        await server.stop()
        done = await shown
    assert done.code == 1
    assert "is at revision" in done.out.partition("0/1")[0]
    assert "no SLM at " in done.out.partition("0/1")[2]


async def test_wait_for_a_script(server: InLoopServer, backends: list[SLMClient]) -> None:
    """With --json the receipt is in the answer of a delete too."""
    for arguments in ((*CREATE, "--wait"), ("agents", "delete", "a", "--yes", "--wait")):
        done = await run(server, *arguments, "--json")
        assert done.code == 0
        assert len(done.json["receipt"]["applied"]) == 2, arguments


async def test_history_says_who_what_and_why(server: InLoopServer, admin: Api) -> None:
    """The history names each change, the fields it was of, who made it and the comment."""
    await admin.create("a", llm_provider="openai", llm_model="gpt-6.1-sol")
    await run(server, "agents", "set", "a", "--model", "gpt-6.1-terra", "--comment", "better")
    await admin.put("a", llm_api_key=CANARY)
    shown = await run(server, "agents", "history", "a")
    header, key, model, created = shown.out.splitlines()
    assert header.split() == ["REV", "WHEN", "WHO", "WHAT", "WHY"]
    assert "api key – → set at 4" in key
    assert "model gpt-6.1-sol → gpt-6.1-terra" in model
    assert "better" in model
    assert "created openai/gpt-6.1-sol" in created
    assert all(" admin " in line for line in (key, model, created))
    told = await run(server, "agents", "diff", "a", "2", "3", "--json")
    assert told.json["changed"] == {"llm_model": ["gpt-6.1-sol", "gpt-6.1-terra"]}
    last = await run(server, "agents", "diff", "a")
    assert "a revision 3 → 4" in last.out
    never = await run(server, "agents", "diff", "a", "4", "5")
    assert (never.code, never.error) == (1, "there is no revision 5 yet; the last is 4")
    at_terminal = await asyncio.to_thread(
        slm_at_a_terminal,
        *("agents", "history", "a"),
        data=server.data_dir,
        answers={},
        columns=80,
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", at_terminal.out).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [
        "4",
        "gpt-6.1-terra",
        "“better”",
        "openai/gpt-6.1-sol",
    ]
    changes = await run(server, "changes", "--agent", "a", "--limit", "2")
    assert [line.split()[0] for line in changes.out.splitlines()] == ["REV", "4", "3"]
    assert "api key – → set at 4" in changes.out, "what it changed, where the one before is known"
    assert "changed, openai/gpt-6.1-terra" in changes.out
    mine = await run(server, "changes", "--actor", "nobody", "--json")
    assert mine.json["changes"] == []


async def test_what_it_ran_at_a_time(server: InLoopServer, admin: Api) -> None:
    """One command says what an agent was at a moment of the past."""
    await admin.create("a", llm_model="gpt-6.1-sol")
    then = datetime.now(UTC).isoformat()
    await admin.put("a", llm_model="gpt-6.1-terra")
    shown = await run(server, "agents", "history", "a", "--at", then)
    assert "gpt-6.1-sol" in shown.out
    assert "gpt-6.1-terra" not in shown.out
    before = await run(server, "agents", "history", "a", "--at", "2001-01-01 14:03")
    assert before.code == 1
    assert before.error == "a was not there at 2001-01-01 14:03, or the history begins later"
    wrong = await run(server, "agents", "history", "a", "--at", "tuesday")
    assert wrong.code == 2


async def test_key_status(server: InLoopServer, admin: Api, backends: list[SLMClient]) -> None:
    """Safe to revoke only when no connected backend holds an older key; else who does."""
    made = await admin.create("a", llm_provider="openai", llm_api_key=CANARY)
    await eventually(lambda: applied(admin, made.revision, "billing", "search"))
    old = await backends[0].resolve("a")
    with backends[0].in_use(old):
        second = await admin.put("a", llm_api_key="sk-second")
        await eventually(lambda: applied(admin, second.revision, "billing", "search"))
        waiting = await run(server, "agents", "key-status", "a")
        assert waiting.code == 1
        assert "not yet" in waiting.out
        assert "still holds the key of revision 2" in waiting.out
        assert "search/" not in waiting.out
    done = await run(server, "agents", "key-status", "a")
    assert done.code == 0
    assert "safe to revoke" in done.out


async def test_key_status_of_who_cannot_be_asked(
    server: InLoopServer, admin: Api, backend: Api
) -> None:
    """Who never acks may hold any key; who went away in between is no obstacle, but named."""
    await admin.create("a", llm_provider="openai", llm_api_key=CANARY)
    async with backend.stream(client={"name": "mute", "instance": "1"}) as mute:
        await mute.frame()
        async with backend.stream(client={"name": "away", "instance": "1"}) as away:
            await away.send(ack=(await away.frame())["revision"])
            await eventually(lambda: applied(admin, 2, "away"))
        await eventually(lambda: _is(admin, "away", "gone"))
        await admin.put("a", llm_api_key="sk-second")
        unknown = await run(server, "agents", "key-status", "a")
        assert unknown.code == 1
        assert "mute/1: never says what it took (no acks)" in unknown.out
    await eventually(lambda: _is(admin, "mute", "gone"))
    safe = await run(server, "agents", "key-status", "a")
    assert (safe.code, "safe to revoke" in safe.out) == (0, True)
    assert "warning: away/1 went away before it took the change" in safe.err


async def _is(admin: Api, name: str, state: str) -> bool:
    return bool((await fleet_of(admin))[name]["state"] == state)


async def test_a_watcher_is_no_backend_that_hangs(server: InLoopServer) -> None:
    """`slm watch` acks what it shows, so no receipt waits for it."""
    watching = asyncio.create_task(run(server, "watch", "--count", "2", "--json"))

    async def there() -> bool:
        backends = server.running.services.fleet.backends()
        return any(each.name.startswith("slm watch") and each.acks for each in backends)

    await eventually(there, 30)
    created = await run(server, *CREATE, "--wait")
    assert "applied by 1 of 1 backend in" in created.out
    await run(server, "agents", "delete", "a", "--yes")
    assert len((await watching).out.splitlines()) == 2
