"""Output of the command line: results on stdout, notes and errors on stderr, no tracebacks.

On a terminal, uses colours and its width; in a pipe, plain text, never wrapped or cut.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape as _escape_markup
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from typer.exceptions import TyperException

_PIPE_WIDTH = 10_000
_MAX_LINES = 20

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Characters that control a terminal: control characters, and those that change direction.
_OBEYED: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


# Replacements for characters of our own that a terminal lacks.
_PLAINER: Final = {"–": "-", "—": "-", "→": "->", "…": "...", "“": '"', "”": '"', "’": "'"}


class UsageError(TyperException):
    """The command is invalid as given; the exit code is 2."""

    exit_code = 2


def take_any_text() -> None:
    """Make stdout and stderr accept every character, whatever their encoding.

    Names, model answers and our own dashes would otherwise abort a command in a Windows pipe or the
    POSIX locale. Characters missing in the encoding are written as escapes.
    """
    codecs.register_error("slm", _written_out)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "slm"), (sys.stderr, "slm")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _written_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAINER.get(char) or _escaped(char) for char in missing), error.end


def _escaped(char: str) -> str:
    """Return the character's JSON escape, which people can look up too."""
    return json.dumps(char)[1:-1]


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # rich would use 80 columns in a pipe and cut off what a script wants to read.
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=not stream.isatty())


def out() -> Console:
    """Return the console for results; created each time, so that it follows sys.stdout."""
    return _console(stderr=False)


def err() -> Console:
    """Return the console for notes, progress and errors."""
    return _console(stderr=True)


def printable(text: str) -> str:
    """Return the text with each control character replaced by its number.

    Names, comments and reasons are written by others: they must not be able to clear a screen, hide
    a line or write to the clipboard.
    """
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def escape(text: str) -> str:
    """Return foreign text, escaped for rich, printable and without line breaks."""
    return _escape_markup(printable(" ".join(text.splitlines())))


def one_line(text: str) -> str:
    """Return the text with every run of white space, including line breaks, as one space."""
    return " ".join(text.split())


def error(text: str) -> None:
    """Print an error as one line on stderr."""
    err().print(f"[bold red]error:[/] {escape(one_line(text))}")


def warning(text: str) -> None:
    """Print a warning as one line on stderr."""
    err().print(f"[bold yellow]warning:[/] {escape(one_line(text))}")


def say(text: str) -> None:
    """Print one plain line on stdout and flush it."""
    print(printable(text), flush=True)


def note(text: str) -> None:
    """Print a note on stderr."""
    err().print(f"[dim]{escape(text)}[/]")


def print_json(value: Any, *, lines: bool = False) -> None:
    """Print a value as JSON on stdout: indented, or as a single line if `lines`."""
    indent = None if lines else 2
    # The same text for every parser.
    text = printable(json.dumps(value, ensure_ascii=False, indent=indent))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    print(text, flush=lines)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    """Print rows under a header; cells may contain rich markup, so escape foreign text.

    Args:
        columns: the headers.
        rows: one cell per column.
        right: the columns to align to the right.
    """
    console = out()
    # Only a terminal has a limited width: long cells are folded there, never in a pipe.
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        grid.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="fold" if console.is_terminal else "ignore",
            no_wrap=not console.is_terminal,
        )
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def some(lines: Iterable[str]) -> None:
    """Print up to 20 lines, which may contain markup, and how many more there are."""
    console, everything = out(), list(lines)
    for line in everything[:_MAX_LINES]:
        console.print(f"  {line}", soft_wrap=True)
    if len(everything) > _MAX_LINES:
        console.print(f"  [dim]and {len(everything) - _MAX_LINES} more; --json has all[/]")


def pairs(values: Mapping[str, str]) -> None:
    """Print names and aligned values, one pair per line; values may contain markup."""
    width = max(map(len, values), default=0)
    console = out()
    for name, value in values.items():
        console.print(f"[dim]{name:<{width}}[/]  {value}", soft_wrap=True)


def shown(value: Any) -> str:
    """Return a config value formatted for people and escaped for rich."""
    if value is None or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict | list):
        return escape(json.dumps(value, ensure_ascii=False))
    return escape(str(value))


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Show progress on a terminal; print nothing in a pipe."""
    console = err()
    if not console.is_terminal:
        yield
        return
    with console.status(f"{escape(what)} …"):
        yield


@contextlib.contextmanager
def transfer(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a callback for each piece (its size, total size); shows a bar on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    console = err()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)

        def on_bytes(count: int, total: int | None) -> None:
            bar.update(task, advance=count, total=total)

        yield on_bytes


@contextlib.contextmanager
def steps(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for each step (number done, total); shows a bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = err()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)

        def on_step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield on_step
