"""`--wait`: follows a change until every backend has answered, and shows the receipt.

Knows the route of receipts and how one is shown; knows no agent.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slm.cli import output
from slm.cli.connection import Target
from slm.cli.http import Api
from slm.cli.output import escape

_ASK_SECONDS: Final = 0.25
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|)")
_MAX_SHOWN: Final = 20

Wait = Annotated[
    bool,
    typer.Option(
        "--wait",
        help="Wait until every backend has taken the change; exit 0 only if all did.",
        rich_help_panel="Receipt",
    ),
]
WaitLimit = Annotated[
    str | None,
    typer.Option(
        "--wait-limit",
        metavar="TIME",
        help="How long --wait waits at most, such as 20s or 500ms; 5s when not given.",
        rich_help_panel="Receipt",
        show_default=False,
    ),
]


def limit_of(wait: bool, limit: str | None) -> float | None:
    """Return the seconds to wait, or None for not at all; a limit alone says `--wait` too."""
    if limit is None:
        return 5.0 if wait else None
    found = _DURATION.fullmatch(limit)
    if not found:
        raise output.UsageError("--wait-limit is a time such as 20s or 500ms")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def receipt_of(target: Target, revision: int, seconds: float) -> dict[str, Any]:
    """Return the receipt of a change once all have answered, or after `seconds`; a bar meanwhile.

    Raises:
        ProblemError: the server refused.
        SLMUnavailable: nobody answers there.
    """
    return asyncio.run(_follow(target, revision, seconds))


async def _follow(target: Target, revision: int, seconds: float) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = output.err()
    deadline = time.monotonic() + seconds
    async with Api(target) as api:
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task(f"revision {revision}", total=None)
            while True:
                left = max(0.0, deadline - time.monotonic())
                wait = f"{min(left, _ASK_SECONDS):.3f}s"
                path = f"/api/changes/{revision}/receipt"
                receipt = (await api.call("GET", path, params={"wait": wait})).data
                applied, total = _counts(receipt)
                bar.update(task, completed=applied, total=total)
                if not receipt["pending"] or not left:
                    return receipt


def _counts(receipt: dict[str, Any]) -> tuple[int, int]:
    applied = len(receipt["applied"])
    return applied, applied + len(receipt["refused"]) + len(receipt["pending"])


def show(receipt: dict[str, Any]) -> None:
    """Print a receipt; what keeps it from being whole in full."""
    applied, total = _counts(receipt)
    backends = "backend" if total == 1 else "backends"
    if not total:
        text = "no backend was connected that could take it"
    else:
        colour = "green" if applied == total else "red"
        text = f"[{colour}]applied by {applied} of {total} {backends}[/]"
        if receipt["elapsed_ms"] is not None:
            text += (
                f" in {receipt['elapsed_ms']:.0f} ms"
                f" [dim](p50 {receipt['p50_ms']:.0f} ms, p99 {receipt['p99_ms']:.0f} ms)[/]"
            )
    console = output.out()
    console.print(f"  {text}", soft_wrap=True)
    lines = [f"[red]refused[/]    {escape(r['backend'])}: {escape(r['reason'])}"
             for r in receipt["refused"]]  # fmt: skip
    lines += [f"[yellow]no answer[/]  {escape(name)}" for name in receipt["pending"]]
    for line in lines[:_MAX_SHOWN]:
        console.print(f"  {line}", soft_wrap=True)
    if len(lines) > _MAX_SHOWN:
        console.print(f"  [dim]and {len(lines) - _MAX_SHOWN} more; --json has all[/]")
    if unknown := receipt["unknown"]:
        output.note(f"{len(unknown)} connected without ever acking: {', '.join(unknown[:5])}")


def is_whole(receipt: dict[str, Any]) -> bool:
    """Whether every backend that answers at all has applied the change."""
    return not receipt["refused"] and not receipt["pending"]
