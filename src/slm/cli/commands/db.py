"""`slm db`: upgrade, back up and restore the server's database.

`backup` uses the running server; `upgrade` and `restore` open the database themselves and, with
SQLite, require the server to be stopped, because one process holds the file.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from slm.cli import output
from slm.cli.api_client import Api, OnBytes
from slm.cli.target import DEFAULT_DATA_DIR, DataDir, Target, at_a_server
from slm.errors import ConfigurationError

app = typer.Typer(
    help="Upgrade, back up and restore the database.", no_args_is_help=True, rich_markup_mode="rich"
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
    from slm.server.lifecycle.startup import prepare
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
@at_a_server
def backup(
    target: Target,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Where to write; an existing file is never replaced."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a consistent copy of a SQLite database while its server runs.

    The copy holds the API keys only as the encryption key has sealed them: keep encryption.key (or
    SLM_ENCRYPTION_KEYS) as well, in another place.

    [bold]Example[/]
      slm db backup slm-$(date +%F).db
    """
    _refuse_existing(file)
    unfinished = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with (
            output.transfer("copying the database") as on_bytes,
            _create_private(unfinished) as copy,
        ):
            asyncio.run(_backup(target, copy, on_bytes))
            copy.flush()
            os.fsync(copy.fileno())
            size = copy.tell()
        # Fails if the name was taken meanwhile; a rename would replace that file.
        os.link(unfinished, file)
    except FileExistsError:
        _refuse_existing(file)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    if as_json:
        output.print_json({"file": str(file), "bytes": size})
        return
    output.say(f"Backed up to {file} ({size:,} bytes).")


async def _backup(target: Target, copy: BinaryIO, on_bytes: OnBytes) -> None:
    async with Api(target) as api:
        await api.download("POST", "/api/admin/backup", copy, on_bytes)


def _refuse_existing(file: Path) -> None:
    if file.exists() or file.is_symlink():
        raise ConfigurationError(f"{file} is there already; a backup never replaces a file")


def _create_private(file: Path) -> BinaryIO:
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


@app.command()
def restore(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A file that `slm db backup` wrote.", exists=True, dir_okay=False
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    create: Annotated[
        bool,
        typer.Option("--create", help="Restore where no database is yet, as on a new machine."),
    ] = False,
    data: DataDir = DEFAULT_DATA_DIR,
    database_url: DatabaseUrl = None,
) -> None:
    """Replace the database with a backup; the server must be stopped.

    Restoring starts a new epoch: every client takes a fresh snapshot and drops agents that are not
    in it.

    [bold]Example[/]
      slm db restore slm-2026-11-22.db --data /var/lib/slm
    """
    from slm.server.lifecycle.backup import restore as restore_backup
    from slm.server.settings import load_settings

    settings = load_settings(data_dir=data, database_url=database_url)
    if not yes:
        if not sys.stdin.isatty():
            raise output.UsageError("there is no terminal to ask at; add --yes to restore")
        typer.confirm(f"Replace {settings.url.database} with this backup?", abort=True, err=True)
    with output.progress("restoring"):
        notes = asyncio.run(restore_backup(settings, file, create=create))
    for sentence in notes:
        output.say(sentence)
