"""`slm demo`: a tour on this machine with real parts, which ends and cleans up by itself.

Tells the story; `processes` has the processes and `model` the model. Changes are made over
HTTP, as by any client.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table

from slm.cli import output
from slm.cli.api_client import Api, agent_path
from slm.cli.demo.local_model import missing
from slm.cli.demo.model import RealModel, is_at_hand, real_model
from slm.cli.demo.processes import DemoBackend, Server
from slm.cli.output import escape
from slm.cli.target import Target, read_token
from slm.errors import StartupError

AGENT: Final = "demo-assistant"
PROMPT: Final = "What does the heart do?"
DEMO_KEY: Final = "demo-key-"


def demo(
    stay: Annotated[
        bool,
        typer.Option("--stay", help="Keep everything running afterwards, until Ctrl-C."),
    ] = False,
    find_model: Annotated[bool, typer.Option("--find-model", hidden=True)] = False,
) -> None:
    """Change an agent's LLM live, and watch its very next request use it.

    It starts a server on SQLite, a backend and a real language model on this machine (Ollama if it
    runs here, else a small local model). It changes the agent's parameters and its provider, and
    stops the server and starts it again. Each step shows the answer, the configuration that made
    it, and how long the change took to reach the backend. It takes under a minute and leaves
    nothing behind.
    """
    if find_model:
        raise typer.Exit(0 if asyncio.run(is_at_hand()) else 1)
    try:
        asyncio.run(_until_told(_tour(stay=stay)))
    except asyncio.CancelledError:
        raise typer.Exit(130) from None


async def _until_told(tour: Any) -> None:
    """Run the tour; SIGTERM and a closed terminal end and clean it up as Ctrl-C does."""
    task = asyncio.ensure_future(tour)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    await task


@dataclass
class TourStep:
    """What one step showed, for the final table."""

    what: str
    revision: int
    after_sent: float | None
    after_answer: float | None
    report: dict[str, Any] = field(default_factory=dict)


async def _tour(*, stay: bool) -> None:
    console = output.out()
    console.print(
        Panel.fit(
            "[bold]An agent's LLM, changed while its backend runs[/]\n"
            "[dim]no restart, no proxy: the very next request uses the new config[/]",
            border_style="cyan",
        )
        if console.is_terminal
        else "An agent's LLM, changed while its backend runs"
    )
    async with contextlib.AsyncExitStack() as stack:
        with output.progress("starting an SLM, a backend and a language model"):
            stage = await stack.enter_async_context(_stage(console))
        stage.introduce()
        steps = [
            await stage.create(),
            await stage.change_parameters(),
            await stage.change_provider(),
            await stage.without_slm(),
            await stage.slm_is_back(),
        ]
        stage.summary(steps)
        if stay:
            stage.invite()
            await asyncio.Event().wait()
    _farewell(console)


@contextlib.asynccontextmanager
async def _stage(console: Console) -> AsyncIterator[_Stage]:
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slm-demo-")))
        try:
            model = await stack.enter_async_context(real_model())
        except StartupError:
            raise StartupError(f"no Ollama answers on port 11434, and {missing()}") from None
        server = Server(folder / "data")
        stack.push_async_callback(server.stop)
        await server.start()
        backend = DemoBackend(server.url, server.data_dir / "backend.token")
        stack.push_async_callback(backend.stop)
        await backend.start()
        token = SecretStr(read_token(server.data_dir / "admin.token"))
        api = await stack.enter_async_context(Api(Target(server.url, token, None, "the demo")))
        yield _Stage(console, model, server, backend, api)


class _Stage:
    """The running parts, and the steps of the tour."""

    def __init__(
        self, console: Console, model: RealModel, server: Server, backend: DemoBackend, api: Api
    ) -> None:
        self._console = console
        self._model = model
        self._server = server
        self._backend = backend
        self._api = api
        self._number = 0

    def introduce(self) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_row("[bold]SLM[/]", f"{self._server.url}, on SQLite, process {self._server.pid}")
        grid.add_row(
            "[bold]backend[/]",
            f"SLMClient and LLMInterface, process {self._backend.pid}; asks the model by itself",
        )
        grid.add_row("[bold]model[/]", escape(self._model.what))
        self._console.print(grid)

    async def create(self) -> TourStep:
        self._head("An agent is created; the backend runs already")
        body = {
            "agent_id": AGENT,
            "name": "Demo assistant",
            "llm_provider": "openai",
            "llm_endpoint": self._model.openai_url,
            "llm_model": self._model.name,
            "llm_temperature": 0.7,
            "llm_max_tokens": 40,
            "llm_timeout": 60,
            "llm_api_key": f"{DEMO_KEY}one",
        }
        return await self._change("created", "POST", "/api/agents", body)

    async def change_parameters(self) -> TourStep:
        self._head("Its parameters are changed")
        body = {"llm_temperature": 0.0, "llm_max_tokens": 12}
        return await self._change("parameters", "PUT", agent_path(AGENT), body)

    async def change_provider(self) -> TourStep:
        self._head("Its provider is changed, from openai to anthropic, and its key with it")
        body = {
            "llm_provider": "anthropic",
            "llm_endpoint": self._model.anthropic_url,
            "llm_max_tokens": 24,
            "llm_api_key": f"{DEMO_KEY}two",
        }
        return await self._change("provider", "PUT", agent_path(AGENT), body)

    async def without_slm(self) -> TourStep:
        self._head("The SLM is stopped; the backend goes on from its cache")
        with output.progress("stopping the SLM"):
            await self._server.stop()
        self._line("done", f"SIGTERM to process {self._server.pid}; nobody answers at its address")
        report = await self._ask()
        return TourStep("SLM stopped", report["revision"], None, None, report)

    async def slm_is_back(self) -> TourStep:
        self._head("The SLM is back, and the agent is changed at once")
        with output.progress("starting the SLM again"):
            await self._server.start()
        body = {"llm_max_tokens": 40}
        step = await self._change("SLM back", "PUT", agent_path(AGENT), body)
        self._line(
            "note",
            "[dim]the backend found it again by itself, and resumed by revision "
            "(here it tries every second; by default the wait grows to 30 s)[/]",
        )
        return step

    async def _change(self, what: str, method: str, path: str, body: dict[str, Any]) -> TourStep:
        """Make one change over HTTP, wait for it to reach the backend, and have the backend ask."""
        self._line("sent", f"{method} {path}  [cyan]{escape(_shown_body(body))}[/]")
        sent = time.monotonic()
        answer = await self._api.call(method, path, body=body)
        answered = time.monotonic()
        with output.progress("waiting for the backend"):
            in_force = await self._backend.in_force(answer.revision)
        step = TourStep(what, answer.revision, in_force - sent, in_force - answered)
        self._line(
            "took",
            f"in the backend's cache [bold green]{_ms(in_force - sent)}[/] after the request was "
            f"sent, {_around(in_force - answered)} its answer",
        )
        step.report = await self._ask()
        if step.report["revision"] != answer.revision:
            raise StartupError(
                f"the answer was made by revision {step.report['revision']}, "
                f"not by {answer.revision}"
            )
        return step

    async def _ask(self) -> dict[str, Any]:
        with output.progress("the backend asks the model"):
            report = await self._backend.ask(AGENT, PROMPT)
        text = output.one_line(report["text"]) or "(no text)"
        if report["finish_reason"] == "length":
            text += " …"
        self._line("asked", f"[dim]{escape(PROMPT)}[/]")
        self._line("answer", f"[italic]{escape(text)}[/]")
        tokens = f", {report['output_tokens']} tokens" if report["output_tokens"] else ""
        stale = ", stale" if report["stale"] else ""
        self._line(
            "by",
            f"[bold]{escape(report['provider'])}[/]/{escape(report['model'])}, step "
            f"{report['step']}, revision [bold]{report['revision']}[/]{stale} "
            f"[dim]({report['seconds']:.2f} s{tokens}, finished: {report['finish_reason']}; "
            f"client {report['status']})[/]",
        )
        return report

    def summary(self, steps: list[TourStep]) -> None:
        self._console.print()
        self._rule("What happened")
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column("")
        table.add_column("revision", justify="right")
        table.add_column("provider")
        table.add_column("step")
        table.add_column("in the cache after\nsending the change", justify="right")
        table.add_column("and after\nits answer", justify="right")
        table.add_column("the request\nitself", justify="right")
        for step in steps:
            table.add_row(
                step.what,
                str(step.revision),
                step.report["provider"],
                step.report["step"],
                "" if step.after_sent is None else f"[green]{_ms(step.after_sent)}[/]",
                "" if step.after_answer is None else _ms(step.after_answer, sign=True),
                f"{step.report['seconds']:.2f} s",
            )
        self._console.print(table)
        self._console.print(
            "[dim]Both processes read the machine's one monotonic clock. The SLM answers a change "
            "when it has\npushed it, so the backend may hold it before the answer is read: then "
            "the time is below zero.[/]",
            soft_wrap=True,
        )

    def invite(self) -> None:
        slm = _command()
        data = self._server.data_dir
        self._console.print()
        self._rule("Everything is still running; in another terminal")
        for line in (
            f"cd {Path.cwd()}",
            f"export SLM_DATA_DIR={data}",
            f"{slm} watch &",
            f"{slm} agents set {AGENT} --temperature 1.2 --max-tokens 20",
            f'{slm} ask {AGENT} "What is a revision?"',
            f"{slm} agents show {AGENT}",
        ):
            self._console.print(f"  {escape(line)}", soft_wrap=True)
        self._console.print("[dim]Ctrl-C here ends and removes all of it.[/]")

    def _head(self, title: str) -> None:
        self._number += 1
        self._console.print()
        self._rule(f"{self._number}  {title}")

    def _rule(self, title: str) -> None:
        if self._console.is_terminal:
            self._console.print(Rule(f"[bold]{title}[/]", align="left", style="cyan"))
        else:
            self._console.print(f"--- {title}")

    def _line(self, label: str, text: str) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=6, style="dim")
        grid.add_column(overflow="fold")
        grid.add_row(label, text)
        self._console.print(grid)


def _farewell(console: Console) -> None:
    slm = _command()
    console.print()
    console.print("[bold]To go on by hand[/]")
    grid = Table.grid(padding=(0, 3, 0, 0))
    for command, what in (
        (f"{slm} demo --stay", "this again, left running, with commands to try on it"),
        (f"{slm} serve", "a server of your own, its data in ./slm-data; then, beside it:"),
        (f"{slm} agents list", "the agents, the seeded default among them"),
        (f"{slm} agents set default --temperature 0.2", "change one"),
        (f"{slm} watch", "changes as they happen"),
    ):
        grid.add_row(f"  {escape(command)}", f"[dim]{what}[/]")
    console.print(grid)
    console.print("[dim]Everything that the demo started has ended; nothing is left of it.[/]")


def _shown_body(body: dict[str, Any]) -> str:
    """Return a summary of what a change sends; the key is a demo's, but masked nevertheless."""
    shown = {
        name.removeprefix("llm_"): "***" if name == "llm_api_key" else value
        for name, value in body.items()
        if name not in ("agent_id", "name", "llm_timeout")
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _ms(seconds: float, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    if abs(seconds) >= 1:
        return f"{seconds:{plus}.1f} s"
    return f"{seconds * 1000:{plus}.1f} ms"


def _around(seconds: float) -> str:
    return f"{_ms(abs(seconds))} {'after' if seconds >= 0 else 'before'}"


def _command() -> str:
    """Return how this command is called from here, so that printed lines can be copied."""
    mine = Path(sys.argv[0]).resolve()
    found = shutil.which("slm")
    if found is not None and Path(found).resolve() == mine:
        return "slm"
    beside = Path(sys.executable).with_name("slm")
    if beside.exists():
        relative = os.path.relpath(beside)
        return str(beside) if relative.startswith("..") else relative
    return f"{sys.executable} -m slm"
