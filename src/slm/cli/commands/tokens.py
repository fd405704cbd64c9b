"""`slm tokens`: create, list and revoke tokens through a running server.

A new token is printed once, as the only output on stdout, so that a script can read it.
"""

from __future__ import annotations

import asyncio
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

import typer

from slm.cli import output
from slm.cli.api_client import Api, call
from slm.cli.output import Json, escape
from slm.cli.target import Target, at_a_server
from slm.errors import ConfigurationError, TokenNotFound

app = typer.Typer(
    help="Create, list and revoke tokens.", no_args_is_help=True, rich_markup_mode="rich"
)

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, "y": 31_536_000}


@app.command()
@at_a_server
def create(
    target: Target,
    name: Annotated[
        str, typer.Option("--name", help="Its name, shown in the history and the audit.")
    ],
    scope: Annotated[
        str,
        typer.Option(
            "--scope",
            metavar="SCOPES",
            help="config:read, key:read, agents:write, admin; several with commas between.",
        ),
    ] = "config:read,key:read",
    agents: Annotated[
        str | None,
        typer.Option(
            "--agents",
            metavar="PATTERNS",
            help="Limit it to these agent_ids, for its whole life; * stands for any text, several "
            "with commas between. The default agent is always visible.",
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires",
            metavar="TIME",
            help="When it expires, such as 12h, 90d or 1y; never by default.",
        ),
    ] = None,
    token_to: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Write the token there (0600) rather than to stdout."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a token. It is shown only once, and the server keeps only its digest.

    [bold]Examples[/]
      slm tokens create --name backend-1 --expires 90d
      slm tokens create --name billing --agents 'billing,invoice-*' --out billing.token
      slm tokens create --name ops --scope config:read,agents:write
    """
    body: dict[str, Any] = {"name": name, "scopes": _listed(scope)}
    if agents is not None:
        body["agents"] = _listed(agents)
    if expires is not None:
        body["expires_in_seconds"] = _seconds(expires)
    if not target.is_private:
        raise ConfigurationError(
            f"a token may not travel to {target.url} in plain text; use https there, or set"
            " SLM_ALLOW_INSECURE=1 where something else encrypts, such as a mesh"
        )
    file = None if token_to is None else _create_private(token_to)
    try:
        made = call(target, "POST", "/api/admin/tokens", body=body).data
    except BaseException:
        if token_to is not None:
            token_to.unlink(missing_ok=True)
        raise
    if file is not None and token_to is not None:
        with file:
            file.write(made.pop("token") + "\n")
        made["file"] = str(token_to)
    if as_json:
        output.print_json(made)
        return
    where = f"in {token_to}" if token_to is not None else "below; it is not shown again"
    limit = "" if made["agents"] is None else f", agents {', '.join(made['agents'])}"
    until = "" if made["expires_at"] is None else f", until {_time(made['expires_at'])}"
    what = f"{', '.join(made['scopes'])}{limit}{until}"
    output.note(f"Token {made['id']} {made['name']!r} ({what}) is {where}.")
    if "token" in made:
        output.say(made["token"])


@app.command("list")
@at_a_server
def list_tokens(
    target: Target,
    everything: Annotated[
        bool, typer.Option("--all", help="Revoked and expired ones, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the tokens: what each may do, until when, and when it was last used."""
    tokens = call(target, "GET", "/api/admin/tokens").data["tokens"]
    shown = [token for token in tokens if everything or _state(token) == "counts"]
    if as_json:
        output.print_json(shown)
        return
    output.table(
        ("ID", "NAME", "SCOPES", "AGENTS", "EXPIRES", "LAST USED", "STATE"),
        [
            (
                str(token["id"]),
                escape(token["name"]),
                escape(", ".join(token["scopes"])),
                "all" if token["agents"] is None else escape(", ".join(token["agents"])),
                _time(token["expires_at"]) if token["expires_at"] else "never",
                _time(token["last_used_at"]) if token["last_used_at"] else "–",
                _state(token),
            )
            for token in shown
        ],
        right=("ID",),
    )


@app.command()
@at_a_server
def revoke(
    target: Target,
    token: Annotated[str, typer.Argument(metavar="ID|NAME", help="Its number, or its name.")],
    as_json: Json = False,
) -> None:
    """Refuse a token from now on; its open streams are closed on every server.

    Exits with 1 where a server has not confirmed within two seconds that it refuses the token.
    """
    revoked = asyncio.run(_revoke(target, token))
    unconfirmed = revoked.get("unconfirmed", [])
    if as_json:
        output.print_json(revoked)
    else:
        output.say(f"Revoked token {revoked['id']} {revoked['name']!r}.")
    if unconfirmed is None:
        output.warning("the other servers could not be asked whether they refuse it already")
    elif unconfirmed:
        output.warning(
            f"not confirmed yet by {', '.join(unconfirmed)}: a server that cannot reach the"
            " database accepts the token for reads until SLM_MAX_OUTAGE_SECONDS are over; stop it"
        )
    if unconfirmed != []:
        raise typer.Exit(1)


async def _revoke(target: Target, wanted: str) -> dict[str, Any]:
    async with Api(target) as api:
        number = wanted
        if not wanted.isdecimal():
            tokens = (await api.call("GET", "/api/admin/tokens")).data["tokens"]
            found = [t for t in tokens if t["name"] == wanted and _state(t) == "counts"]
            if not found:
                # Not repeated: it may be the token itself.
                raise TokenNotFound("no token of that name counts; see slm tokens list")
            number = str(found[0]["id"])
        return (await api.call("DELETE", f"/api/admin/tokens/{number}")).data


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([smhdwy])", text.strip())
    if match is None:
        raise output.UsageError("--expires takes a number and a unit, as 12h, 90d or 1y")
    return int(match[1]) * _SECONDS[match[2]]


def _state(token: dict[str, Any]) -> str:
    if token["revoked_at"] is not None:
        return "revoked"
    until = token["expires_at"]
    if until is not None and datetime.fromisoformat(until) <= datetime.now(UTC):
        return "expired"
    return "counts"


def _time(text: str) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")


def _create_private(file: Path) -> TextIO:
    """Open a new file before the token is created: a token that cannot be written is lost."""
    try:
        return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except FileExistsError:
        raise ConfigurationError(f"{file} is there already; no file is replaced") from None
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror or error}") from None
