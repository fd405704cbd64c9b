"""`slm audit`: who did what, to which agent, when and from where; and is that still what it says.

Knows the REST API by `http`; the chain itself is checked by the server.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import typer

from slm.cli import output
from slm.cli.connection import DEFAULT_DATA_DIR, CaFile, DataDir, Target, TokenFile, Url, find
from slm.cli.http import Api
from slm.cli.output import escape

app = typer.Typer(help="The audit: list, verify.", no_args_is_help=True, rich_markup_mode="rich")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


@app.command("list")
def list_entries(
    agent: Annotated[str | None, typer.Option("--agent", help="About this agent alone.")] = None,
    actor: Annotated[str | None, typer.Option("--actor", help="By this token alone.")] = None,
    action: Annotated[
        str | None,
        typer.Option(
            "--action", help="This alone: token.revoke, key.read; agent. for all of them."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1, max=1000)] = 50,
    before: Annotated[
        int | None, typer.Option("--before", metavar="SEQ", help="Older than this entry.")
    ] = None,
    as_json: Json = False,
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """List what was done, the newest first.

    [bold]Examples[/]
      slm audit list --agent billing
      slm audit list --action key. --actor backend-1
    """
    given = {"agent": agent, "actor": actor, "action": action, "before": before, "limit": limit}
    params = {name: value for name, value in given.items() if value is not None}
    target = find(url, token_file, ca_file, data)
    entries = asyncio.run(_get(target, "/api/admin/audit", params))["entries"]
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


@app.command()
def verify(
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="HEAD", help="The head that an earlier verify printed."),
    ] = None,
    as_json: Json = False,
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Check the whole chain; exit 1 if anything in it was altered.

    Note the head it prints somewhere else, and give it with --expect the next time: whoever can
    write to the database could compute a new chain, but not one with that head in it.
    """
    target = find(url, token_file, ca_file, data)
    with output.progress("checking"):
        params: dict[str, str | int] = {} if expect is None else {"expect": expect}
        verdict = asyncio.run(_get(target, "/api/admin/audit/verify", params))
    if as_json:
        output.print_json(verdict)
    elif verdict["whole"]:
        output.say(f"Whole: {verdict['rows']} entries. Head: {verdict['head']}")
    else:
        output.error(f"the audit was altered at entry {verdict['broken_at']}: {verdict['reason']}")
    if not verdict["whole"]:
        raise typer.Exit(1)


async def _get(target: Target, path: str, params: dict[str, Any]) -> dict[str, Any]:
    async with Api(target, timeout_seconds=600) as api:
        return (await api.call("GET", path, params=params)).data
