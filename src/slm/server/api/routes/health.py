"""GET /healthz, /readyz and /metrics: for load balancers and for Prometheus."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel

from slm.errors import Unauthorized
from slm.server.api.access import note_failed_login
from slm.server.api.parameters import Parts
from slm.server.api.problems import problem_responses
from slm.server.api.responses import compact_json, json_response
from slm.server.api.route import SLMRoute
from slm.server.security.token_table import bearer_token
from slm.server.services import Services

router = APIRouter(route_class=SLMRoute, tags=["operation"])


@router.get("/healthz", response_model=dict[str, str])
async def get_health() -> Response:
    """Report that the process is alive; says nothing about the database."""
    return json_response(b'{"status":"ok"}')


class BackgroundState(BaseModel):
    """One background task of this server, as its supervisor sees it."""

    running: bool
    needed: bool
    restarts: int
    restarting_seconds: float
    last_error: str


@router.get(
    "/readyz",
    response_model=dict[str, bool | int | str | dict[str, BackgroundState]],
    responses={503: {}},
)
async def get_readiness(services: Parts) -> Response:
    """Return 200 if the database is migrated and answers, and the feed runs and is current."""
    feed = services.feed
    checks = {
        # A server with an unmigrated database does not start.
        "migrated": True,
        "database": feed.database_answers,
        "writable": services.database.unwritable is None,
        "feed": feed.running and feed.current and services.hub.running,
        "encryption_key": services.caretaker.keys_usable,
        "tasks": not services.supervisor.down,
    }
    ready = all(checks.values())
    body: dict[str, Any] = {"ready": ready} | checks
    body |= {"revision": feed.position, "epoch": feed.epoch}
    reasons = [services.database.unwritable, feed.trouble]
    if not (feed.current or any(reasons)):
        reasons.append("the database does not answer")
    if services.supervisor.down:
        reasons.append(f"not running: {', '.join(services.supervisor.down)}")
    if not ready and any(reasons):
        body["reason"] = "; ".join(each for each in reasons if each)
    # An agent with an unusable key is reported, but does not take the server out of service.
    body["keys_undecryptable"] = len(services.reads.undecryptable)
    body["background"] = _background(services)
    headers = {"cache-control": "no-store"}
    return json_response(compact_json(body), 200 if ready else 503, headers)


def _background(services: Services) -> dict[str, dict[str, Any]]:
    """Return the state of each background task; errors by class only, as this needs no token."""
    return {
        state.name: {
            "running": state.running,
            "needed": state.needed,
            "restarts": state.restarts,
            "restarting_seconds": round(state.restarting_seconds, 1),
            "last_error": state.last_error,
        }
        for state in services.supervisor.states()
    }


@router.get("/metrics", response_class=Response, responses=problem_responses(Unauthorized))
async def get_metrics(request: Request, services: Parts) -> Response:
    """Return the metrics as Prometheus text; requires a token if SLM_METRICS_TOKEN is set."""
    wanted = services.settings.metrics_token
    if wanted is not None:
        given = bearer_token(request.headers) or ""
        secret = wanted.get_secret_value()
        if not hmac.compare_digest(given.encode(), secret.encode()):
            note_failed_login(request)
            raise Unauthorized("Send the metrics token as 'Authorization: Bearer …'.")
    registry = CollectorRegistry()
    registry.register(_Metrics(services))
    return Response(
        generate_latest(registry) + generate_latest(services.metrics.registry),
        headers={"cache-control": "no-store"},
        media_type=CONTENT_TYPE_LATEST,
    )


class _Metrics(Collector):
    """Reads the counts when scraped; nothing is counted twice."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        feed, hub, counts = self._services.feed, self._services.hub, self._services.counts
        connections, buffers = self._services.connections, hub.buffers.sizes()
        gauges = (
            ("slm_revision", "The revision that this replica is at", feed.position),
            ("slm_agents", "Agents in the catalog", len(self._services.catalog)),
            (
                "slm_feed_current",
                "1 when the last good look at the database is recent",
                feed.current,
            ),
            ("slm_feed_look_age_seconds", "Since the last good look", feed.seconds_since_look),
            ("slm_connections", "Open WebSocket connections", len(hub.subscribers())),
            ("slm_subscribers", "Live streams", hub.live_count()),
            ("slm_http_connections", "Connections other than streams", connections.http),
            ("slm_tasks", "Tasks of the event loop", len(asyncio.all_tasks())),
            ("slm_buffered_bytes", "Bytes waiting for slow readers", sum(buffers)),
            (
                "slm_largest_buffer_bytes",
                "Bytes that wait for the slowest reader",
                max(buffers, default=0),
            ),
            (
                "slm_keys_undecryptable",
                "Agents whose stored key cannot be used",
                len(self._services.reads.undecryptable),
            ),
        )
        counters = (
            ("slm_changes", "Changes passed on", hub.outbox.changes),
            ("slm_frames", "Frames written to connections", hub.counts.frames),
            ("slm_evictions", "Readers dropped for being too slow", hub.counts.evicted),
            ("slm_resyncs", "Streams sent to a snapshot", hub.counts.resyncs),
            ("slm_replays", "Streams that were told what they had missed", hub.counts.replays),
            ("slm_writes", "Writes that changed an agent", counts.writes),
            ("slm_key_reads", "Keys handed out", counts.key_reads),
            ("slm_auth_failures", "Requests refused with 401 or 403", counts.auth_failures),
            ("slm_request_failures", "Requests that failed with 500", counts.failures),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=float(value))
        for name, text, value in counters:
            yield CounterMetricFamily(name, text, value=float(value))
        running = GaugeMetricFamily(
            "slm_task_running", "1 while a background task runs", labels=("task",)
        )
        restarts = CounterMetricFamily(
            "slm_task_restarts", "Times a background task was started again", labels=("task",)
        )
        for state in self._services.supervisor.states():
            running.add_metric((state.name,), float(state.running))
            restarts.add_metric((state.name,), float(state.restarts))
        yield running
        yield restarts
