"""What others wrote is shown by every command, and steers nobody's terminal."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.command import slm, slm_at_a_terminal
from tests.support.http import admin, agent
from tests.support.servers import eventually, running_server

STEERING = ("\x1b]52;c;ZXZpbA==\x07", "\x1b[2J", "\x9b31m", "\x7f", "\u202e")
HOSTILE = "".join(STEERING) + "\n  applied by 9 of 9 backends[/]"
COMMANDS = (
    ("fleet",),
    ("fleet", "--json"),
    ("agents", "show", "a"),
    ("agents", "set", "a", "--model", "n2", "--wait"),
    ("changes",),
    ("explain", "a", "--on", "\x1b"),
    ("audit", "list"),
)


async def test_what_others_wrote_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Names of backends, reasons, comments, descriptions: their control characters are shown."""
    async with running_server(tmp_path / "data") as server, admin(server) as ask:
        (server.data_dir / "server.url").write_text(f"{server.url}\n")
        body = agent("a", description=HOSTILE, comment=HOSTILE, llm_api_key="sk-a")
        assert (await ask("POST", "/api/agents", body)).status == 201
        who = {"name": HOSTILE, "instance": HOSTILE, "version": HOSTILE[:60], "host": HOSTILE}
        async with ask.as_(server.backend_token).stream(client=who) as stream:
            refused = {"a": {"revision": 10**6, "reason": HOSTILE}}
            await stream.socket.send_json({"ack": 10**6, "not_in_force": refused})

            async def acked() -> bool:
                backends = (await ask("GET", "/api/fleet")).body["backends"]
                return bool(backends[0]["not_in_force"])

            await eventually(acked)
            at_terminals = [
                await asyncio.to_thread(
                    slm_at_a_terminal, *command, data=server.data_dir, answers={}
                )
                for command in COMMANDS
            ]
            piped = await slm("fleet", "--json", data=server.data_dir)
    for done in at_terminals:
        for text in STEERING:
            assert text not in done.out, done.out
        # A reason of several lines is no further line of ours.
        assert not [x for x in done.out.splitlines() if x.startswith("  applied by 9")], done.out
    assert "\\u001b]52;" in at_terminals[2].out, "it is shown"
    assert "\x1b" not in piped.out
    assert piped.json["backends"][0]["not_in_force"]["a"]["reason"] == HOSTILE, (
        "the same to a script"
    )
