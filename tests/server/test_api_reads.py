"""GET over HTTP: the list and its filters, one agent, keyed reads, and what every answer says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "messages.json").read_text())["http"]


async def test_a_new_server_lists_its_default_agent(admin: Api) -> None:
    """The first migration seeds the default agent, and the list names revision and epoch."""
    answer = await admin.get("/api/agents")
    assert answer.status == 200
    body = answer.json
    assert body.keys() == {"agents", "total", "revision", "epoch"}
    assert body["total"] == 1
    assert answer.revision == body["revision"]
    assert answer.headers["SLM-Epoch"] == body["epoch"]
    [agent] = body["agents"]
    assert agent.keys() == GOLDEN["agent"].keys()
    assert (agent["agent_id"], agent["llm_model"]) == ("default", "mistral:7b-instruct")
    assert agent["is_default"]


async def test_the_filters_narrow_the_list(admin: Api) -> None:
    """agent_id, search, provider and is_active each narrow it; total counts before the limit."""
    await admin.create("alpha", name="Classifier", llm_provider="openai")
    await admin.create("beta", description="a CLASSifier of mails", is_active=False)
    await admin.create("gamma", llm_provider="openai")

    async def ids(query: str) -> list[str]:
        return [
            agent["agent_id"] for agent in (await admin.get(f"/api/agents?{query}")).json["agents"]
        ]

    assert await ids("") == ["default", "alpha", "beta", "gamma"]
    assert await ids("agent_id=alpha") == ["alpha"]
    assert await ids("agent_id=alph") == []
    assert await ids("search=classifier") == ["alpha", "beta"]
    assert await ids("provider=openai") == ["alpha", "gamma"]
    assert await ids("is_active=false") == ["beta"]
    assert await ids("provider=openai&is_active=true&search=GAM") == ["gamma"]
    page = (await admin.get("/api/agents?limit=2&offset=1")).json
    assert [agent["agent_id"] for agent in page["agents"]] == ["alpha", "beta"]
    assert page["total"] == 4
    assert await ids("offset=9") == []


async def test_default_is_an_alias_in_one_place_only(admin: Api) -> None:
    """/default is the default agent; /default/llm, PUT and DELETE mean the agent_id default."""
    await admin.create("new", is_default=True, llm_model="theirs")
    assert (await admin.get("/api/agents/default")).json["agent_id"] == "new"
    assert (await admin.get("/api/agents/default/llm")).json["agent_id"] == "default"
    assert (await admin.put("default", llm_model="mine")).json["agent_id"] == "default"
    assert (await admin.delete("default")).status == 204
    assert (await admin.get("/api/agents/default")).json["agent_id"] == "new"
    assert (await admin.get("/api/agents/default/llm")).code == "agent-not-found"


async def test_an_unchanged_agent_is_not_sent_again(admin: Api) -> None:
    """The ETag is the epoch and the agent's revision; If-None-Match with it answers 304."""
    etag = (await admin.create("a")).headers["ETag"]
    answer = await admin.get("/api/agents/a")
    epoch = answer.headers["SLM-Epoch"]
    assert answer.headers["ETag"] == etag == f'"{epoch}-{answer.json["revision"]}"'
    for same in (etag, f"W/{etag}", f'"0", {etag}', "*"):
        unchanged = await admin.get("/api/agents/a", headers={"If-None-Match": same})
        assert (unchanged.status, unchanged.body) == (304, b"")
        assert unchanged.headers["ETag"] == etag
        assert unchanged.revision == answer.revision
    await admin.put("a", llm_model="other")
    assert (await admin.get("/api/agents/a", headers={"If-None-Match": etag})).status == 200
    whole = await admin.get("/api/agents")
    tag = {"If-None-Match": whole.headers["ETag"]}
    assert (await admin.get("/api/agents", headers=tag)).status == 304
    await admin.delete("a")
    assert (await admin.get("/api/agents", headers=tag)).status == 200


async def test_every_answer_names_revision_and_epoch(admin: Api, anonymous: Api) -> None:
    """Errors name them too: an unknown path, a wrong method, no token, a refused body."""
    epoch = (await admin.get("/api/agents")).headers["SLM-Epoch"]
    answers = [
        await admin.get("/api/agents/nobody"),
        await admin.get("/nowhere"),
        await admin.get("/api/agents/nobody/llm"),
        await admin.call("PATCH", "/api/agents"),
        await admin.put("default", no_such_field=1),
        await anonymous.get("/api/agents"),
        await anonymous.get("/healthz"),
        await admin.get("/api/snapshot"),
    ]
    assert [answer.status for answer in answers] == [404, 404, 404, 405, 422, 401, 200, 200]
    for answer in answers:
        assert answer.revision == 1
        assert answer.headers["SLM-Epoch"] == epoch
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Server" not in answer.headers


async def test_a_wrong_method_names_the_right_ones(admin: Api) -> None:
    """405 comes with Allow, all methods of the path in it; HEAD is answered like GET."""
    answer = await admin.call("PATCH", "/api/agents/default")
    assert answer.code == "method-not-allowed"
    assert answer.headers["Allow"] == "DELETE, GET, PUT"
    head = await admin.call("HEAD", "/api/agents/default")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["Content-Length"]) > 100


async def test_min_revision_waits_or_says_behind(admin: Api) -> None:
    """A revision that is there is answered at once; one that does not come is 503 `behind`."""
    revision = (await admin.create("a")).revision
    assert (await admin.get(f"/api/agents/a?min_revision={revision}")).status == 200
    for path in ("/api/agents", "/api/agents/a", "/api/agents/a/llm", "/api/snapshot"):
        answer = await admin.get(f"{path}?min_revision={revision + 1}")
        assert (answer.status, answer.code) == (503, "behind")
        assert int(answer.headers["Retry-After"]) >= 1


async def test_a_waiting_read_is_answered_by_the_write_it_waits_for(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """A read that asks for the next revision is answered as soon as somebody writes it."""
    async with running_server(tmp_path, min_revision_wait_seconds=60) as server:
        admin = Api(server, session, server.admin_token, key_token=server.backend_token)
        waiting = asyncio.create_task(admin.get("/api/agents/default?min_revision=2"))
        await admin.get("/healthz")
        await admin.put("default", llm_model="new")
        answer = await waiting
    assert (answer.status, answer.json["llm_model"]) == (200, "new")


async def test_the_key_is_in_the_keyed_answers_alone(admin: Api, backend: Api) -> None:
    """/llm and /snapshot hold the key and are not to be stored; no other answer holds it."""
    canary = "sk-canary-reads"
    created = await admin.create("a", llm_provider="openai", llm_api_key=canary)
    assert created.json["has_api_key"]
    assert created.json["api_key_revision"] == created.revision
    llm = await backend.get("/api/agents/a/llm")
    assert llm.json == {
        "agent_id": "a",
        "llm_provider": "openai",
        "llm_endpoint": None,
        "llm_model": "m",
        "llm_timeout": 30,
        "llm_temperature": None,
        "llm_max_tokens": None,
        "llm_options": {},
        "is_default": False,
        "is_active": True,
        "revision": created.revision,
        "has_api_key": True,
        "api_key_revision": created.revision,
        "llm_api_key": canary,
    }
    assert llm.headers["Cache-Control"] == "no-store"
    snapshot = await backend.get("/api/snapshot")
    assert snapshot.headers["Cache-Control"] == "no-store"
    assert snapshot.json["revision"] == snapshot.revision == created.revision
    assert {a["agent_id"]: a["llm_api_key"] for a in snapshot.json["agents"]} == {
        "default": None,
        "a": canary,
    }
    for path in ("/api/agents", "/api/agents/a", "/metrics", "/readyz"):
        assert canary not in (await admin.get(path)).body.decode()
    assert canary not in created.body.decode()


async def test_an_inactive_agent_has_no_llm(admin: Api) -> None:
    """/llm of an inactive agent is 404 `agent-inactive`, so that clients go on to the default."""
    await admin.create("a", is_active=False)
    answer = await admin.get("/api/agents/a/llm")
    assert (answer.status, answer.code) == (404, "agent-inactive")
    assert (await admin.get("/api/agents/a")).status == 200


@pytest.mark.parametrize(
    "path", ["%00", "a%00b", "%FF%FE", "..%2F..", "%E2%80%AE", "a" * 500, "A'--", "%F0%9F%98%80"]
)
async def test_a_strange_agent_id_is_not_found(admin: Api, path: str) -> None:
    """Whatever stands in the path, an agent that is not there is 404 on every route."""
    for method, suffix in (("GET", ""), ("GET", "/llm"), ("DELETE", ""), ("PUT", "")):
        url = URL(f"{admin.server.url}/api/agents/{path}{suffix}", encoded=True)
        body: dict[str, str] | None = {} if method == "PUT" else None
        headers = admin.auth(suffix)
        async with admin.session.request(method, url, headers=headers, json=body) as answer:
            assert answer.status == 404, (method, suffix)
            assert answer.content_type == "application/problem+json"


async def test_plain_reads_go_on_when_the_database_is_away(
    admin: Api, server: InLoopServer
) -> None:
    """The catalog answers, marked stale; keyed reads and writes are 503; and it recovers."""
    await admin.create("a", llm_api_key="sk-canary-away", llm_provider="openai")
    services = server.running.services
    await services.database.close()
    await eventually(lambda: not services.feed.current)

    answer = await admin.get("/api/agents/a")
    assert (answer.status, answer.headers["SLM-Stale"]) == (200, "true")
    assert (await admin.get("/api/agents")).headers["SLM-Stale"] == "true"
    for keyed in ("/api/agents/a/llm", "/api/snapshot"):
        refused = await admin.get(keyed)
        assert (refused.status, refused.code) == (503, "database-unavailable")
        assert "Retry-After" in refused.headers
    assert (await admin.put("a", llm_model="new")).code == "database-unavailable"
    ready = await admin.get("/readyz")
    assert (ready.status, ready.json["ready"]) == (503, False)
    assert (await admin.get("/healthz")).status == 200

    await services.database.open()
    await eventually(lambda: services.feed.current)
    assert "SLM-Stale" not in (await admin.get("/api/agents/a")).headers
    assert (await admin.put("a", llm_model="new")).status == 200
    assert (await admin.get("/readyz")).status == 200
