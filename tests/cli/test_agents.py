"""`slm agents`: what an operator sees and what a script can read."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.command import CANARY, slm, slm_at_a_terminal
from tests.support.servers import InLoopServer

CREATE = ("agents", "create", "code-assistant", "--provider", "openai", "--model", "gpt-6.1-sol")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(f"{CANARY}\n")
    return file


async def test_list_for_people_and_for_scripts(server: InLoopServer) -> None:
    """The list is a table with a header, or with --json the server's own answer."""
    shown = await slm("agents", "list", data=server.data_dir)
    assert shown.code == 0
    header, row = shown.out.splitlines()
    assert header.split() == ["AGENT", "PROVIDER", "MODEL", "ENDPOINT", "TEMP", "MAX", "KEY", "REV"]
    assert row.split()[:3] == ["default", "ollama", "mistral:7b-instruct"]

    listed = (await slm("agents", "list", "--json", data=server.data_dir)).json
    assert [agent["agent_id"] for agent in listed["agents"]] == ["default"]
    assert listed.keys() == {"agents", "total", "revision", "epoch"}


async def test_the_list_is_filtered_by_the_server(server: InLoopServer) -> None:
    """--search, --provider and --inactive leave only what they name."""
    assert (await slm(*CREATE, "--inactive", data=server.data_dir)).code == 0
    for filters, found in (
        (("--search", "assist"), ["code-assistant"]),
        (("--provider", "ollama"), ["default"]),
        (("--inactive",), ["code-assistant"]),
        (("--active",), ["default"]),
        (("--search", "nothing-like-it"), []),
    ):
        listed = (await slm("agents", "list", "--json", *filters, data=server.data_dir)).json
        assert [agent["agent_id"] for agent in listed["agents"]] == found, filters


async def test_a_pipe_gets_whole_lines_without_colours(server: InLoopServer) -> None:
    """However long a value is, in a pipe it stands on its agent's line, with no escape codes."""
    endpoint = f"https://vllm.example.com/{'x' * 200}"
    await slm(*CREATE, "--endpoint", endpoint, data=server.data_dir, COLUMNS="40")
    shown = await slm("agents", "list", data=server.data_dir, COLUMNS="40")
    assert endpoint in shown.out
    assert "\x1b" not in shown.out + shown.err
    assert len(shown.out.splitlines()) == 3


async def test_create_show_and_set(server: InLoopServer, key_file: Path) -> None:
    """A key given by file is set and never shown; a change is told as old → new."""
    made = await slm(*CREATE, "--api-key-file", str(key_file), data=server.data_dir)
    assert (made.code, made.err) == (0, "")
    assert "code-assistant created at revision 2: openai/gpt-6.1-sol" in made.out

    shown = await slm("agents", "show", "code-assistant", data=server.data_dir)
    lines = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    assert lines["model"] == "gpt-6.1-sol"
    assert lines["endpoint"] == "https://api.openai.com/v1 (the provider's own)"
    assert "has an API key (set at revision 2)" in shown.out

    changed = await slm(
        *("agents", "set", "code-assistant", "--model", "gpt-6.1-terra", "--temperature", "0.2"),
        data=server.data_dir,
    )
    assert changed.out.splitlines() == [
        "code-assistant is at revision 3 (was 2)",
        "  model        gpt-6.1-sol → gpt-6.1-terra",
        "  temperature  – → 0.2",
    ]
    again = await slm(
        "agents", "set", "code-assistant", "--model", "gpt-6.1-terra", data=server.data_dir
    )
    assert again.out == "code-assistant was so already; it stays at revision 3\n"


async def test_set_json_tells_what_changed(server: InLoopServer) -> None:
    """With --json the answer is the agent, with what changed and whether its key was cleared."""
    await slm(*CREATE, "--api-key-stdin", stdin=CANARY, data=server.data_dir)
    done = await slm(
        *("agents", "set", "code-assistant", "--temperature", "1", "--json"), data=server.data_dir
    )
    assert done.json["llm_temperature"] == 1
    assert done.json["revision"] == 3
    assert done.json["changed"] == {"llm_temperature": [None, 1.0]}
    assert done.json["api_key_cleared"] is False


async def test_a_cleared_key_is_told(server: InLoopServer, key_file: Path) -> None:
    """A new provider without a key clears the stored one: a warning, and in the JSON a field."""
    await slm(*CREATE, "--api-key-file", str(key_file), data=server.data_dir)
    done = await slm(
        *("agents", "set", "code-assistant", "--provider", "anthropic"), data=server.data_dir
    )
    assert done.code == 0
    assert "  api key   set → cleared" in done.out
    assert "warning: the stored API key was cleared" in done.err
    assert "slm agents set code-assistant --api-key" in done.err

    await slm(
        *("agents", "set", "code-assistant", "--api-key-file", str(key_file)), data=server.data_dir
    )
    done = await slm(
        *("agents", "set", "code-assistant", "--provider", "openai", "--json"),
        data=server.data_dir,
    )
    assert done.json["api_key_cleared"] is True
    assert done.json["has_api_key"] is False


async def test_the_key_at_a_prompt_is_hidden(server: InLoopServer) -> None:
    """--api-key asks at the terminal and echoes nothing; what was typed is what is stored."""
    done = await asyncio.to_thread(
        slm_at_a_terminal,
        *(*CREATE, "--api-key"),
        data=server.data_dir,
        answers={"API key: ": CANARY},
    )
    assert done.code == 0
    assert "has an API key" in done.out
    stored = await server.running.services.reads.llm("code-assistant")
    key = stored[0].llm_api_key
    assert key is not None
    assert key.get_secret_value() == CANARY


async def test_an_option_that_takes_precedence_over_a_field_is_told(server: InLoopServer) -> None:
    """`--option temperature=1` works, and stderr says that --temperature no longer counts."""
    for command in (CREATE, ("agents", "set", "code-assistant")):
        done = await slm(*command, "--option", "temperature=1", data=server.data_dir)
        assert done.code == 0, done.err
        assert "takes precedence over --temperature" in done.err
    quiet = await slm("agents", "set", "code-assistant", "--option", "n=2", data=server.data_dir)
    assert "precedence" not in quiet.err


async def test_an_agent_id_that_cannot_be_one_says_what_can(server: InLoopServer) -> None:
    """The error names the characters that are allowed, not a pattern."""
    create = ("agents", "create", "Billing Bot", "--provider", "openai", "--model", "m")
    done = await slm(*create, data=server.data_dir)
    assert done.code == 1
    assert "lower-case letters, digits" in done.error
    assert "^" not in done.error


async def test_options_are_merged_and_removed(server: InLoopServer) -> None:
    """--option puts one into what is there, JSON or text; NAME= takes it out again."""
    await slm(*CREATE, "--option", "top_p=0.9", "--option", 'stop=["x"]', data=server.data_dir)
    change = ("agents", "set", "code-assistant", "--json")
    done = await slm(
        *(*change, "--option", "stop=", "--option", "seed=7", "--option", "mode=fast"),
        data=server.data_dir,
    )
    assert done.json["llm_options"] == {"top_p": 0.9, "seed": 7, "mode": "fast"}


async def test_clear_sets_to_nothing(server: InLoopServer, key_file: Path) -> None:
    """--clear takes away endpoint, most tokens, description and key."""
    await slm(
        *(*CREATE, "--endpoint", "http://127.0.0.1:1/v1", "--max-tokens", "5"),
        *("--description", "helps", "--api-key-file", str(key_file)),
        data=server.data_dir,
    )
    fields = ("endpoint", "max-tokens", "description", "api-key")
    clears = [word for field in fields for word in ("--clear", field)]
    done = await slm("agents", "set", "code-assistant", "--json", *clears, data=server.data_dir)
    agent = done.json
    assert agent["llm_endpoint"] is agent["llm_max_tokens"] is agent["description"] is None
    assert agent["has_api_key"] is False


async def test_if_match_refuses_a_change_of_something_else(server: InLoopServer) -> None:
    """With --if-match a change of an agent that moved on fails and changes nothing."""
    await slm(*CREATE, data=server.data_dir)
    await slm("agents", "set", "code-assistant", "--model", "a", data=server.data_dir)
    late = await slm(
        *("agents", "set", "code-assistant", "--model", "b", "--if-match", "2"),
        data=server.data_dir,
    )
    assert late.code == 1
    assert late.error.startswith("nothing was changed")
    shown = await slm("agents", "show", "code-assistant", "--json", data=server.data_dir)
    assert shown.json["llm_model"] == "a"


async def test_ten_at_once_all_take_effect(server: InLoopServer) -> None:
    """Two operators who set different fields at the same moment both get their way."""
    await slm(*CREATE, data=server.data_dir)
    done = await asyncio.gather(
        *(
            slm("agents", "set", "code-assistant", "--option", f"o{n}={n}", data=server.data_dir)
            for n in range(4)
        )
    )
    assert [each.code for each in done] == [0] * 4, [each.err for each in done]
    shown = await slm("agents", "show", "code-assistant", "--json", data=server.data_dir)
    assert shown.json["llm_options"] == {f"o{n}": n for n in range(4)}


async def test_the_default_agent_and_the_agent_named_default(server: InLoopServer) -> None:
    """`show default` is the agent of that id; `show --default` whichever is the default now."""
    await slm(*CREATE, "--default", data=server.data_dir)
    named = await slm("agents", "show", "default", "--json", data=server.data_dir)
    current = await slm("agents", "show", "--default", "--json", data=server.data_dir)
    assert named.json["agent_id"] == "default"
    assert named.json["is_default"] is False
    assert current.json["agent_id"] == "code-assistant"


async def test_delete(server: InLoopServer) -> None:
    """Delete asks at a terminal, wants --yes without one, and refuses the default agent."""
    await slm(*CREATE, data=server.data_dir)
    unasked = await slm("agents", "delete", "code-assistant", data=server.data_dir)
    assert (unasked.code, "--yes" in unasked.error) == (2, True)
    refused = await asyncio.to_thread(
        slm_at_a_terminal,
        *("agents", "delete", "code-assistant"),
        data=server.data_dir,
        answers={"[y/N]": "n"},
    )
    assert refused.code == 130
    shown = await slm("agents", "show", "code-assistant", data=server.data_dir)
    assert shown.code == 0
    done = await slm("agents", "delete", "code-assistant", "--yes", "--json", data=server.data_dir)
    assert done.json == {"agent_id": "code-assistant", "deleted": True, "revision": 3}
    gone = await slm("agents", "show", "code-assistant", data=server.data_dir)
    assert (gone.code, "no agent 'code-assistant'" in gone.error) == (1, True)
    default = await slm("agents", "delete", "default", "--yes", data=server.data_dir)
    assert default.code == 1


async def test_what_the_server_refuses_is_told_by_field(server: InLoopServer) -> None:
    """A value that breaks a rule names its field and the rule, not the value."""
    done = await slm(*CREATE, "--temperature", "7.25", "--timeout", "0", data=server.data_dir)
    assert done.code == 1
    assert "llm_temperature: " in done.error
    assert "llm_timeout: " in done.error
    assert "7.25" not in done.error


async def test_the_key_is_nowhere_on_the_machine_but_its_ciphertext(
    server: InLoopServer, key_file: Path
) -> None:
    """After create, set and show with a key, no file of the data directory holds it."""
    await slm(*CREATE, "--api-key-file", str(key_file), data=server.data_dir)
    await slm("agents", "set", "code-assistant", "--model", "other", data=server.data_dir)
    files = [path for path in server.data_dir.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in str(os.environ)


async def test_a_temperature_can_be_taken_back(server: InLoopServer) -> None:
    """`--temperature none` and `--clear temperature` set none; the list shows a dash."""
    made = await slm(*CREATE, "--temperature", "none", "--json", data=server.data_dir)
    assert made.json["llm_temperature"] is None
    for back in (("--clear", "temperature"), ("--temperature", "NONE")):
        await slm("agents", "set", "code-assistant", "--temperature", "0.5", data=server.data_dir)
        done = await slm("agents", "set", "code-assistant", *back, data=server.data_dir)
        assert done.out.splitlines()[1:] == ["  temperature  0.5 → –"]
    listed = await slm("agents", "list", data=server.data_dir)
    assert listed.out.splitlines()[-1].split()[4] == "–"
    for wrong in ("warm", "nan", "inf", ""):
        done = await slm(
            "agents", "set", "code-assistant", "--temperature", wrong, data=server.data_dir
        )
        assert (done.code, "--temperature is a number" in done.error) == (2, True)
    both = ("--temperature", "1", "--clear", "temperature")
    done = await slm("agents", "set", "code-assistant", *both, data=server.data_dir)
    assert done.error.startswith("--clear temperature contradicts --temperature")
