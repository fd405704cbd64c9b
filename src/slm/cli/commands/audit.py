"""`slm audit`: who did what to which agent, when and from where, and whether it was altered.

Uses the REST API through `api_client`; the server checks the chain, that of a file needs no server.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from slm.cli import output
from slm.cli.api_client import call
from slm.cli.commands import audit_export
from slm.cli.output import Json, escape
from slm.cli.pages import collect
from slm.cli.target import Target, at_a_server

app = typer.Typer(
    help="List, verify and export the audit.", no_args_is_help=True, rich_markup_mode="rich"
)

_TIMEOUT_SECONDS: Final = 600.0
"""Checking a long audit takes a while."""


@app.command("list")
@at_a_server
def list_entries(
    target: Target,
    agent: Annotated[
        str | None, typer.Option("--agent", help="Only entries about this agent.")
    ] = None,
    actor: Annotated[
        str | None, typer.Option("--actor", help="Only entries by this token.")
    ] = None,
    action: Annotated[
        str | None,
        typer.Option(
            "--action",
            help="Only this action, such as token.revoke; agent. stands for all that begin so.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1, max=1000)] = 50,
    before: Annotated[
        int | None, typer.Option("--before", metavar="SEQ", help="Older than this entry.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what was done, the newest first.

    [bold]Examples[/]
      slm audit list --agent billing
      slm audit list --action key. --actor backend-1
    """
    given = {"agent": agent, "actor": actor, "action": action, "before": before}
    params = {name: value for name, value in given.items() if value is not None}
    answer = collect(
        target, "/api/admin/audit", params, rows="entries", cursor="before", limit=limit
    )
    entries = answer.data["entries"]
    if as_json:
        output.print_json(entries)
        return
    output.table(
        ("SEQ", "AT", "ACTOR", "FROM", "ACTION", "AGENT", "DETAIL"),
        [
            (
                str(entry["seq"]),
                entry["at"],
                escape(entry["actor"]),
                escape(entry["address"] or "–"),
                escape(entry["action"]),
                escape(entry["agent_id"] or "–"),
                escape(json.dumps(entry["detail"], ensure_ascii=False)),
            )
            for entry in entries
        ],
        right=("SEQ",),
    )


app.command()(audit_export.export)


@app.command()
@functools.partial(at_a_server, unless="files")
def verify(
    target: Target | None,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Files written by slm audit export, the oldest first; checked without a server.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="HEAD", help="The head that an earlier verify printed."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the whole chain, or exported files; exit 1 if anything in it was altered.

    Note the head it prints somewhere else, and give it with --expect the next time: whoever can
    write to the database could compute a new chain, but not one with that head in it.
    """
    with output.progress("checking"):
        if target is None:
            verdict = audit_export.check(files or [], expect)
        else:
            verdict = _asked(target, expect)
    if as_json:
        output.print_json(verdict)
    elif verdict["whole"]:
        output.say(f"Whole: {verdict['rows']} entries. Head: {verdict['head']}")
        start = verdict.get("cut") if target is not None else verdict["after"]
        if start and not start.startswith("0:"):
            output.say(f"It begins after {start}; older entries are in exports.")
    elif target is None:
        output.error(f"the audit was altered: {verdict['reason']}")
    else:
        output.error(f"the audit was altered at entry {verdict['broken_at']}: {verdict['reason']}")
    if not verdict["whole"]:
        raise typer.Exit(1)


def _asked(target: Target, expect: str | None) -> dict[str, Any]:
    params: dict[str, str | int] = {} if expect is None else {"expect": expect}
    path = "/api/admin/audit/verify"
    answer = call(target, "GET", path, params=params, timeout_seconds=_TIMEOUT_SECONDS)
    verdict: dict[str, Any] = answer.data
    return verdict
