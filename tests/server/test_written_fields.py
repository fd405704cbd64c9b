"""What people paste into a field: trimmed, or refused in a sentence; what is stored stays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slm.endpoints import canonical_url, refused_endpoint
from slm.errors import InvalidRequest
from slm.server.agents.schemas import AgentCreate, AgentUpdate
from slm.server.security.audit import Who
from tests.support.raw import Api
from tests.support.servers import running_server
from tests.support.store import Store, new_agent

CANARY = "sk-canary-written"
BLANKS = st.text(" \t\u00a0\u2003\u3000\ufeff\u200b", max_size=4)
NEW: dict[str, Any] = {"agent_id": "a", "name": "A", "llm_provider": "openai", "llm_model": "m"}


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Api]:
    async with running_server(tmp_path / "data") as server, aiohttp.ClientSession() as session:
        yield Api(server, session, server.admin_token)


@given(before=BLANKS, after=BLANKS)
def test_blanks_around_a_text_are_no_part_of_it(before: str, after: str) -> None:
    """Name, model and endpoint are stored without the blanks at their ends; inner ones stay."""
    texts = {"name": "A  b", "llm_model": "\u6a21\u578b v1", "llm_endpoint": "https://h/v1"}
    padded = {name: before + text + after for name, text in texts.items()}
    created = AgentCreate.model_validate(NEW | padded)
    updated = AgentUpdate.model_validate(padded)
    for name, text in texts.items():
        assert getattr(created, name) == getattr(updated, name) == text


@pytest.mark.parametrize("field", ["name", "llm_model"])
@pytest.mark.parametrize("text", ["", " ", "\u00a0\t", "m\n", "\r\nm"])
def test_blanks_alone_or_a_line_break_are_no_text(field: str, text: str) -> None:
    """An empty text and one with a line break are refused."""
    with pytest.raises(ValidationError):
        AgentCreate.model_validate(NEW | {field: text})


ENDPOINTS = {
    "https://h/v1?api-version=2024-10-21": "query",
    "https://h/v1?": "query",
    "https://h?x": "query",
    "https://h./v1": "dot",
    "https://h//v1": "slashes",
    "https://h/v1//": "slashes",
    "https://h/openai//deployments/x": "slashes",
    "https://h/v1/models": "/v1/models",
    "https://h/v1/chat/completions": "/chat/completions",
    "https://h/v1/Chat/Completions/": "/chat/completions",
    "https://h/openai/deployments/x/chat/completions": "/chat/completions",
    "https://h/v1/completions": "/completions",
    "https://h/v1/responses": "/responses",
    "https://h/v1/messages": "/v1/messages",
    "https://h/anthropic/v1/messages/": "/v1/messages",
    "http://h:11434/api/chat": "/api/chat",
    "http://h:11434/api/generate": "/api/generate",
}


async def test_an_endpoint_that_nothing_can_be_added_to_is_refused(admin: Api) -> None:
    """A query, a route or a doubled slash would make a URL that nobody meant: 422 and why."""
    await admin.create("there")
    for endpoint, named in ENDPOINTS.items():
        for answer in (
            await admin.call("POST", "/api/agents", json=NEW | {"llm_endpoint": endpoint}),
            await admin.call("PUT", "/api/agents/there", json={"llm_endpoint": endpoint}),
        ):
            assert (answer.status, answer.code) == (422, "invalid-request"), endpoint
            (error,) = answer.json["errors"]
            assert error["loc"] == ["body", "llm_endpoint"]
            assert named in error["msg"]


@pytest.mark.parametrize(
    "endpoint",
    [
        *("https://h", "https://h/", "https://h/v1", "https://h/v1/", "http://h:8080/gateway"),
        *("https://h/models", "https://h/api", "https://h/chat", "https://h/messages"),
        *("https://h/openai/deployments/gpt", "https://h/v1beta/openai", "https://h/anthropic"),
    ],
)
def test_what_paths_can_be_added_to_is_an_endpoint(endpoint: str) -> None:
    """Base URLs as the providers' documents have them are taken, whatever they end with."""
    assert refused_endpoint(endpoint) is None


@pytest.mark.parametrize(
    ("provider", "endpoint", "asked"),
    [
        ("anthropic", "https://h/v1", "https://h:443"),
        ("anthropic", "https://h/gateway/v1/", "https://h:443/gateway"),
        ("anthropic", "https://h/gateway", "https://h:443/gateway"),
        ("ollama", "http://h:11434/api", "http://h:11434"),
        ("ollama", "http://h:11434/v1/", "http://h:11434"),
        ("openai", "https://h/v1", "https://h:443/v1"),
        ("openai", "https://h/api", "https://h:443/api"),
    ],
)
def test_what_all_routes_begin_with_is_not_sent_twice(
    provider: str, endpoint: str, asked: str
) -> None:
    """`https://h/v1` for anthropic leads to /v1/messages, and never to /v1/v1/messages."""
    assert canonical_url(provider, endpoint) == asked


KEYS = {
    f'"{CANARY}"': "quotes",
    f"'{CANARY}'": "quotes",
    f"\u201c{CANARY}\u201d": "quotes",
    f"`{CANARY}`": "quotes",
    f'"{CANARY}': "quotes",
    f"OPENAI_API_KEY={CANARY}": "equals sign",
    f"key={CANARY}": "equals sign",
    f"Bearer {CANARY}": "blanks",
    f"export KEY={CANARY}": "blanks",
    f"{CANARY} {CANARY}": "blanks",
    f"{CANARY}\n": "blanks",
    f" {CANARY}": "blanks",
    f"{CANARY}\u00a0": "blanks",
    f"{CANARY}\u00e9": "ASCII",
    "": "empty",
}


async def test_a_key_with_something_around_it_is_refused(admin: Api) -> None:
    """Quotes, `NAME=` and blanks come from a .env file or a header: 422 and why, never the key."""
    for key, named in KEYS.items():
        for method, path, body in (
            ("POST", "/api/agents", NEW | {"llm_api_key": key}),
            ("PUT", "/api/agents/default", {"llm_api_key": key}),
        ):
            answer = await admin.call(method, path, json=body)
            assert (answer.status, answer.code) == (422, "invalid-request"), key
            assert named in answer.json["errors"][0]["msg"], key
            assert CANARY.encode() not in answer.body


@pytest.mark.parametrize("key", ["sk-a", "YWJj==", "a=", "==", "x:y", "AKIA/+=", 'a"b', "a'b"])
def test_a_key_that_only_looks_odd_is_taken(key: str) -> None:
    """Base64 ends with equals signs, and any printable character may stand inside."""
    assert AgentUpdate(llm_api_key=key).llm_api_key is not None  # type: ignore[arg-type]


ODD: dict[str, Any] = {
    "name": " two  blanks ",
    "llm_provider": "azure",
    "llm_endpoint": "https://h./v1/chat/completions?api-version=1",
    "llm_model": " gpt\t",
    "llm_timeout": 9999,
    "llm_temperature": 7.5,
}


async def test_what_equals_the_stored_is_not_judged_again(store: Store) -> None:
    """A whole agent can be sent back with one field changed, whatever else its row holds."""
    await store.registry.create(new_agent(), who=Who("tester"))
    columns = ", ".join(f"{name} = :{name}" for name in ODD)
    await store.sql(f"UPDATE agents SET {columns} WHERE agent_id = 'billing'", **ODD)
    served = (await store.agent("billing")).model_dump(mode="json")
    sent = {name: served[name] for name in AgentUpdate.model_fields if name in served}

    async def put(**fields: Any) -> Any:
        update = AgentUpdate.model_validate(sent | fields)
        return await store.registry.update("billing", update, who=Who("tester"))

    assert not (await put()).changed
    written = await put(llm_max_tokens=77)
    assert written.changed
    stored = await store.agent("billing")
    assert {name: getattr(stored, name) for name in ODD} == ODD
    assert stored.llm_max_tokens == 77
    for name in ("llm_endpoint", "llm_provider", "llm_timeout", "llm_temperature"):
        with pytest.raises(InvalidRequest) as refused:
            await put(**{name: 8888 if name == "llm_timeout" else f"{ODD[name]}/v1/messages"})
        assert [error["loc"] for error in refused.value.errors] == [["body", name]]
    assert (await put(llm_model="other ")).agent.llm_model == "other"


async def test_an_endpoint_that_stays_is_not_judged_by_a_stricter_server(tmp_path: Path) -> None:
    """With SLM_ENDPOINTS=strict, an endpoint from before is taken along in a PUT of everything."""
    private = {"llm_provider": "openai", "llm_endpoint": "http://10.0.0.7/v1"}
    async with running_server(tmp_path) as server, aiohttp.ClientSession() as session:
        await Api(server, session, server.admin_token).create("a", **private)
        await server.stop()
        await server.start(endpoints="strict")
        admin = Api(server, session, server.admin_token)
        assert (await admin.put("a", llm_model="n", **private)).status == 200
        moved = await admin.put("a", llm_endpoint="http://10.0.0.8/v1")
        assert (moved.status, moved.code) == (422, "invalid-request")


async def test_a_tag_that_a_proxy_changed_is_still_the_agents(admin: Api) -> None:
    """A proxy that compresses makes a tag weak (nginx), or writes its coding after it (Apache)."""
    created = await admin.create("a")
    for form in ('W/"{}"', '"{}-gzip"', '"{}--gzip"', 'W/"{}-br"', '"{};gzip"', '"x", W/"{}"'):
        tag = (await admin.get("/api/agents/a")).headers["ETag"].strip('"')
        for stale in (f"{created.json['revision']}0-gzip", "x-gzip", f"{tag}-other"):
            answer = await admin.call(
                "PUT", "/api/agents/a", json={}, headers={"If-Match": f'"{stale}"'}
            )
            assert (answer.status, answer.code) == (412, "precondition-failed"), stale
        answer = await admin.call(
            "PUT",
            "/api/agents/a",
            json={"description": form},
            headers={"If-Match": form.format(tag)},
        )
        assert answer.status == 200, form
