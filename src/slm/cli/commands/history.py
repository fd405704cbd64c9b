"""`slm agents history|diff` and `slm changes`: what was changed, and by whom.

Knows the history routes and how a change is displayed.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from slm.cli import output
from slm.cli.agent_options import AgentId
from slm.cli.api_client import Api, ApiAnswer, agent_path, parsed
from slm.cli.output import Json, escape
from slm.cli.pages import collect, collect_from
from slm.cli.target import Target, at_a_server
from slm.errors import RevisionNotFound
from slm.schemas import Agent, Change, ChangeList

FIELDS: Final = {
    "name": "name",
    "description": "description",
    "llm_provider": "provider",
    "llm_endpoint": "endpoint",
    "llm_model": "model",
    "llm_timeout": "timeout",
    "llm_temperature": "temperature",
    "llm_max_tokens": "max tokens",
    "llm_options": "options",
    "is_default": "default",
    "is_active": "active",
}
"""The fields a change can affect, with their display names; the API key is separate."""

Limit = Annotated[
    int, typer.Option("--limit", metavar="N", min=1, max=1000, help="At most so many, the newest.")
]


@at_a_server
def history(
    target: Target,
    agent: AgentId,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="What it ran then, such as '2026-11-17 14:03', local unless it names a zone.",
            show_default=False,
        ),
    ] = None,
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """Show an agent's changes, newest first; with --at, what it was at that time.

    [bold]Example[/]
      slm agents history code-assistant --at "2026-11-17 14:03"
    """
    path = f"{agent_path(agent)}/history"
    if at is not None:
        then = collect(target, path, {"at": _utc(at)}, rows="changes", cursor="upto", limit=1)
        _show_then(agent, at, then, as_json)
        return
    # One more, to see what the oldest of them changed.
    asked = min(limit + 1, 1000)
    answer = collect(target, path, {}, rows="changes", cursor="upto", limit=asked)
    found = parsed(ChangeList, answer)
    if not found.changes:
        raise RevisionNotFound(f"the history holds nothing of {agent}")
    if as_json:
        output.print_json(answer.data | {"changes": answer.data["changes"][:limit]})
        return
    befores: list[Change | None] = [*found.changes[1:], None]
    _print_changes(list(zip(found.changes, befores, strict=True))[:limit], with_agent=False)
    if found.floor and len(found.changes) <= limit:
        output.note(f"changes up to revision {found.floor} are not kept any more")


@at_a_server
def diff(
    target: Target,
    agent: AgentId,
    old: Annotated[
        int | None,
        typer.Argument(metavar="REV", help="From here; else the one before.", show_default=False),
    ] = None,
    new: Annotated[
        int | None, typer.Argument(metavar="REV", help="To here; else now.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how two revisions of an agent differ; without revisions, its last change."""
    before, after = asyncio.run(_two(target, agent, old, new))
    differing = differences(before.agent, after.agent)
    if as_json:
        revisions = {"from": before.revision, "to": after.revision}
        output.print_json({"agent_id": agent} | revisions | {"changed": differing})
        return
    output.out().print(f"[bold]{escape(agent)}[/] revision {before.revision} → {after.revision}")
    if not differing:
        output.out().print("  the same")
    output.pairs({f"  {label(field)}": _arrow(field, both) for field, both in differing.items()})


@at_a_server
def changes(
    target: Target,
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="AGENT", help="Of this agent alone.")
    ] = None,
    actor: Annotated[
        str | None, typer.Option("--actor", metavar="TOKEN", help="By this token's name alone.")
    ] = None,
    since: Annotated[
        int | None,
        typer.Option(
            "--since", metavar="REVISION", min=0, help="After this one, the oldest first."
        ),
    ] = None,
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """Show who changed what, newest first.

    [bold]Example[/]
      slm changes --actor deploy --limit 5
    """
    params: dict[str, str | int] = {"since": since or 0}
    params |= {k: v for k, v in (("agent", agent), ("actor", actor)) if v is not None}
    if since is None:
        params["newest_first"] = "true"
    cursor = "upto" if since is None else "since"
    answer = collect(target, "/api/changes", params, rows="changes", cursor=cursor, limit=limit)
    if as_json:
        output.print_json(answer.data)
        return
    found = parsed(ChangeList, answer)
    # A list of one actor's changes does not contain changes by others in between.
    befores = {} if actor is not None else _befores(found.changes)
    _print_changes([(each, befores.get(each.revision)) for each in found.changes], with_agent=True)
    output.note(f"revision {found.revision}, {target.url}")


def differences(old: Agent, new: Agent) -> dict[str, list[Any]]:
    """Return the differences as `{"llm_model": [old, new]}`; for the key, its revisions."""
    return {
        field: [getattr(old, field), getattr(new, field)]
        for field in (*FIELDS, "api_key_revision")
        if getattr(old, field) != getattr(new, field)
    }


def arrow(old: Any, new: Any) -> str:
    """Return `old → new`, formatted for people."""
    return f"{output.shown(old)} → [bold]{output.shown(new)}[/]"


def label(field: str) -> str:
    """Return the display name of a field that a change can affect."""
    return FIELDS.get(field, "api key")


def _arrow(field: str, both: list[Any]) -> str:
    if field != "api_key_revision":
        return arrow(*both)
    # For a key, only the time it was set can be shown.
    return arrow(*(each and f"set at {each}" for each in both))


def _print_changes(changes: list[tuple[Change, Change | None]], *, with_agent: bool) -> None:
    # In a pipe, each change is one line; a terminal is too narrow for that.
    at_terminal = output.out().is_terminal
    columns = ["REV", "WHEN", "WHO", *(["AGENT"] if with_agent else []), "WHAT"]
    rows = []
    for change, before in changes:
        what = _what(change, before)
        named = [f"[bold]{escape(change.agent_id)}[/]"] if with_agent else []
        when = change.created_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        why = escape(output.one_line(change.comment or ""))
        if at_terminal:
            told = ["\n".join([*what, *([f"[italic]“{why}”[/]"] if why else [])])]
        else:
            told = [", ".join(what) or "–", why or "–"]
        rows.append([str(change.revision), when, escape(change.actor), *named, *told])
    output.table(columns if at_terminal else [*columns, "WHY"], rows, right=["REV"])


def _befores(changes: list[Change]) -> dict[int, Change]:
    """Return the previous change of the same agent, by revision, if it is in the list."""
    befores: dict[int, Change] = {}
    last: dict[str, Change] = {}
    for change in sorted(changes, key=lambda each: each.revision):
        if change.agent_id in last:
            befores[change.revision] = last[change.agent_id]
        last[change.agent_id] = change
    return befores


def _what(change: Change, before: Change | None) -> list[str]:
    """Return what a change did, as rich markup, one item per field with a known old value."""
    if change.type == "agent_deleted":
        return ["[red]deleted[/]"]
    agent = change.agent
    runs = f"{escape(agent.llm_provider)}/{escape(agent.llm_model)}"
    if change.type == "agent_created":
        return [f"[green]created[/] {runs}"]
    if before is None or before.type == "agent_deleted":
        return [f"changed, {runs}"]
    differing = differences(before.agent, agent)
    return [f"{label(field)} {_arrow(field, both)}" for field, both in differing.items()]


def _show_then(agent: str, at: str, answer: ApiAnswer, as_json: bool) -> None:
    found = parsed(ChangeList, answer).changes
    if not found or found[0].type == "agent_deleted":
        raise RevisionNotFound(f"{agent} was not there at {at}, or the history begins later")
    change = found[0]
    if as_json:
        output.print_json(answer.data["changes"][0])
        return
    when = change.created_at.astimezone()
    values = {
        "agent": f"[bold]{escape(agent)}[/]",
        "revision": f"{change.revision} [dim](since {when:%Y-%m-%d %H:%M:%S}, by"
        f" {escape(change.actor)})[/]",
    }
    values |= {label: output.shown(getattr(change.agent, f)) for f, label in FIELDS.items()}
    values["timeout"] += " s"
    key = change.agent.api_key_revision
    values["api key"] = "–" if key is None else f"the one set at revision {key}"
    output.pairs(values)


def _utc(text: str) -> str:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise output.UsageError("--at is a time such as '2026-11-17 14:03'") from None
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def _two(
    target: Target, agent: str, old: int | None, new: int | None
) -> tuple[Change, Change]:
    path = f"{agent_path(agent)}/history"
    async with Api(target) as api:
        after = await _at(api, path, new)
        if old is None:
            old = after.revision - 1
        return await _at(api, path, old), after


async def _at(api: Api, path: str, upto: int | None) -> Change:
    params: dict[str, Any] = {} if upto is None else {"upto": upto}
    answer = await collect_from(api, path, params, rows="changes", cursor="upto", limit=1)
    told = parsed(ChangeList, answer)
    found = told.changes
    if upto is not None and upto > told.revision:
        raise RevisionNotFound(f"there is no revision {upto} yet; the last is {told.revision}")
    if not found:
        raise RevisionNotFound(
            "the history holds nothing of it" + ("" if upto is None else f" up to revision {upto}")
        )
    return found[0]
