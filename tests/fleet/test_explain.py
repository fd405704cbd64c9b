"""What each step of the chain said, asked of the client itself and over its stream."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from slm import SLMClient
from slm.protocol import Explanation
from tests.support.gateway import gateway
from tests.support.raw import Answer, Api
from tests.support.sdk import applied, fleet_of, sdk
from tests.support.servers import InLoopServer, eventually

CANARY = "sk-canary-explain"
KEYED = {"llm_provider": "openai", "llm_model": "gpt-6.1-sol", "llm_api_key": CANARY}
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "messages.json").read_text())


def steps(told: Explanation) -> dict[str, str]:
    """Return what each step said, and check that no key is anywhere in it."""
    assert CANARY not in told.model_dump_json()
    assert [step.step for step in told.steps] == ["agent", "default", "environment", "hardcoded"]
    answering = [step.step for step in told.steps if step.answers]
    assert answering == ([told.answered_by] if told.answered_by else [])
    return {step.step: step.said for step in told.steps}


async def test_each_step_says_why_it_was_passed_over(server: InLoopServer, admin: Api) -> None:
    """An agent's own config, an unknown agent and one that is switched off are told apart."""
    made = await admin.create("a", **KEYED)
    await admin.create("off", is_active=False)
    async with sdk(server.url, server.backend_token, "one") as client:
        await eventually(lambda: applied(admin, client.revision, "one"))
        own = await client.explain("a")
        assert own.answered_by == "agent"
        assert (own.status, own.error) == ("live", None)
        said = steps(own)
        assert said["agent"] == "the SLM's present config"
        assert own.steps[0].revision == made.revision
        assert own.steps[0].age_seconds == 0
        assert own.steps[0].key == (
            f"set at revision {made.revision}, came with the snapshot of all agents"
        )
        assert own.steps[1].agent_id == "default"
        unknown = await client.explain("nobody")
        assert unknown.answered_by == "default"
        assert (
            steps(unknown)["agent"] == "the SLM has no agent of this name that this token may see"
        )
        off = await client.explain("off")
        assert off.answered_by == "default"
        assert steps(off)["agent"] == "it is switched off"
        default = await client.explain("default")
        assert steps(default)["default"] == "it is the default agent itself"
        changed = await admin.put("a", llm_api_key="sk-canary-explain-2")
        await eventually(lambda: applied(admin, changed.revision, "one"))
        own = await client.explain("a")
        assert (
            own.steps[0].key == f"set at revision {changed.revision}, came by a request of its own"
        )


async def test_an_outage_is_explained(
    server: InLoopServer, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the SLM the steps say so, and the environment's answers name their variables."""
    monkeypatch.setenv("AUTOBOT_LLM_PROVIDER", "openai")
    monkeypatch.setenv("AUTOBOT_LLM_MODEL", "gpt-6.1-sol")
    monkeypatch.setenv("AUTOBOT_LLM_API_KEY", CANARY)
    client = SLMClient("http://127.0.0.1:1", token="t", start_timeout=0.1)
    async with client:
        told = await client.explain("a")
        assert told.answered_by == "environment"
        assert steps(told)["agent"].startswith(
            "nothing is known of it, and the SLM cannot be asked"
        )
        assert told.steps[2].key == "from AUTOBOT_LLM_API_KEY"


async def test_a_key_that_cannot_be_had_is_explained(server: InLoopServer, admin: Api) -> None:
    """Where resolving raises, the explanation holds the error and the step that stopped it."""
    async with gateway(server.url) as gate:
        gate.refuse = lambda path: 503 if path.endswith("/llm") else None
        async with sdk(gate.url, server.backend_token, "one", key_wait=0.05) as client:
            await eventually(lambda: applied(admin, client.revision, "one"))
            made = await admin.create("a", **KEYED)
            await eventually(lambda: client.revision >= made.revision)
            told = await client.explain("a")
            assert told.answered_by is None
            assert told.error is not None
            assert "has not come" in told.error
            assert steps(told)["agent"] == "its key has not come from the SLM yet"


async def test_a_backend_is_asked_over_its_stream(server: InLoopServer, admin: Api) -> None:
    """An operator asks a backend by its whole name and gets its own explanation."""
    await admin.create("a", **KEYED)
    async with sdk(server.url, server.backend_token, "billing") as client:
        await eventually(lambda: applied(admin, client.revision, "billing"))
        answer = await asked(admin, "a", "billing")
        assert answer.status == 200, answer.body
        told = Explanation.model_validate(answer.json)
        assert told == await client.explain("a")
        assert steps(told)["agent"] == "the SLM's present config"
        # The beginning of a name is nobody's: somebody else could come to be meant by it.
        for name in ("billing", "nobody"):
            missing = await admin.get(f"/api/explain?agent_id=a&backend={name}")
            assert (missing.status, missing.code) == (404, "backend-not-found")
            assert await whole_name(admin, "billing") in missing.json["detail"]


async def whole_name(api: Api, name: str) -> str:
    """Return what the fleet shows a backend as."""
    return str((await fleet_of(api))[name]["backend"])


async def asked(api: Api, agent_id: str, name: str) -> Answer:
    """Ask a backend how it resolves an agent."""
    return await api.get(
        f"/api/explain?agent_id={agent_id}&backend={quote(await whole_name(api, name))}"
    )


async def test_an_older_client_is_said_to_be_silent(
    admin: Api, backend: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not know the question goes on undisturbed; the operator is told."""
    monkeypatch.setattr("slm.server.fleet.explain.ANSWER_SECONDS", 0.1)
    async with backend.stream(client={"name": "old"}) as stream:
        await stream.frame()
        answer = await admin.get("/api/explain?agent_id=a&backend=old")
        assert (answer.status, answer.code) == (504, "backend-silent")
        question: dict[str, Any] = await stream.next()
        assert question.keys() == GOLDEN["server"]["explain"].keys()
        # Too late, and another's: neither disturbs the stream.
        await stream.send(**GOLDEN["client"]["explained"])
        await admin.create("a")
        assert (await stream.next())["type"] == "agent_created"


def report(**fields: Any) -> dict[str, Any]:
    """Return a report of the contract's shape but for these fields."""
    told: dict[str, Any] = copy.deepcopy(GOLDEN["client"]["explained"]["report"])
    return told | fields


UNCLEAR: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "a report of another shape": (
        lambda question: json.dumps({"explained": question, "report": report(steps=[{"step": 1}])}),
        "at report.steps.0.step",
    ),
    "no report": (lambda question: json.dumps({"explained": question}), "at report"),
    "a text that cannot be stored": (
        lambda question: json.dumps({"explained": question, "report": report(status="\0")}),
        "at report.status",
    ),
    "no question": (lambda _: json.dumps({"explained": 5, "report": report()}), "at explained"),
    "a number of many digits": (
        lambda question: f'{{"explained": "{question}", "report": {"9" * 5000}}}',
        "a number in a message is too long",
    ),
    "a list": (lambda question: json.dumps(["explained", question]), "not a JSON object"),
    "no JSON": (lambda question: question, "not JSON"),
    "bytes": (lambda question: question.encode(), "not text"),
    "too much": (
        lambda question: json.dumps({"explained": question, "report": report(x="x" * 70_000)}),
        "too big",
    ),
}


@pytest.mark.parametrize("what", UNCLEAR)
async def test_an_answer_that_cannot_be_read_is_told_at_once(
    admin: Api, backend: Api, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator hears what is wrong with it, and does not wait for another one."""
    monkeypatch.setattr("slm.server.fleet.explain.ANSWER_SECONDS", 600)
    answer, wrong = UNCLEAR[what]
    async with backend.stream(client={"name": "odd"}) as stream:
        await stream.frame()
        asking = asyncio.create_task(admin.get("/api/explain?agent_id=a&backend=odd"))
        said = answer((await stream.next())["id"])
        await (stream.ws.send_str(said) if isinstance(said, str) else stream.ws.send_bytes(said))
        told = await asyncio.wait_for(asking, 10)
        assert (told.status, told.code) == (502, "backend-unclear")
        assert told.json["detail"].startswith("The answer of odd cannot be read: ")
        assert wrong in told.json["detail"]


async def test_what_names_another_question_leaves_this_one_open(
    admin: Api, backend: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd late answer and an odd ack say nothing of the question that is open."""
    monkeypatch.setattr("slm.server.fleet.explain.ANSWER_SECONDS", 600)
    async with backend.stream(client={"name": "odd"}) as stream:
        await stream.frame()
        asking = asyncio.create_task(admin.get("/api/explain?agent_id=a&backend=odd"))
        question = (await stream.next())["id"]
        await stream.send(explained="another", report={})
        await stream.send(ack="odd")
        assert [(await stream.next())["type"] for _ in range(2)] == ["error", "error"]
        await stream.send(explained=question, report=report())
        assert (await asyncio.wait_for(asking, 10)).json == report()


async def test_a_backend_that_goes_away_is_not_waited_for(
    replicas: list[InLoopServer], apis: list[Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection ends while it is asked, by its own server or another: that is told at once."""
    monkeypatch.setattr("slm.server.fleet.explain.ANSWER_SECONDS", 600)
    token = replicas[0].backend_token
    for number, api in enumerate(apis[:2]):
        name = f"leaves{number}"
        async with Api(replicas[1], api.session, token).stream(client={"name": name}) as stream:
            await stream.send(ack=(await stream.frame())["revision"])
            await eventually(functools.partial(applied, api, 1, name))
            asking = asyncio.create_task(api.get(f"/api/explain?agent_id=a&backend={name}"))
            await stream.next()
        told = await asyncio.wait_for(asking, 10)
        assert (told.status, told.code) == (504, "backend-silent")
        assert told.json["detail"] == f"{name} closed its connection before it answered."


async def test_another_server_tells_what_is_wrong_with_an_answer(
    replicas: list[InLoopServer], apis: list[Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever server the operator asks, an answer that cannot be read ends the wait."""
    monkeypatch.setattr("slm.server.fleet.explain.ANSWER_SECONDS", 600)
    token = replicas[0].backend_token
    async with Api(replicas[1], apis[1].session, token).stream(client={"name": "odd"}) as stream:
        await stream.send(ack=(await stream.frame())["revision"])
        await eventually(lambda: applied(apis[0], 1, "odd"))
        asking = asyncio.create_task(apis[0].get("/api/explain?agent_id=a&backend=odd"))
        await stream.send(explained=(await stream.next())["id"], report=report(revision="x"))
        told = await asyncio.wait_for(asking, 10)
        assert (told.status, told.code) == (502, "backend-unclear")
        assert "at report.revision" in told.json["detail"]


async def test_a_backend_of_another_replica_is_asked_too(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """Whichever server the operator asks, the one that holds the stream passes the question on."""
    async with sdk(replicas[1].url, replicas[0].backend_token, "there") as client:
        await eventually(lambda: applied(apis[0], client.revision, "there"))
        answer = await asked(apis[0], "default", "there")
        assert answer.status == 200, answer.body
        assert Explanation.model_validate(answer.json) == await client.explain("default")


async def test_a_long_explanation_crosses_replicas(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """A report of several times what one notification takes arrives whole, letter by letter."""
    told = report()
    for step in told["steps"][:2]:
        step["said"] = "ü" * 4096
    token = replicas[0].backend_token
    async with Api(replicas[1], apis[1].session, token).stream(client={"name": "there"}) as stream:
        await stream.send(ack=(await stream.frame())["revision"])
        await eventually(lambda: applied(apis[0], 1, "there"))
        for _ in range(2):
            asking = asyncio.create_task(apis[0].get("/api/explain?agent_id=a&backend=there"))
            await stream.send(explained=(await stream.next())["id"], report=told)
            answer = await asking
            assert answer.status == 200, answer.body
            assert answer.json == told
