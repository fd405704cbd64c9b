"""Every route and the WebSocket with every kind of token; the application says which there are.

A route that is not in `RULES` fails the test: whoever adds one says here who may use it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Route

from slm.server.api.middleware import Edge
from slm.server.security.tokens import SCOPES
from tests.support.http import Answer, Caller, agent, make_token
from tests.support.servers import InLoopServer, eventually, running_server

OPEN: Final = None
RULES: Final[dict[tuple[str, str], str | None]] = {
    ("GET", "/api/agents"): "config:read",
    ("GET", "/api/agents/default"): "config:read",
    ("GET", "/api/agents/{agent_id}"): "config:read",
    ("GET", "/api/agents/{agent_id}/llm"): "key:read",
    ("POST", "/api/agents"): "agents:write",
    ("PUT", "/api/agents/{agent_id}"): "agents:write",
    ("DELETE", "/api/agents/{agent_id}"): "agents:write",
    ("POST", "/api/agents/{agent_id}/rollback"): "agents:write",
    ("GET", "/api/agents/{agent_id}/history"): "config:read",
    ("GET", "/api/changes"): "config:read",
    ("GET", "/api/changes/{revision}/receipt"): "config:read",
    ("GET", "/api/fleet"): "config:read",
    ("GET", "/api/explain"): "config:read",
    ("GET", "/api/snapshot"): "key:read",
    ("POST", "/api/admin/backup"): "admin",
    ("GET", "/api/admin/tokens"): "admin",
    ("POST", "/api/admin/tokens"): "admin",
    ("DELETE", "/api/admin/tokens/{token_id}"): "admin",
    ("GET", "/api/admin/keys"): "admin",
    ("POST", "/api/admin/keys"): "admin",
    ("POST", "/api/admin/keys/rotate"): "admin",
    ("POST", "/api/admin/keys/reencrypt"): "admin",
    ("POST", "/api/admin/keys/prune"): "admin",
    ("GET", "/api/admin/audit"): "admin",
    ("GET", "/api/admin/audit/verify"): "admin",
    ("GET", "/api/admin/audit/export"): "admin",
    ("POST", "/api/admin/audit/exported"): "admin",
    ("GET", "/healthz"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/metrics"): OPEN,
    ("GET", "/openapi.json"): OPEN,
    ("WEBSOCKET", "/ws"): "config:read",
}

HIDDEN: Final = "hidden"
LIMITED: Final[dict[tuple[str, str], int]] = {
    ("GET", "/api/agents/{agent_id}"): 404,
    ("GET", "/api/agents/{agent_id}/llm"): 404,
    ("GET", "/api/agents/{agent_id}/history"): 404,
    ("POST", "/api/agents"): 403,
    ("PUT", "/api/agents/{agent_id}"): 403,
    ("DELETE", "/api/agents/{agent_id}"): 403,
    ("POST", "/api/agents/{agent_id}/rollback"): 403,
    ("GET", "/api/explain"): 403,
}
"""What a token of all scopes, limited to other agents, is answered where an agent is named."""

UNNAMED: Final = {
    "/api/agents": 200,
    "/api/agents/default": 200,
    "/api/changes": 200,
    "/api/changes/{revision}/receipt": 404,
    "/api/snapshot": 200,
    "/healthz": 200,
    "/metrics": 200,
    "/openapi.json": 200,
    "/readyz": 200,
}
"""What it is answered where no agent is named, without a word of the others; elsewhere 403."""

BODIES: Final[dict[tuple[str, str], Any]] = {
    ("POST", "/api/agents"): agent(HIDDEN),
    ("PUT", "/api/agents/{agent_id}"): {"llm_model": "n"},
    ("POST", "/api/agents/{agent_id}/rollback"): {},
    ("POST", "/api/admin/tokens"): {"name": "made", "scopes": ["config:read"]},
    ("POST", "/api/admin/keys/rotate"): {},
    ("POST", "/api/admin/audit/exported"): {"head": f"1:{'0' * 64}"},
}


def flat(routes: list[BaseRoute]) -> list[BaseRoute]:
    """Every route, those of included routers and mounts too."""
    found: list[BaseRoute] = []
    for route in routes:
        inner = getattr(route, "original_router", route)
        if hasattr(inner, "routes"):
            found += flat(inner.routes)
        else:
            found.append(route)
    return found


def routes_of(server: InLoopServer) -> set[tuple[str, str]]:
    """Method and path of everything that the application answers."""
    app: Any = server.running._app
    found: set[tuple[str, str]] = set()
    for route in flat(app.routes):
        path = getattr(route, "path", None)
        assert path is not None, f"{route!r} is of a kind that this test does not know"
        methods = getattr(route, "methods", None)
        assert methods is None or isinstance(route, Route | APIRoute)
        found |= {(method, path) for method in methods or {"WEBSOCKET"} if method != "HEAD"}
    for middleware in app.user_middleware:
        assert middleware.cls is Edge, "a middleware that may answer by itself"
        found |= {("WEBSOCKET", path) for path in middleware.kwargs["streams"]}
    return found


QUERIES: Final = {("GET", "/api/explain"): f"?agent_id={HIDDEN}&backend=nobody"}
"""What a route cannot do without."""

WRITES_IN_ORDER: Final = [
    ("PUT", "/api/agents/{agent_id}"),
    ("POST", "/api/agents/{agent_id}/rollback"),
    ("DELETE", "/api/agents/{agent_id}"),
    ("POST", "/api/agents"),
    ("POST", "/api/admin/tokens"),
    ("POST", "/api/admin/backup"),
    ("POST", "/api/admin/keys"),
    ("POST", "/api/admin/keys/rotate"),
    ("POST", "/api/admin/keys/reencrypt"),
    ("POST", "/api/admin/keys/prune"),
]
"""What a token of every scope does, so that "refused" above does not stand for "broken"."""


@dataclass
class Doors:
    """Tokens of every kind."""

    ask: Caller
    unknown: dict[str, Caller]
    without: dict[str, Caller]
    limited: Caller

    async def knock(self, rule: tuple[str, str], caller: Caller) -> Answer | int:
        """Use a route as this caller."""
        method, path = rule
        path = path.format(agent_id=HIDDEN, token_id=9999, revision=1) + QUERIES.get(rule, "")
        if method != "WEBSOCKET":
            return await caller(method, path, BODIES.get(rule))
        try:
            async with caller.stream():
                return 101
        except aiohttp.WSServerHandshakeError as refused:
            return refused.status


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InLoopServer]:
    """A server that lets one address, which all of a test comes from, fail often."""
    # Making the API's document takes the loop a while, which is no outage.
    more = {"auth_failures_burst": 10_000, "behind_after_seconds": 5}
    async with running_server(tmp_path / "data", **more) as running:
        yield running


@pytest.fixture
async def doors(ask: Caller) -> Doors:
    assert (await ask("POST", "/api/agents", agent(HIDDEN, llm_api_key="sk-x"))).status == 201
    expired = await make_token(ask, "expired", *SCOPES, expires_in_seconds=1)
    revoked = await make_token(ask, "revoked", *SCOPES)
    number = (await ask("GET", "/api/admin/tokens")).body["tokens"][-1]["id"]
    without = {
        scope: await make_token(ask, f"no {scope}", *(s for s in SCOPES if s != scope))
        for scope in SCOPES
    }
    limited = await make_token(
        ask, "limited", "config:read", "key:read", "agents:write", agents=["other-*"]
    )
    await ask("DELETE", f"/api/admin/tokens/{number}")
    assert revoked.token is not None
    unknown = {
        "none": ask.as_(None),
        "wrong": ask.as_("slm_" + "A" * 43),
        "expired": expired,
        "revoked": revoked,
        "almost": ask.as_(revoked.token[:-1]),
        "SQL": ask.as_("' OR 1=1 --"),
    }

    async def out() -> bool:
        return (await expired("GET", "/api/agents")).status == 401

    await eventually(out)
    return Doors(ask, unknown, without, limited)


def _status(answer: Answer | int) -> int:
    return answer if isinstance(answer, int) else answer.status


async def test_every_route_has_a_rule(server: InLoopServer) -> None:
    """The application's routes are those of the table, none more and none fewer."""
    found = routes_of(server)
    assert found - set(RULES) == set(), "a new route: say in RULES who may use it"
    assert set(RULES) - found == set(), "a rule for a route that is gone"


async def test_every_route_asks_for_its_scope(doors: Doors, server: InLoopServer) -> None:
    """No token that counts: 401. One without the scope: 403. With it: the door opens."""
    for rule in sorted(routes_of(server)):
        scope = RULES[rule]
        for kind, caller in doors.unknown.items():
            status = _status(await doors.knock(rule, caller))
            wanted = {200, 101} if scope is OPEN else {401}
            assert status in wanted, (rule, kind, status)
        for lacking, caller in doors.without.items():
            if lacking == scope:
                answer = await doors.knock(rule, caller)
                assert _status(answer) == 403, (rule, lacking)
                assert isinstance(answer, int) or answer.code == "forbidden"
            elif rule[0] in ("GET", "WEBSOCKET"):
                answer = await doors.knock(rule, caller)
                assert _status(answer) in (200, 101, 404), (rule, lacking, answer)
    for rule in WRITES_IN_ORDER:
        assert _status(await doors.knock(rule, doors.ask)) < 300, rule


async def test_every_route_that_names_an_agent_knows_limited_tokens(
    doors: Doors, server: InLoopServer
) -> None:
    """A token limited to other agents: 404 for what it reads, 403 for what it writes."""
    for rule in sorted(routes_of(server)):
        if "{agent_id}" not in rule[1] and rule not in LIMITED:
            continue
        assert rule in LIMITED, f"{rule} names an agent: say in LIMITED what is not visible there"
        assert _status(await doors.knock(rule, doors.limited)) == LIMITED[rule], rule
    hidden_at = (await doors.ask("GET", f"/api/agents/{HIDDEN}")).body["revision"]
    for rule in sorted(routes_of(server)):
        method, path = rule
        if method != "GET" or "{agent_id}" in path:
            continue
        asked = path.format(revision=hidden_at) + QUERIES.get(rule, "")
        answer = await doors.limited("GET", asked)
        assert answer.status == UNNAMED.get(path, 403), path
        assert HIDDEN not in str(answer.body), path
    receipt = await doors.limited("GET", f"/api/changes/{hidden_at}/receipt")
    unknown = await doors.limited("GET", "/api/changes/999/receipt")
    assert (receipt.status, receipt.body) == (404, unknown.body), "as if it were not there"
    assert (await doors.ask("GET", f"/api/agents/{HIDDEN}")).body["llm_model"] == "m"


async def test_a_foreign_origin_is_refused_with_a_good_token(doors: Doors) -> None:
    """A page of another site gets no stream, whatever token its browser has: 403."""
    elsewhere = doors.ask.url.replace("127.0.0.1", "localhost")
    for origin in ("https://evil.example", "null", elsewhere):
        headers = {"Authorization": f"Bearer {doors.ask.token}", "Origin": origin}
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await doors.ask.session.ws_connect(f"{doors.ask.url}/ws", headers=headers)
        assert refused.value.status == 403


async def test_a_token_in_the_query_counts_for_nothing(doors: Doors) -> None:
    """Neither for HTTP nor for the WebSocket: a query string ends up in logs."""
    nobody = doors.ask.as_(None)
    token = doors.ask.token
    for name in ("token", "access_token", "authorization"):
        assert (await nobody("GET", f"/api/agents?{name}={token}")).status == 401
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await nobody.session.ws_connect(f"{nobody.url}/ws?{name}={token}")
        assert refused.value.status == 401


async def test_answers_say_nothing_of_the_server_and_are_safe_in_a_browser(doors: Doors) -> None:
    """No server name or version; no sniffing, framing or scripts; keys are not stored anywhere."""
    paths = ["/api/agents", "/api/agents/none", "/api/snapshot", "/healthz", "/metrics", "/nothing"]
    for caller in (doors.ask, doors.ask.as_(None)):
        for path in paths:
            headers = (await caller("GET", path)).headers
            told = " ".join(f"{name}: {value}" for name, value in headers.items()).lower()
            assert "server" not in {name.lower() for name in headers}
            assert not re.search("uvicorn|python|fastapi|starlette", told)
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Cache-Control"] in ("no-store", "no-cache")
    assert (await doors.ask("GET", "/api/snapshot")).headers["Cache-Control"] == "no-store"


PROTOCOL: Final = Path(__file__).parents[2] / "docs" / "protocol.md"


def documented_rules() -> dict[tuple[str, str], str | None]:
    """What the tables of docs/protocol.md section 3 say of each route's scope."""
    section = PROTOCOL.read_text().split("\n## 3. HTTP")[1].split("\n## 4.")[0]
    found: dict[tuple[str, str], str | None] = {}
    scope: str | None = None
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        methods = re.match(r"((?:GET|POST|PUT|DELETE)(?:, )?)+", cells[0].lstrip("| "))
        if not line.startswith("| ") or methods is None:
            continue
        if len(cells) == 2:
            scope = "admin"
        elif not cells[1].startswith("the same"):
            scope = None if cells[1].startswith("none") else cells[1].partition(",")[0]
        first, *others = re.findall(r"`([^`]+)`", cells[0])
        paths = [first, *(other.replace("…", first) for other in others)]
        for method in methods[0].rstrip(" ").split(", "):
            found |= {(method, re.sub(r"{\w+}", "{}", path)): scope for path in paths}
    return found


async def test_the_protocol_says_which_scope_each_route_asks_for() -> None:
    """Every route and its scope are in the tables of docs/protocol.md, and nothing else is."""
    rules = {
        (method, re.sub(r"{\w+}", "{}", path)): scope
        for (method, path), scope in RULES.items()
        if method != "WEBSOCKET"
    }
    assert documented_rules() == rules


async def test_the_api_document_says_nothing_of_what_a_server_holds(doors: Doors) -> None:
    """Whoever reads /openapi.json without a token learns the API, and no agent and no setting."""
    document = (await doors.ask.as_(None)("GET", "/openapi.json")).body
    text = str(document)
    assert HIDDEN not in text
    assert document.keys() == {"openapi", "info", "paths", "components"}
    assert (await doors.ask("GET", "/openapi.json")).body == document


async def test_the_first_admin_token_reads_no_key_and_can_make_a_token_that_does(
    doors: Doors,
) -> None:
    """admin.token has no key:read; making a key reader is in the audit, and so is what it reads."""
    admin = doors.ask.as_(doors.ask.token)
    for path in ("/api/snapshot", f"/api/agents/{HIDDEN}/llm"):
        assert (await admin("GET", path)).status == 403, path
    reader = await make_token(admin, "key reader", "key:read", "config:read")
    assert (await reader("GET", "/api/snapshot")).status == 200
    rows = (await admin("GET", "/api/admin/audit")).body["entries"]
    made = [row for row in rows if row["action"] == "token.create"]
    assert [row["actor"] for row in made if "key reader" in str(row)] == ["admin"]
    assert [row["action"] for row in rows if row["actor"] == "key reader"] == ["key.read_all"]


async def test_no_scope_has_another(doors: Doors) -> None:
    """A token with the scope `admin` alone reads no agent and no key."""
    alone = await make_token(doors.ask, "admin alone", "admin")
    for path in ("/api/agents", "/api/snapshot", f"/api/agents/{HIDDEN}/llm", "/api/changes"):
        assert (await alone("GET", path)).status == 403, path
    assert (await alone("PUT", f"/api/agents/{HIDDEN}", {})).status == 403
