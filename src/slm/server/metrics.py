"""The histograms of `/metrics`: values with a distribution, which cannot be read on request.

Knows no part of the server; the code that measures calls it. `api.routes.health` has counts and
gauges.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Histogram

_SECONDS: Final = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    float("inf"),
)

UNKNOWN_ROUTE: Final = "none"
"""Stands for a path that no route takes: a stranger must not create new series."""


class Metrics:
    """One server's histograms.

    Attributes:
        registry: where they are registered; one per server, so that several fit in one process.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._push = Histogram(
            "slm_push_latency_seconds",
            "From a commit of this server until its frame was written to every live stream",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._lag = Histogram(
            "slm_feed_lag_seconds",
            "From when a change was made, by whichever server, until this one passed it on",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._http = Histogram(
            "slm_http_request_seconds",
            "How long requests took, by route",
            ("method", "route", "status"),
            registry=self.registry,
            buckets=_SECONDS,
        )
        # `labels` looks up and checks each time; a dict takes a tenth of the time.
        self._routes: dict[tuple[str, str, int], Histogram] = {}

    def pushed(self, seconds: float) -> None:
        """Record how many seconds after its commit a change was written to every live stream."""
        self._push.observe(seconds)

    def passed_on(self, seconds: float) -> None:
        """Record how old a change was when the feed passed it on; clocks may differ."""
        self._lag.observe(max(0.0, seconds))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Record how long a request took.

        Args:
            method: the HTTP method, one of the usual ones.
            route: the route's own path, with its placeholders; never the requested path.
            status: the response's status; only its class is kept.
            seconds: from the head of the request to the end of the response.
        """
        key = (method, route, status // 100)
        child = self._routes.get(key)
        if child is None:
            child = self._http.labels(method, route, f"{status // 100}xx")
            self._routes[key] = child
        child.observe(seconds)
