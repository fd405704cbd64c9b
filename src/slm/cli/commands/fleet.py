"""`slm fleet` and `slm agents key-status`: connected backends, their configs and their keys.

Displays the fleet view, which is based on the backends' own acks.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final

import typer

from slm.cli import output
from slm.cli.agent_options import AgentId
from slm.cli.api_client import Api, call
from slm.cli.output import Json, escape
from slm.cli.target import Target, at_a_server
from slm.schemas import Agent

_STATES: Final = {
    "live": "[green]live[/]",
    "stale": "[yellow]stale[/]",
    "unknown": "[yellow]unknown[/]",
    "gone": "[red]gone[/]",
}


@at_a_server
def fleet(
    target: Target,
    only: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Only backends of this name; * stands for any text.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show all connected backends, and those that disconnected within the last hour.

    [bold]live[/]: up to date. [bold]stale[/]: behind for more than a few seconds.
    [bold]unknown[/]: connected, but has never reported what it applied. [bold]gone[/]: no longer
    connected.

    [bold]Example[/]
      slm fleet --json | jq -r '.backends[] | select(.lag > 0) | .backend'
    """
    told = call(target, "GET", "/api/fleet").data
    backends = [
        each for each in told["backends"] if only is None or fnmatchcase(each["backend"], only)
    ]
    if as_json:
        output.print_json(told | {"backends": backends})
        return
    output.table(
        ["BACKEND", "TOKEN", "HOST:PID", "SDK", "STATE", "FOR", "REV", "LAG"],
        [_row(each) for each in backends],
        right=["REV", "LAG"],
    )
    output.some(
        f"{escape(each['backend'])} does [red]not use[/] {escape(agent_id)} of revision"
        f" {held['revision']}: {escape(held['reason'])}"
        for each in backends
        if each["state"] != "gone"
        for agent_id, held in each["not_in_force"].items()
    )
    output.some(
        f"{escape(each['backend'])} is connected [yellow]over plain http[/]"
        for each in backends
        if each["state"] != "gone" and each.get("plain_http")
    )
    counts = dict.fromkeys(_STATES, 0)
    for each in backends:
        counts[each["state"]] = counts.get(each["state"], 0) + 1
    told_counts = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    output.note(f"{told_counts or 'no backend'}; revision {told['revision']}, {target.url}")


@at_a_server
def key_status(
    target: Target,
    agent: AgentId,
    as_json: Json = False,
) -> None:
    """Say whether an agent's previous API key can be revoked at the provider.

    A backend holds a key until its last call with it has ended. It exits with 0 and prints
    "safe to revoke" only when no connected backend holds an older one.

    [bold]Example[/]
      until slm agents key-status code-assistant; do sleep 1; done
    """
    now, told = asyncio.run(_agent_and_fleet(target, agent))
    held = holders(told["backends"], now)
    here = [each for each in held if each["state"] != "gone"]
    away = [each for each in held if each["state"] == "gone" and each["acks"]]
    safe = not here
    if as_json:
        status = {"agent_id": now.agent_id, "api_key_revision": now.api_key_revision}
        output.print_json(status | {"safe_to_revoke": safe, "holders": here, "away": away})
        raise typer.Exit(0 if safe else 1)
    console = output.out()
    present = (
        "has no API key"
        if now.api_key_revision is None
        else f"has the API key of revision {now.api_key_revision}"
    )
    console.print(f"[bold]{escape(now.agent_id)}[/] {present}", soft_wrap=True)
    for each in here:
        console.print(f"  {escape(each['backend'])}: {each['why']}", soft_wrap=True)
    for each in away:
        output.warning(f"{each['backend']} went away before it took the change: {each['why']}")
    if safe:
        console.print("[green]safe to revoke[/] the former key: no connected backend holds it")
    else:
        count = "1 backend" if len(here) == 1 else f"{len(here)} backends"
        console.print(f"[red]not yet[/]: {count} may still use the former key")
    raise typer.Exit(0 if safe else 1)


def holders(backends: list[dict[str, Any]], agent: Agent) -> list[dict[str, Any]]:
    """Return which backends may still use an older key of the agent, and why.

    Args:
        backends: from the fleet view, at least as new as `agent`.
        agent: its current state.
    """
    return [held for each in backends if (held := _held(each, agent)) is not None]


def _held(backend: dict[str, Any], agent: Agent) -> dict[str, Any] | None:
    """Return why a backend may still use an older key of the agent, or None."""
    patterns = backend["agents"]
    sees = patterns is None or agent.is_default
    if not sees and not any(_covers(pattern, agent.agent_id) for pattern in patterns):
        return None
    held = backend["keys"].get(agent.agent_id)
    changed_at = agent.revision if agent.api_key_revision is None else agent.api_key_revision
    if backend["applied"] is None:
        why = "never says what it took (no acks)"
    elif backend.get("truncated"):
        why = "holds more keys than the server tracks"
    elif held is not None and held != agent.api_key_revision:
        why = f"still holds the key of revision {held}"
    elif backend["applied"] < changed_at:
        why = f"is at revision {backend['applied']}, before the key changed"
    else:
        return None
    return {
        "backend": backend["backend"],
        "state": backend["state"],
        "acks": backend["applied"] is not None,
        "holds": held,
        "why": why,
    }


def _covers(pattern: str, agent_id: str) -> bool:
    # As on the server: `*` is any text, and no other character is special.
    return fnmatchcase(agent_id, pattern.replace("[", "[[]").replace("?", "[?]"))


async def _agent_and_fleet(target: Target, agent_id: str) -> tuple[Agent, dict[str, Any]]:
    async with Api(target) as api:
        # In this order, so that the fleet is at least as new as the key in question.
        agent = await api.agent(agent_id)
        return agent, (await api.call("GET", "/api/fleet")).data


def _row(backend: dict[str, Any]) -> list[str]:
    since = datetime.fromisoformat(backend["since"])
    lag = "–"
    if backend["lag"] is not None:
        lag = f"{backend['lag']}"
        if backend["lag"]:
            lag += f" ({backend['lag_ms'] / 1000:.1f} s)"
    return [
        f"[bold]{escape(backend['backend'])}[/]",
        escape(backend["token"] or "–"),
        escape(f"{backend['host'] or '–'}:{backend['pid'] or '–'}"),
        escape(backend["version"] or "–"),
        _STATES.get(backend["state"], escape(backend["state"])),
        _ago(since),
        "–" if backend["applied"] is None else str(backend["applied"]),
        lag,
    ]


def _ago(then: datetime) -> str:
    seconds = int((datetime.now(UTC) - then).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{max(0, seconds)} s"
