"""create_app: the ASGI application of one server; its lifespan starts the feed and the hub."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from slm.errors import ProblemError
from slm.server.api.middleware import Edge
from slm.server.api.problems import (
    InvalidRequestProblem,
    Problem,
    every_code,
    on_http_exception,
    on_problem,
    on_validation_error,
)
from slm.server.api.routes import agents, audit, fleet, health, history, keys, snapshot, tokens, ws
from slm.server.api.routes import backup as admin
from slm.server.db.engines.listener import ChangeListener
from slm.server.fleet import explain as explanations
from slm.server.fleet import replication as fleet_sync
from slm.server.fleet.tracker import FORGET_EVERY_SECONDS
from slm.server.lifecycle.audit_retention import trim
from slm.server.lifecycle.compaction import compact
from slm.server.lifecycle.startup import PreparedDatabase
from slm.server.services import Services, make_services
from slm.server.settings import Settings
from slm.server.tasks.periodic import PeriodicTask

LAST_WORDS_SECONDS = 0.5
"""How long each of the last writes may take: tokens' last use, and that this server is gone."""


Lifespan = Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]


class _Application(FastAPI):
    """FastAPI, with an OpenAPI document that covers more than the routes' own models."""

    def __init__(self, services: Services, lifespan: Lifespan) -> None:
        super().__init__(
            title="SLM",
            description="Live LLM configuration for every agent; see docs/protocol.md.",
            version=version("autobot-slm"),
            lifespan=lifespan,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
        )
        self.state.services = services

    def setup(self) -> None:
        """Serve the OpenAPI document from memory: it is public, and slow to encode."""
        encoded = b""

        async def answer_document(_: Request) -> Response:
            nonlocal encoded
            encoded = encoded or json.dumps(self.openapi()).encode()
            return Response(encoded, media_type="application/json")

        self.add_route("/openapi.json", answer_document, include_in_schema=False)

    def allowed_methods(self, path: str) -> set[str]:
        """Return the methods that this path allows, for `Allow` (RFC 9110 section 15.5.6)."""
        return {
            method
            for route in self.routes
            if isinstance(route, APIRoute) and route.path_regex.match(path)
            for method in route.methods or ()
        }

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, with problems and the bearer token but no key's value."""
        if self.openapi_schema is None:
            document = super().openapi()
            components = document.setdefault("components", {})
            components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            schemas = components.setdefault("schemas", {})
            for model in (Problem, InvalidRequestProblem):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schema["properties"]["code"]["enum"] = every_code()
                schemas[model.__name__] = schema
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            # pydantic marks a SecretStr as writeOnly; in this one response it is meant to be read.
            _unmark(schemas["LLMConfigWithKey"])
            self.openapi_schema = document
        return self.openapi_schema


def _unmark(schema: Any) -> None:
    if isinstance(schema, dict):
        schema.pop("writeOnly", None)
        for value in schema.values():
            _unmark(value)
    elif isinstance(schema, list):
        for value in schema:
            _unmark(value)


class _Worker(Protocol):
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


def _workers(services: Services) -> list[_Worker]:
    """Return what runs beside the feed, such as the listener for other replicas and compaction."""
    settings, database, supervisor = services.settings, services.database, services.supervisor
    workers: list[_Worker] = [services.caretaker, services.doorkeeper, services.token_watch]
    if database.dialect == "postgresql":
        sync = services.fleet_sync
        others: dict[str, Callable[[str], None]] = {
            fleet_sync.CHANNEL: sync.hear,
            explanations.CHANNEL: services.explanations.hear,
        }
        workers.append(ChangeListener(database.url, services.feed.hear, others, supervisor))
        workers.append(sync)
    clean = services.fleet.forget_long_gone
    workers.append(PeriodicTask("fleet-forget", clean, FORGET_EVERY_SECONDS, supervisor))
    if settings.changes_keep is not None:
        work = functools.partial(compact, database, keep=settings.changes_keep)
        workers.append(
            PeriodicTask("compaction", work, settings.compact_interval_seconds, supervisor)
        )
    if settings.audit_keep_days is not None:
        work = functools.partial(
            trim, database, services.keyring, keep_days=settings.audit_keep_days
        )
        workers.append(
            PeriodicTask("audit-retention", work, settings.audit_trim_seconds, supervisor)
        )
    return workers


def create_app(settings: Settings, prepared: PreparedDatabase) -> FastAPI:
    """Return the application; `app.state.services` has its parts.

    Args:
        settings: the operator's settings.
        prepared: the open, migrated database and the vault.
    """
    services = make_services(settings, prepared)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.feed.start()
        try:
            async with contextlib.AsyncExitStack() as stack:
                for worker in _workers(services):
                    await worker.start()
                    stack.push_async_callback(worker.stop)
                yield
                # Leases expire by themselves: an unreachable database does not delay the stop.
                services.database.answer_within(LAST_WORDS_SECONDS if services.feed.current else 0)
        finally:
            await services.feed.stop()
            await services.hub.stop()

    app = _Application(services, lifespan)
    app.add_middleware(
        Edge,
        catalog=services.catalog,
        metrics=services.metrics,
        counts=services.counts,
        streams={"/ws": ws.stream},
    )
    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    for router in (
        agents.router,
        history.router,
        fleet.router,
        snapshot.router,
        admin.router,
        tokens.router,
        keys.router,
        audit.router,
        health.router,
    ):
        # Not `include_router`: searching level by level costs a tenth of a plain read.
        app.router.routes.extend(router.routes)
    return app
