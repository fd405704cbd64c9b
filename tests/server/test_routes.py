"""One handler a route: its query string is one model, which the parser and the document share."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import aiohttp
import pytest
from fastapi import APIRouter, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute

from slm.server.api import parameters
from slm.server.api.access import Reader
from slm.server.api.parameters import Part, QueryModel
from slm.server.api.route import SLMRoute
from slm.server.security.tokens import SCOPES
from tests.support.http import Caller, agent, make_token
from tests.support.servers import InLoopServer


@pytest.fixture
def ask(server: InLoopServer, session: aiohttp.ClientSession) -> Caller:
    """The administrator."""
    return Caller(server.url, server.admin_token, session)


def routes_of(server: InLoopServer) -> list[APIRoute]:
    """Every route of the API."""
    app: Any = server.running._app
    routes: list[BaseRoute] = app.routes
    return [route for route in routes if isinstance(route, APIRoute)]


def query_model(route: APIRoute) -> type[QueryModel] | None:
    """The model of a route's query string."""
    for hint in typing.get_type_hints(route.endpoint).values():
        if inspect.isclass(hint) and issubclass(hint, QueryModel):
            return hint
    return None


async def test_a_query_string_changes_nothing_but_what_it_asks_for(ask: Caller) -> None:
    """The list and an agent are the same answer with a parameter that is met already."""
    assert (await ask("POST", "/api/agents", agent("one"))).status == 201
    for path in ("/api/agents", "/api/agents/one"):
        plain = await ask("GET", path, headers={"Accept-Encoding": "gzip"})
        asked = await ask("GET", f"{path}?min_revision=0", headers={"Accept-Encoding": "gzip"})
        assert asked.body == plain.body
        assert asked.headers["ETag"] == plain.headers["ETag"]
        assert asked.headers.get("Content-Encoding") == plain.headers.get("Content-Encoding")
        tag = {"If-None-Match": plain.headers["ETag"], "Accept-Encoding": "gzip"}
        assert (await ask("GET", f"{path}?min_revision=0", headers=tag)).status == 304


async def test_the_document_shows_the_parameters_that_are_read(
    ask: Caller, server: InLoopServer
) -> None:
    """For every route, and one that is not in its document is refused, on every route."""
    paths = (await ask("GET", "/openapi.json")).body["paths"]
    everything = await make_token(ask, "everything", *SCOPES)
    routes = routes_of(server)
    assert len(routes) > 25
    for route in routes:
        assert type(route) is SLMRoute
        model = query_model(route)
        read = (
            {field.alias or name for name, field in model.model_fields.items()} if model else set()
        )
        for method in route.methods or ():
            told = paths[route.path][method.lower()].get("parameters", [])
            assert {each["name"] for each in told if each["in"] == "query"} == read, route.path
            path = route.path.format(agent_id="none", token_id=9999, revision=1)
            answer = await everything(method, f"{path}?sk-canary=1")
            assert (answer.status, answer.code) == (422, "invalid-request"), route.path
            assert "canary" not in str(answer.body)


def test_an_endpoint_whose_parameter_comes_from_nowhere_is_refused() -> None:
    """At its definition: a header, or a parameter of the query outside a model."""
    router = APIRouter(route_class=SLMRoute)

    async def endpoint(caller: Reader, limit: int) -> Response:
        return Response(str((caller, limit)))

    with pytest.raises(TypeError, match="limit is neither given"):
        router.add_api_route("/wrong", endpoint)


async def test_a_part_is_what_its_name_says(server: InLoopServer) -> None:
    """Each parameter that the server gives is of the type in the endpoint's signature."""
    services = server.running.services
    parts = 0
    for hint in vars(parameters).values():
        for mark in getattr(hint, "__metadata__", ()):
            given = getattr(mark, "dependency", None)
            if isinstance(given, Part):
                parts += 1
                value = given.take(typing.cast("Any", None), services, None)
                assert isinstance(value, hint.__origin__)
    assert parts >= 5


async def test_answers_are_the_models_of_the_document(ask: Caller, server: InLoopServer) -> None:
    """Every GET of a model is answered with that model's fields and no others."""
    everything = await make_token(ask, "everything", *SCOPES)
    assert (await ask("POST", "/api/agents", agent("one", llm_api_key="sk-x"))).status == 201
    seen = 0
    for route in routes_of(server):
        model = route.response_model
        if "GET" not in (route.methods or ()) or not issubclass_of_model(model):
            continue
        if route.path == "/api/explain":
            continue
        answer = await everything("GET", route.path.format(agent_id="one", revision=2))
        assert answer.status == 200, route.path
        model.model_validate(answer.body)
        fields = {field.alias or name for name, field in model.model_fields.items()}
        assert set(answer.body) <= fields, route.path
        seen += 1
    assert seen >= 9


def issubclass_of_model(kind: Any) -> bool:
    """Whether an answer is documented by a model."""
    return inspect.isclass(kind) and issubclass(kind, BaseModel)
