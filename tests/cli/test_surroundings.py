"""What a shell, an editor or an orchestrator puts around the command: charsets, quotes, marks."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from slm.cli import output
from tests.support.command import CANARY, environment, slm
from tests.support.http import admin, agent
from tests.support.servers import InLoopServer
from tests.support.ways import forward_proxy

BOM = b"\xef\xbb\xbf"
NAME = "Support \U0001f916 café → –"
COMMANDS = {
    ("agents", "list"): 0,
    ("agents", "set", "a", "--comment", "ä → ö", "--name", "Ä – \u6a21"): 0,
    ("changes",): 0,
    ("agents", "set", "--help"): 0,
    ("agents", "show", "nobody – here"): 1,
}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
async def test_no_charset_ends_a_command(server: InLoopServer, encoding: str) -> None:
    """Where stdout lacks a character it is written as an escape; JSON stays the same value."""
    async with admin(server) as ask:
        assert (await ask("POST", "/api/agents", agent("a", name=NAME))).status == 201
    there = {"PYTHONIOENCODING": encoding}
    listed = await slm("agents", "list", "--json", data=server.data_dir, env=there)
    assert [each["name"] for each in listed.json["agents"]] == ["Default Agent", NAME]
    for command, code in COMMANDS.items():
        done = await slm(*command, data=server.data_dir, env=there)
        assert done.code == code, command


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "koi8-r", "gb2312", "utf-8"])
def test_what_a_charset_lacks_is_written_out(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Dashes and arrows become plain ones, anything else an escape; JSON keeps its value."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding, write_through=True))
    output.take_any_text()
    for text in (NAME, "“x” …"):
        output.say(text)
        output.out().print(output.escape(text))
        output.print_json({"text": text}, lines=True)
    lines = raw.getvalue().decode(encoding).splitlines()
    assert [json.loads(lines[n])["text"] for n in (2, 5)] == [NAME, "“x” …"]
    if encoding == "ascii":
        assert lines[0] == lines[1] == r"Support \ud83e\udd16 caf\u00e9 -> -"
        assert lines[3] == lines[4] == '"x" ...'


async def test_the_posix_locale_ends_no_command(server: InLoopServer) -> None:
    """A service unit without a locale, with Python's own way out of it switched off."""
    posix = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "slm", "agents", "list"),
        stdout=PIPE,
        stderr=PIPE,
        env=environment(server.data_dir, posix),
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err
    assert out.isascii()
    assert b"default" in out


async def test_files_and_input_may_begin_with_a_mark(server: InLoopServer, tmp_path: Path) -> None:
    """A token or a key that a Windows editor saved is read without the mark, also in UTF-16."""
    token, key = tmp_path / "token.txt", tmp_path / "key.txt"
    for content in (
        BOM + server.admin_token.encode() + b"\r\n",
        f"\ufeff{server.admin_token}\r\n".encode("utf-16-le"),
        f'"{server.admin_token}"\n'.encode(),
    ):
        token.write_bytes(content)
        listed = await slm(
            "agents", "list", "--token-file", str(token), data=server.data_dir, SLM_URL=server.url
        )
        assert (listed.code, "default" in listed.out) == (0, True)
    key.write_bytes(BOM + CANARY.encode() + b"\r\n")
    await slm("agents", "create", "a", "--provider", "openai", "--model", "m", data=server.data_dir)
    for given in (("--api-key-file", str(key)), ("--api-key-stdin",)):
        done = await slm(
            *("agents", "set", "a", *given),
            data=server.data_dir,
            stdin=None if len(given) == 2 else f"\ufeff'{CANARY}'\r\n",
        )
        assert done.code == 0, done.err
    async with admin(server) as ask:
        assert (await ask("GET", "/api/agents/a/llm")).body["llm_api_key"] == CANARY


async def test_variables_may_stand_in_quotes(server: InLoopServer, tmp_path: Path) -> None:
    """`docker run --env-file` and unit files hand quotes and blanks over as they stand."""
    token = tmp_path / "a token"
    token.write_text(server.admin_token)
    for env in (
        {"SLM_URL": f'"{server.url}/"', "SLM_TOKEN": f" '{server.admin_token}' "},
        {"SLM_URL": f" {server.url}\r", "SLM_TOKEN_FILE": f'"{token}"'},
        {"SLM_DATA_DIR": f'"{server.data_dir}"', "SLM_TOKEN": "", "SLM_URL": '""'},
        {"SLM_DATA_DIR": str(server.data_dir), "SLM_URL": "tcp://10.0.0.7:8760"},
    ):
        done = await slm("agents", "list", "--json", env=env, cwd=tmp_path)
        assert done.code == 0, done.err
        assert json.loads(done.out)["total"] == 1


async def test_more_than_a_token_is_refused_in_a_sentence(server: InLoopServer) -> None:
    """A token with something beside it is named by its place, and not shown."""
    for token in (f"Bearer {CANARY}", f"{CANARY}\n{CANARY}", f"{CANARY}é"):
        done = await slm("agents", "list", env={"SLM_URL": server.url, "SLM_TOKEN": token})
        assert done.code == 1
        assert done.error.startswith("SLM_TOKEN holds more than a token")


@pytest.mark.parametrize("end", ["/api", "/api/", "/api/agents", "/ws"])
async def test_the_address_is_that_of_the_server_alone(server: InLoopServer, end: str) -> None:
    """SLM_URL=http://host/api: the sentence says what to leave out, rather than a bare 404."""
    for given, source in (({"SLM_URL": server.url + end}, "SLM_URL"), ({}, "--url")):
        url = () if given else ("--url", server.url + end)
        done = await slm("agents", "list", *url, env=given | {"SLM_TOKEN": "slm_x"})
        assert done.code == 1
        assert done.error.startswith(f"{source} ends with {end.rstrip('/')}")
        assert done.error.endswith(server.url)


async def test_a_key_over_plain_http_is_a_decision() -> None:
    """A key goes to another machine without TLS only where SLM_ALLOW_INSECURE says so."""
    command = ("agents", "set", "a", "--api-key-stdin")
    env = {"SLM_URL": "http://slm.invalid:8760", "SLM_TOKEN": "slm_x"}
    refused = await slm(*command, stdin=CANARY, env=env)
    assert refused.code == 1
    assert "SLM_ALLOW_INSECURE=1" in refused.error
    tried = await slm(*command, stdin=CANARY, env=env | {"SLM_ALLOW_INSECURE": "1"})
    assert tried.code == 1
    assert tried.error.startswith("no SLM at http://slm.invalid:8760")


async def test_of_several_addresses_the_first_that_listens_is_used(server: InLoopServer) -> None:
    """One SLM_URL serves backends and operators, whichever replica is there."""
    there = {"SLM_URL": f'"http://127.0.0.1:9, {server.url}"'}
    token = str(server.data_dir / "admin.token")
    done = await slm("agents", "list", "--token-file", token, env=there)
    assert (done.code, server.url in done.err + done.out) == (0, True), done.err
    done = await slm("agents", "list", "--url", "http://127.0.0.1:9,canary", "--token-file", token)
    assert done.code == 1
    assert "canary" not in done.err


async def test_commands_go_through_the_named_proxy(server: InLoopServer) -> None:
    """SLM_PROXY counts for the command line, too; its password is in no error."""
    token = str(server.data_dir / "admin.token")
    async with forward_proxy(wants="user:canary") as proxy:
        there = {"SLM_URL": server.url, "SLM_PROXY": proxy.url.replace("://", "://user:canary@")}
        done = await slm("agents", "list", "--token-file", token, env=there)
        assert done.code == 0, done.err
        assert proxy.asked
    done = await slm("agents", "list", "--token-file", token, env=there)
    assert done.code == 1
    assert "the proxy 127.0.0.1" in done.err
    assert "canary" not in done.err + done.out
