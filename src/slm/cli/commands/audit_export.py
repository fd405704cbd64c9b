"""`slm audit export` and the check of its files: the chain as JSON lines in a file.

Uses the REST API through `api_client`. The server's code defines the chain; checking it needs no
server.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Final

import typer

from slm.cli import output
from slm.cli.api_client import Api
from slm.cli.output import Json
from slm.cli.target import Target, at_a_server
from slm.errors import ConfigurationError

FORMAT: Final = 1
_PATH: Final = "/api/admin/audit/export"


@at_a_server
def export(
    target: Target,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Where to write; an existing file is never replaced."),
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Start at the beginning instead of after the last export.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the audit to a file as JSON lines, from where the last export ended.

    The server notes what was exported: with SLM_AUDIT_KEEP_DAYS it removes older entries that are
    in an export, and no others. Check a file with slm audit verify FILE.

    [bold]Example[/]
      slm audit export audit-$(date +%F).jsonl
    """
    if file.exists() or file.is_symlink():
        raise ConfigurationError(f"{file} already exists; an export never replaces a file")
    unfinished = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with output.progress("exporting"), _create_private(unfinished) as copy:
            told = asyncio.run(_export(target, copy, everything))
            copy.flush()
            os.fsync(copy.fileno())
        checked = check([unfinished])
        # Fails if the name was taken meanwhile; a rename would replace that file.
        os.link(unfinished, file)
        _sync(file.absolute().parent)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    whole = checked["whole"]
    if whole and told["rows"]:
        # Only now, when what the server may remove is on disk.
        asyncio.run(_confirm(target, told["head"]))
    if as_json:
        output.print_json({"file": str(file), **checked})
    elif whole:
        output.say(f"Exported {checked['rows']} entries to {file}. Head: {checked['head']}")
    else:
        output.error(f"the audit was altered: {checked['reason']}; {file} has it as it is")
    if not whole:
        raise typer.Exit(1)


async def _export(target: Target, copy: IO[str], everything: bool) -> dict[str, Any]:
    """Write every page; return the head and the number of rows."""
    rows = 0
    head = None
    params: dict[str, str | int] = {"all": "true"} if everything else {}
    async with Api(target, timeout_seconds=60) as api:
        while True:
            page = (await api.call("GET", _PATH, params=params)).data
            if head is None:
                # Entries added meanwhile belong to the next export.
                head = page["head"]
                _line(copy, {"slm_audit": FORMAT, "after": page["after"]})
            for entry in page["entries"]:
                _line(copy, entry)
            rows += len(page["entries"])
            if page["next"] is None:
                break
            params = {"after": page["next"], "upto": head.partition(":")[0]}
    _line(copy, {"head": head, "rows": rows})
    return {"head": head, "rows": rows}


async def _confirm(target: Target, head: str) -> None:
    async with Api(target) as api:
        await api.call("POST", "/api/admin/audit/exported", body={"head": head})


def check(files: list[Path], expect: str | None = None) -> dict[str, Any]:
    """Check exported files, each continuing the one before, without a server.

    Returns:
        `whole`, `rows`, `after`, `head`, and `reason` if something is wrong.
    """
    from slm.server.security.audit_chain import ChainEntry, Walk, parse_link

    walk: Walk | None = None
    noted = None if expect is None else parse_link(expect)
    reason = ""
    rows = 0
    for name in files:
        try:
            with name.open(encoding="utf-8") as lines:
                file = _File(lines)
                start = parse_link(file.after)
                if start is None:
                    raise ValueError
                if walk is None:
                    walk = Walk(start, noted)
                if walk.at != start:
                    reason = f"{name} does not go on where the file before it ends"
                elif not walk.go(ChainEntry(**entry) for entry in file.entries()):
                    reason = f"{name}, entry {walk.at.seq + 1}: {walk.reason}"
                elif file.end != {"head": str(walk.at), "rows": file.rows} or next(lines, ""):
                    reason = f"{name} does not end where it says"
                rows += file.rows
        except OSError as error:
            raise ConfigurationError(f"{name} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, AttributeError, StopIteration, RecursionError):
            raise ConfigurationError(f"{name} is no export of the audit") from None
        if reason:
            break
    if walk is None:
        raise ConfigurationError("name a file")
    if not reason and expect is not None:
        held = noted is not None and walk.start.seq <= noted.seq <= walk.at.seq
        reason = "" if held else "the noted head is not in the audit"
    return {
        "whole": not reason,
        "rows": rows,
        "after": str(walk.start),
        "head": str(walk.at),
        "reason": reason,
    }


class _File:
    """An export, read line by line: its start, its entries, and its stated end."""

    def __init__(self, lines: Iterator[str]) -> None:
        first = json.loads(next(lines))
        if first.get("slm_audit") != FORMAT:
            raise ValueError
        self.after = str(first.get("after"))
        self.rows = 0
        self.end: dict[str, Any] = {}
        self._lines = lines

    def entries(self) -> Iterator[dict[str, Any]]:
        for line in self._lines:
            value: dict[str, Any] = json.loads(line)
            if "seq" not in value:
                self.end = value
                return
            self.rows += 1
            yield value


def _line(copy: IO[str], value: Any) -> None:
    copy.write(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


def _create_private(file: Path) -> IO[str]:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    return os.fdopen(descriptor, "w", encoding="utf-8")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
