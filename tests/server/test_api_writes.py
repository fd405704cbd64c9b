"""POST, PUT and DELETE over HTTP, and that whoever wrote reads what it wrote."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest

from slm.server import failpoints
from tests.support.raw import Api
from tests.support.servers import running_server


async def test_a_created_agent_is_there_at_once(admin: Api, backend: Api) -> None:
    """201 with its Location; every read after the answer, by anyone, has it."""
    answer = await admin.create("a", llm_options={"top_p": 0.9})
    assert answer.status == 201
    assert answer.headers["Location"] == "/api/agents/a"
    assert answer.json["revision"] == answer.revision == 2
    for time in (answer.json["created_at"], answer.json["updated_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", time)
    assert (await backend.get(answer.headers["Location"])).json == answer.json
    assert (await admin.create("a")).code == "agent-exists"


async def test_fields_not_sent_stay_and_null_clears(admin: Api) -> None:
    """PUT changes what is sent; null clears a nullable field and is refused for another."""
    await admin.create("a", description="text", llm_max_tokens=5)
    changed = await admin.put("a", llm_model="other")
    assert changed.json["description"] == "text"
    cleared = await admin.put("a", description=None, llm_max_tokens=None)
    assert (cleared.json["description"], cleared.json["llm_max_tokens"]) == (None, None)
    refused = await admin.put("a", name=None)
    assert (refused.status, refused.code) == (422, "invalid-request")
    assert refused.json["errors"][0]["loc"] == ["body", "name"]
    other = await admin.put("a", agent_id="b")
    assert (other.status, other.json["errors"][0]["loc"]) == (422, ["body", "agent_id"])
    assert (await admin.put("a", agent_id="a")).status == 200


@pytest.mark.parametrize(
    "name", ["Équipe 👩\u200d💻", "コード\u3000補助", "می\u200cخواهم", "a\u00a0b", "x" * 128]
)
async def test_a_name_may_be_in_any_script(admin: Api, name: str) -> None:
    """Joiners, wide and unbreakable spaces are no control characters: such names are kept."""
    answer = await admin.create("a", name=name)
    assert (answer.status, answer.json["name"]) == (201, name)


@pytest.mark.parametrize(
    "name",
    ["", "x" * 129, "a\nb", "a\tb", "\x7f", "\x1b[31m", "\x85", "\u2028", "\u202e", "\u2066"],
)
async def test_a_name_holds_no_control_character(admin: Api, name: str) -> None:
    """What breaks a line, steers a terminal or turns the text around is 422."""
    answer = await admin.create("a", name=name)
    assert (answer.status, answer.json["errors"][0]["loc"]) == (422, ["body", "name"])


async def test_a_write_that_alters_nothing_has_no_revision(admin: Api) -> None:
    """The same values again, the same key included, answer the current revision."""
    first = await admin.create("a", llm_provider="openai", llm_api_key="sk-canary-same")
    again = await admin.put("a", llm_api_key="sk-canary-same", llm_model="m")
    assert (again.status, again.revision) == (200, first.revision)
    assert again.json == first.json


async def test_one_default_always(admin: Api) -> None:
    """Promoting demotes the old default; the default can be neither deleted nor switched off."""
    await admin.create("a")
    promoted = await admin.put("a", is_default=True)
    assert promoted.json["revision"] == promoted.revision - 1
    agents = (await admin.get("/api/agents")).json["agents"]
    assert [agent["agent_id"] for agent in agents if agent["is_default"]] == ["a"]
    for refused in (
        await admin.delete("a"),
        await admin.put("a", is_active=False),
        await admin.put("a", is_default=False),
    ):
        assert (refused.status, refused.code) == (409, "agent-is-default")


async def test_a_deleted_agent_is_gone_at_once(admin: Api) -> None:
    """204 with the revision of the delete; the next read is 404 at that revision or later."""
    await admin.create("a")
    gone = await admin.delete("a")
    assert (gone.status, gone.body) == (204, b"")
    after = await admin.get("/api/agents/a")
    assert (after.status, after.code) == (404, "agent-not-found")
    assert after.revision == gone.revision
    assert (await admin.delete("a")).code == "agent-not-found"


async def test_if_match_guards_a_write(admin: Api) -> None:
    """Only who saw the latest revision writes; each form of If-Match that RFC 9110 has."""
    etag = (await admin.create("a")).headers["ETag"]
    second = await admin.put("a", {"If-Match": etag}, llm_model="two")
    assert second.status == 200
    assert (await admin.put("a", {"If-Match": etag}, llm_model="x")).code == "precondition-failed"
    assert (await admin.delete("a", headers={"If-Match": etag})).status == 412
    now = second.headers["ETag"]
    for refused, status in (
        ('"not-a-revision"', 412),
        ('"99999999999999999999999"', 412),
        (now.strip('"'), 400),
        ('"unfinished', 400),
        ("", 400),
    ):
        answer = await admin.put("a", {"If-Match": refused}, llm_model="x")
        assert answer.status == status, refused
    assert (await admin.put("a", {"If-Match": f'"1", {now}'}, llm_model="three")).status == 200
    assert (await admin.put("a", {"If-Match": "*"}, llm_model="four")).status == 200
    assert (await admin.put("nobody", {"If-Match": "*"}, llm_model="x")).status == 404
    latest = (await admin.get("/api/agents/a")).headers["ETag"]
    assert (await admin.delete("a", headers={"If-Match": latest})).status == 204


async def test_of_two_writers_with_one_revision_one_wins(admin: Api) -> None:
    """Twenty writers with the same If-Match at once: one writes, the others are told."""
    etag = (await admin.create("a")).headers["ETag"]
    answers = await asyncio.gather(
        *(admin.put("a", {"If-Match": etag}, llm_model=f"m{n}") for n in range(20))
    )
    assert sorted(answer.status for answer in answers) == [200] + [412] * 19


async def test_whoever_wrote_reads_what_it_wrote(admin: Api) -> None:
    """Many writers at once: each reads its own write right after its answer, never an older one."""

    async def writer(number: int) -> None:
        agent_id = f"agent-{number}"
        last = (await admin.create(agent_id)).revision
        for turn in range(5):
            written = await admin.put(agent_id, llm_model=f"model-{turn}")
            read = await admin.get(f"/api/agents/{agent_id}")
            assert read.json["llm_model"] == f"model-{turn}"
            assert read.revision >= written.revision > last
            last = read.revision

    await asyncio.gather(*(writer(number) for number in range(10)))
    assert (await admin.get("/api/agents")).revision == 1 + 10 * 6


async def test_nothing_older_follows_an_answer(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """With a feed that is slow, whoever wrote or read a key then reads nothing older than that."""
    async with running_server(tmp_path) as server:
        admin = Api(server, session, server.admin_token, key_token=server.backend_token)
        failpoints.arm("before_push:hold:0.3", testing=True)
        try:
            written = await admin.put("default", llm_model="new")
            read = await admin.get("/api/agents/default")
            assert (read.json["llm_model"], read.revision) == ("new", written.revision)
            for path in ("/api/agents/default/llm", "/api/snapshot"):
                before = (await admin.get("/api/agents/default")).revision
                writing = asyncio.create_task(admin.put("default", llm_model=path))
                while (keyed := await admin.get(path)).revision == before:
                    pass
                assert (await admin.get("/api/agents/default")).revision >= keyed.revision
                await writing
        finally:
            failpoints.arm(None, testing=True)


async def test_moving_a_key_elsewhere_clears_it(admin: Api) -> None:
    """Another provider or origin without the key in the same request drops it, and says so."""
    await admin.create("a", llm_provider="openai", llm_api_key="sk-canary-moved")
    moved = await admin.put("a", llm_endpoint="https://elsewhere.example.com/v1")
    assert moved.json["api_key_cleared"] is True
    assert moved.json["has_api_key"] is False
    assert (await admin.get("/api/agents/a/llm")).json["llm_api_key"] is None
    both = await admin.put("a", llm_provider="anthropic", llm_api_key="sk-canary-new")
    assert "api_key_cleared" not in both.json
    assert (await admin.get("/api/agents/a/llm")).json["llm_api_key"] == "sk-canary-new"


@pytest.mark.parametrize("agent_id", ["default", "llm"])
async def test_names_of_routes_are_agent_ids_too(admin: Api, agent_id: str) -> None:
    """An agent may be called like a part of a path."""
    if agent_id != "default":
        assert (await admin.create(agent_id)).status == 201
    assert (await admin.put(agent_id, llm_model="x")).json["agent_id"] == agent_id
    assert (await admin.get(f"/api/agents/{agent_id}/llm")).json["llm_model"] == "x"
