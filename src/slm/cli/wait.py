"""`--wait`: waits for a change until every backend has answered, and shows the receipt.

Knows the receipt route and how a receipt is displayed; knows no agent.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slm.cli import output
from slm.cli.api_client import Api
from slm.cli.output import escape
from slm.cli.target import Target

_WAIT_SECONDS: Final = 5.0
_ASK_SECONDS: Final = 0.25
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|)")


def _seconds(text: str) -> float:
    found = _DURATION.fullmatch(text)
    if not found:
        raise output.UsageError("--wait-limit is a time such as 20s or 500ms")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


Wait = Annotated[
    bool,
    typer.Option(
        "--wait",
        help="Wait until every backend has applied the change; exit with 0 only if all did.",
        rich_help_panel="Receipt",
    ),
]
WaitLimit = Annotated[
    float | None,
    typer.Option(
        "--wait-limit",
        parser=_seconds,
        metavar="TIME",
        help="How long --wait waits at most, such as 20s or 500ms; 5s by default.",
        rich_help_panel="Receipt",
        show_default=False,
    ),
]


def finish(
    target: Target, revision: int, wait: bool, limit: float | None, told: dict[str, Any] | None
) -> None:
    """End a command that wrote `revision`, with its receipt if requested.

    Args:
        target: the server.
        revision: the revision of the change.
        wait: whether `--wait` was given.
        limit: the seconds of `--wait-limit`, which implies `--wait`.
        told: the `--json` output without the receipt; None if the output for people was printed
            already.

    Raises:
        Exit: with 1, because a backend refused the change or has not answered.
        SLMError: the receipt is unavailable; the change stands.
    """
    receipt = None
    try:
        if wait or limit is not None:
            seconds = _WAIT_SECONDS if limit is None else limit
            receipt = asyncio.run(_follow(target, revision, seconds))
    finally:
        if told is not None:
            output.print_json(told if receipt is None else told | {"receipt": receipt})
    if receipt is None:
        return
    if told is None:
        _show(receipt)
    if _count(receipt, "refused") or _count(receipt, "pending"):
        raise typer.Exit(1)


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
                if not _count(receipt, "pending") or not left:
                    return receipt


def _counts(receipt: dict[str, Any]) -> tuple[int, int]:
    applied = _count(receipt, "applied")
    return applied, applied + _count(receipt, "refused") + _count(receipt, "pending")


def _count(receipt: dict[str, Any], kind: str) -> int:
    """Return the number of such backends, including those a limited token only sees counted."""
    return len(receipt[kind]) + _others(receipt, kind)


def _others(receipt: dict[str, Any], kind: str) -> int:
    return int(receipt.get("others", {}).get(kind, 0))


def _show(receipt: dict[str, Any]) -> None:
    """Print a receipt; whatever makes it incomplete is printed in full."""
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
    output.out().print(f"  {text}", soft_wrap=True)
    lines = [f"[red]refused[/]    {escape(r['backend'])}: {escape(r['reason'])}"
             for r in receipt["refused"]]  # fmt: skip
    lines += [f"[yellow]no answer[/]  {escape(name)}" for name in receipt["pending"]]
    for kind, told in (("refused", "[red]refused[/]    "), ("pending", "[yellow]no answer[/]  ")):
        if count := _others(receipt, kind):
            lines.append(f"{told}{count} with other tokens, whose names this token may not see")
    output.some(lines)
    if unknown := receipt["unknown"]:
        output.note(f"{len(unknown)} connected without ever acking: {', '.join(unknown[:5])}")
