"""The README's picture: a terminal in which the model of a running agent is changed.

`make picture` takes it anew. It is a real run: a server, a backend on the SDK and an operator's
commands; only the two providers are stand-ins on this machine. What was printed is kept in
docs/images/live-change.txt, and the picture beside it is drawn from that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

IMAGES: Final = Path(__file__).parents[1] / "docs" / "images"
TRANSCRIPT: Final = IMAGES / "live-change.txt"
PICTURE: Final = IMAGES / "live-change.svg"
COLUMNS: Final = 104

BACKEND: Final = """\
import asyncio
import datetime

from slm import LLMInterface, SLMClient


async def main() -> None:
    async with SLMClient(name="shop") as client, LLMInterface(client) as llm:
        while True:
            now = datetime.datetime.now()
            answer = await llm.chat("billing", [{"role": "user", "content": "Is invoice 7 paid?"}])
            model, revision = f"{answer.provider}/{answer.model}", f"revision {answer.revision}"
            print(f"{now:%H:%M:%S.%f}"[:-3], f"{model:<27} {revision}  {client.status}", flush=True)
            await asyncio.sleep(1)


asyncio.run(main())
"""
CHANGE: Final = (
    "slm agents set billing --provider anthropic --model claude-sonnet-5-5"
    " --api-key-file new.key --wait"
)
STOP: Final = "kill $(cat slm.pid)"
_BACKEND_LINE: Final = re.compile(r"\d\d:\d\d:\d\d\.\d+ (\S+) +(revision \d+) +(\w+)")
_SECONDS: Final = 60.0


async def _openai(request: web.Request) -> web.Response:
    model = (await request.json())["model"]
    message = {"role": "assistant", "content": f"{model} says yes."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return web.json_response({"object": "chat.completion", "model": model, "choices": [choice]})


async def _anthropic(request: web.Request) -> web.Response:
    model = (await request.json())["model"]
    answer = {"type": "message", "role": "assistant", "model": model, "stop_reason": "end_turn"}
    answer["content"] = [{"type": "text", "text": f"{model} says yes."}]
    return web.json_response(answer | {"usage": {"input_tokens": 9, "output_tokens": 4}})


@contextlib.asynccontextmanager
async def _providers() -> AsyncIterator[str]:
    """Answer as OpenAI and Anthropic do, with the name of the model that was asked for."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _openai)
    app.router.add_post("/v1/messages", _anthropic)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


class Terminal:
    """What a terminal shows in which a backend runs, and somebody types commands."""

    def __init__(self, folder: Path) -> None:
        self.lines: list[str] = []
        self._folder = folder
        self._more = asyncio.Condition()
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        (bin_folder / "slm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m slm "$@"\n')
        (bin_folder / "slm").chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLM_", "AUTOBOT_LLM_"))}
        self._environment = kept | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "COLUMNS": str(COLUMNS),
            "XDG_STATE_HOME": str(folder / "state"),
            "PYTHONUNBUFFERED": "1",
        }

    async def start(self, *command: str, **variables: str) -> Process:
        """Start a process whose output is read."""
        return await asyncio.create_subprocess_exec(
            *command,
            cwd=self._folder,
            env=self._environment | variables,
            stdout=PIPE,
            stderr=STDOUT,
        )

    async def type(self, command: str, *, shown: bool = True) -> str:
        """Run a command line, show what it prints, and return that.

        Raises:
            RuntimeError: it failed.
        """
        if shown:
            await self._show(f"$ {command}")
        process = await self.start("sh", "-c", command)
        said, _ = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{command}: {said.decode()}")
        if shown:
            await self._show(*said.decode().splitlines())
        return said.decode()

    async def follow(self, process: Process) -> None:
        """Show each line of a process in the background as it comes."""
        assert process.stdout is not None, "its output is not read"  # noqa: S101
        while line := await process.stdout.readline():
            await self._show(line.decode().rstrip())

    async def see(self, pattern: str, count: int) -> None:
        """Wait until so many lines match the pattern."""

        def seen() -> bool:
            return sum(bool(re.search(pattern, line)) for line in self.lines) >= count

        try:
            async with asyncio.timeout(_SECONDS), self._more:
                await self._more.wait_for(seen)
        except TimeoutError:
            raise RuntimeError(f"not seen: {pattern}\n" + "\n".join(self.lines)) from None

    async def _show(self, *lines: str) -> None:
        async with self._more:
            self.lines += lines
            self._more.notify_all()


async def record() -> list[str]:
    """Play it, and return the terminal's lines."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slm-picture-")))
        endpoint = await stack.enter_async_context(_providers())
        terminal = Terminal(folder)
        (folder / "backend.py").write_text(BACKEND)
        (folder / "old.key").write_text("sk-picture-old")
        (folder / "new.key").write_text("sk-picture-new")
        server = await terminal.start("slm", "serve", "--port", "0")
        stack.push_async_callback(_end, server)
        await _ready(server)
        (folder / "slm.pid").write_text(str(server.pid))
        await terminal.type(
            "slm agents create billing --provider openai --model gpt-6.1-sol"
            f" --api-key-file old.key --endpoint {endpoint}",
            shown=False,
        )
        url = (folder / "slm-data" / "server.url").read_text().strip()
        terminal.lines.append("$ python backend.py 2>backend.log &")
        backend = await terminal.start(
            *("sh", "-c", f"exec {sys.executable} backend.py 2>backend.log"),
            SLM_URL=url,
            SLM_TOKEN_FILE=str(folder / "slm-data" / "backend.token"),
        )
        stack.push_async_callback(_end, backend)
        following = asyncio.create_task(terminal.follow(backend))
        stack.callback(following.cancel)
        await terminal.see("revision 2 .*live", 2)
        await terminal.type(CHANGE)
        await terminal.see("revision 3 .*live", 2)
        await terminal.type(STOP)
        await server.wait()
        await terminal.see("revision 3 .*disconnected", 2)
    check(terminal.lines)
    return terminal.lines


async def _ready(server: Process) -> None:
    assert server.stdout is not None, "its output is not read"  # noqa: S101
    async with asyncio.timeout(_SECONDS):
        while not (line := await server.stdout.readline()).startswith(b"SLM ready"):
            if not line:
                raise RuntimeError("the server did not start")


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()


def check(lines: list[str]) -> None:
    """Refuse a run in which a request after the change used the old configuration.

    Raises:
        RuntimeError: there is one.
    """
    applied = next(n for n, line in enumerate(lines) if "applied by 1 of 1" in line)
    for line in lines[applied:]:
        if (found := _BACKEND_LINE.match(line)) and found[2] != "revision 3":
            raise RuntimeError(f"after the change: {line}")


def masked(lines: list[str]) -> tuple[list[str], list[str]]:
    """Return what must be the same in every run: what the operator saw, and what the backend did.

    Times are masked, and repeated lines of the backend count once.
    """
    operator: list[str] = []
    backend: list[str] = []
    for line in lines:
        if found := _BACKEND_LINE.match(line):
            did = " ".join(found.groups())
            if did not in backend[-1:]:
                backend.append(did)
        else:
            operator.append(re.sub(r"\d+(\.\d+)? ms", "N ms", line))
    return operator, backend


# --- the picture ---

_THEME: Final = TerminalTheme(
    (22, 27, 34),
    (214, 222, 231),
    [
        *((22, 27, 34), (255, 123, 114), (126, 231, 135), (242, 204, 96)),
        *((121, 192, 255), (210, 168, 255), (118, 227, 234), (214, 222, 231)),
    ],
    [(139, 148, 158)] * 8,
)
# As rich has it, with fonts that are on every machine in the place of one from another site.
_FORMAT: Final = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" \
aria-label="A terminal in which the model of a running agent is changed">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, \
"DejaVu Sans Mono", "Liberation Mono", monospace; font-size: {char_height}px; \
line-height: {line_height}px; white-space: pre; }}
.{unique_id}-title {{ font-size: 16px; font-weight: bold; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def _styled(line: str) -> Text:
    if line.startswith("$ "):
        return Text.assemble(("$ ", "green"), (line[2:], "bold"))
    if found := _BACKEND_LINE.match(line):
        text = Text(line)
        text.stylize("bright_black", 0, found.start(1))
        text.stylize("yellow" if "openai/" in line else "green", found.start(1), found.end(2))
        text.stylize("red" if found[3] != "live" else "bright_black", found.start(3))
        return text
    text = Text(line)
    if "→" in line:
        text.highlight_regex(r"→ .*", "green")
    if "applied by" in line:
        text.stylize("cyan")
    return text


def picture(lines: list[str]) -> str:
    """Return the SVG of a terminal with these lines."""
    options: dict[str, Any] = {"record": True, "width": COLUMNS, "color_system": "truecolor"}
    with Path(os.devnull).open("w") as nowhere:
        console = Console(file=nowhere, force_terminal=True, **options)
        for line in lines:
            console.print(_styled(line), soft_wrap=False)
        return console.export_svg(
            title="change an agent while it runs",
            theme=_THEME,
            code_format=_FORMAT,
            unique_id="slm",
        )


def main() -> None:
    """Take the run and the picture anew."""
    if shutil.which("sh") is None:
        raise SystemExit("a POSIX shell is needed")
    lines = asyncio.run(record())
    IMAGES.mkdir(exist_ok=True)
    TRANSCRIPT.write_text("\n".join(lines) + "\n")
    PICTURE.write_text(picture(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
