"""What the command line says when something is wrong: one line, the right exit code, no secret."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from tests.support.command import CANARY, environment, slm
from tests.support.servers import running_server

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


async def test_no_server(tmp_path: Path) -> None:
    """Nobody at the address: the line names it, where it is from, and what to do."""
    done = await slm("agents", "list", "--url", NOBODY, SLM_TOKEN="slm_x")
    assert done.code == 1
    assert done.error.startswith(f"no SLM at {NOBODY} (--url; token: SLM_TOKEN): ")
    assert "slm serve" in done.error


async def test_no_token(tmp_path: Path) -> None:
    """Without a token the line says the three ways to give one."""
    done = await slm("agents", "list", cwd=tmp_path)
    assert done.code == 1
    for way in ("--token-file", "SLM_TOKEN_FILE", "SLM_TOKEN", "admin.token"):
        assert way in done.error


async def test_a_wrong_token(tmp_path: Path) -> None:
    """A token that the server does not know: the line says where it came from, not what it is."""
    (tmp_path / "token").write_text("slm_not-a-token\n")
    async with running_server(tmp_path / "data") as server:
        for command in (("agents", "list"), ("watch",)):
            done = await slm(
                *(*command, "--url", server.url, "--token-file", str(tmp_path / "token"))
            )
            assert done.code == 1
            assert "does not accept the token" in done.error
            assert str(tmp_path / "token") in done.error
            assert "slm_not" not in done.err


async def test_a_token_of_too_few_scopes(tmp_path: Path) -> None:
    """With the backends' token reads work and a write is refused in words."""
    async with running_server(tmp_path / "data") as server:
        token = str(server.data_dir / "backend.token")
        read = await slm("agents", "list", "--url", server.url, "--token-file", token)
        assert read.code == 0
        write = await slm(
            *("agents", "set", "default", "--model", "x", "--url", server.url),
            *("--token-file", token),
        )
        assert write.code == 1
        assert write.error


async def test_the_local_token_goes_to_this_machine_alone(tmp_path: Path) -> None:
    """An address that came from elsewhere never gets the data directory's own token."""
    (tmp_path / "admin.token").write_text("slm_local\n")
    done = await slm("agents", "list", "--url", "https://slm.example", data=tmp_path)
    assert (done.code, "no token for https://slm.example" in done.error) == (1, True)


@pytest.mark.parametrize("open_to_all", [".", "server.url"])
async def test_an_address_that_others_can_write_is_not_used(
    tmp_path: Path, open_to_all: str
) -> None:
    """Who may write into the data directory could have the token sent to a port of their own."""
    (tmp_path / "server.url").write_text(f"{NOBODY}\n")
    (tmp_path / open_to_all).chmod(0o777)
    done = await slm("agents", "list", data=tmp_path, SLM_TOKEN="slm_x")
    assert done.code == 1
    assert done.error.startswith(f"{tmp_path / open_to_all} can be written by another user")
    assert "--url" in done.error


async def test_a_key_is_not_sent_in_the_clear(tmp_path: Path) -> None:
    """An API key for a server that is neither TLS nor this machine is refused before it is sent."""
    (tmp_path / "key").write_text(CANARY)
    done = await slm(
        *("agents", "set", "x", "--api-key-file", str(tmp_path / "key")),
        *("--url", "http://slm.example:8760"),
        SLM_TOKEN="slm_x",
    )
    assert (done.code, "without TLS" in done.error) == (1, True)


@pytest.mark.parametrize(
    "words",
    [
        ("agents", "set", "x", "--api-key", CANARY),
        ("agents", "set", "x", f"--api-key={CANARY}"),
        ("agents", "set", "x", "--api-keys", CANARY),
        ("agents", "set", "x", "--api-key-file", f"no-such-{CANARY[:3]}"),
        ("agents", "set", "x", "--api-key-stdin", CANARY),
        ("agents", "set", "x", "--if-match", CANARY),
        ("agents", "set", "x", "--max-tokens", CANARY),
        ("agents", "create", "x", "--provider", "openai", CANARY),
        ("agents", "list", CANARY),
        ("agents", "list", "--url", f"http://user:{CANARY}@slm.example"),
    ],
)
async def test_a_key_in_the_wrong_place_is_not_repeated(words: tuple[str, ...]) -> None:
    """Whoever types a key as an argument gets an error that does not print it again."""
    done = await slm(*words, SLM_TOKEN="slm_x")
    assert done.code in (1, 2)
    assert done.error  # and `slm` has looked for the canary


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("agents", "frobnicate"), "No such command 'frobnicate'"),
        (("agents", "create", "x", "--provider", "openai"), "Missing option '--model'"),
        (("agents", "create", "x", "--provider", "no", "--model", "m"), "'no' is not one of"),
        (("agents", "list", "--colour"), "No such option: --colour"),
        (("agents", "show"), "name an agent, or say --default"),
        (("agents", "set", "x"), "nothing to set"),
        (("agents", "set", "x", "--option", "top_p"), "NAME=JSON"),
        (("agents", "set", "x", "--option", "top_p=abc"), "--option top_p must be a number"),
        (("agnets", "list"), "Did you mean 'agents'"),
        (("agents", "set", "x", "--model", "m", "--clear", "name"), "'name' is not one of"),
        (
            ("agents", "set", "x", "--endpoint", "http://x", "--clear", "endpoint"),
            "contradicts",
        ),
        (("agents", "set", "x", "--api-key-stdin", "--api-key-file", "f"), "exclude each other"),
        (("serve", "--port", "70000"), "'--port'"),
        (("db", "restore", "no-such-file", "--yes"), "does not exist"),
        (("ask", "default", " "), "the prompt is empty"),
    ],
)
async def test_usage_errors(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """A command that makes no sense ends with 2 and one line that says what is wrong with it."""
    done = await slm(*words, cwd=tmp_path, SLM_TOKEN="slm_x", SLM_URL=NOBODY)
    assert (done.code, done.out) == (2, "")
    assert said in done.error


@pytest.mark.parametrize("words", [(), ("agents",), ("db",)])
async def test_a_group_alone_shows_its_help(words: tuple[str, ...]) -> None:
    """`slm agents` and the like list their commands, and end with 2."""
    done = await slm(*words)
    assert (done.code, done.err) == (2, "")
    assert "Commands" in done.out or "The server" in done.out


@pytest.mark.parametrize(
    "words",
    [
        *((name,) for name in ("serve", "ask", "watch", "demo")),
        *(("agents", name) for name in ("list", "show", "create", "set", "delete")),
        *(("db", name) for name in ("upgrade", "backup", "restore")),
    ],
)
async def test_every_command_has_help(words: tuple[str, ...]) -> None:
    """--help says what a command does, within 80 columns, and which variables it reads."""
    done = await slm(*words, "--help", COLUMNS="80")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: slm {' '.join(words)}" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    if words[0] != "demo":
        assert "SLM_" in done.out


async def test_something_else_answers(tmp_path: Path) -> None:
    """A server that is no SLM is told as such, whatever it answers."""

    async def page(request: web.Request) -> web.Response:
        status = int(request.query.get("limit", "0")) or 200
        return web.Response(text="<html>hello</html>", content_type="text/html", status=status)

    async def elsewhere(_request: web.Request) -> web.Response:
        raise web.HTTPFound("http://127.0.0.1:9/")

    for handler in (page, elsewhere):
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            done = await slm("agents", "list", "--url", url, SLM_TOKEN="slm_x")
        finally:
            await runner.cleanup()
        assert done.code == 1
        assert "it is not an SLM" in done.error


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """`slm … | head` ends quietly when nobody reads on."""
    done = subprocess.run(
        f"{sys.executable} -m slm --help | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.stderr == ""


def test_an_unexpected_error_is_one_line_too(tmp_path: Path) -> None:
    """A bug of ours shows its kind, and on demand where it is; its text may hold anything."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import slm.cli.target as connection\n"
        "def broken(*_): raise ValueError('holds sk-canary')\n"
        "connection._find_url = broken\n"
    )
    process = subprocess.run(
        [sys.executable, "-m", "slm", "agents", "list"],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(hidden)),
        timeout=60,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: unexpected ValueError; SLM_TRACEBACK=1")
    assert "canary" not in process.stderr


def test_an_interrupt_while_the_command_still_loads(tmp_path: Path) -> None:
    """Ctrl-C in the first moment ends with 130 and says nothing, as it does later."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'slm.cli.commands.agents':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    process = subprocess.run(
        [sys.executable, "-m", "slm", "agents", "list"],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(hidden)),
        timeout=60,
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")
