"""`slm db`: upgrade, back up and restore the server's database.

`backup` goes through the running server; `upgrade` and `restore` open the database themselves, and
on SQLite want the server stopped, since one process holds the file.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from slm.cli import output
from slm.cli.connection import DEFAULT_DATA_DIR, CaFile, DataDir, Target, TokenFile, Url, find
from slm.cli.http import Answer, Api

app = typer.Typer(
    help="The database: upgrade, backup, restore.", no_args_is_help=True, rich_markup_mode="rich"
)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        metavar="URL",
        help="As for slm serve. \\[env var: SLM_DATABASE_URL]",
        show_default=False,
    ),
]


@app.command()
def upgrade(data: DataDir = DEFAULT_DATA_DIR, database_url: DatabaseUrl = None) -> None:
    """Bring the database to this version, without serving it; `slm serve` does so by itself.

    On SQLite the server must be stopped. An empty data directory is made ready as well.
    """
    from slm.server.prepare import prepare
    from slm.server.settings import load_settings

    settings = load_settings(data_dir=data, database_url=database_url)

    async def run() -> list[str]:
        prepared = await prepare(settings)
        await prepared.database.close()
        return prepared.notes

    for sentence in asyncio.run(run()):
        output.say(sentence)
    output.say("The database is of this version.")


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; must not be there yet.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Write a consistent copy of the database while the server runs, on the server's own disk.

    The copy holds the API keys only as the encryption key has sealed them: back up encryption.key
    (or SLM_ENCRYPTION_KEYS) too, and keep it elsewhere.
    """
    target = find(url, token_file, ca_file, data)
    with output.progress("writing the copy"):
        answer = asyncio.run(_backup(target, file.absolute()))
    if as_json:
        output.print_json(answer.data)
        return
    output.say(f"Backed up to {answer.data.get('path', file)}, revision {answer.revision}.")


async def _backup(target: Target, file: Path) -> Answer:
    async with Api(target, timeout_seconds=600) as api:
        return await api.call("POST", "/api/admin/backup", body={"path": str(file)})


@app.command()
def restore(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A file that `slm db backup` wrote.", exists=True),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    data: DataDir = DEFAULT_DATA_DIR,
    database_url: DatabaseUrl = None,
) -> None:
    """Put a backup in the place of the database; the server must be stopped.

    It begins a new epoch: every client takes a fresh snapshot, and drops what is not there.
    """
    from slm.server.backup import restore as restore_backup
    from slm.server.settings import load_settings

    settings = load_settings(data_dir=data, database_url=database_url)
    if not yes:
        if not sys.stdin.isatty():
            raise output.UsageError("there is no terminal to ask at; add --yes to restore")
        typer.confirm("Replace the database by this backup?", abort=True, err=True)
    with output.progress("restoring"):
        notes = asyncio.run(restore_backup(settings, file))
    for sentence in notes:
        output.say(sentence)
