"""The histograms of `/metrics`: what has a distribution, and so cannot be read off when asked.

Knows no part of the server; who measures calls it. Counts and gauges are in `api.health`.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Histogram

_SECONDS: Final = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    float("inf"),
)

UNKNOWN_ROUTE: Final = "none"
"""What stands for a path that no route takes: a stranger must not make new series."""


class Metrics:
    """One server's histograms.

    Attributes:
        registry: where they are; of this server alone, so that several live in one process.
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
        # `labels` looks up and checks each time; a dict is a tenth of that.
        self._routes: dict[tuple[str, str, int], Histogram] = {}

    def pushed(self, seconds: float) -> None:
        """Note how long after its commit a change was written to every live stream."""
        self._push.observe(seconds)

    def passed_on(self, seconds: float) -> None:
        """Note how old a change was when the feed passed it on; clocks may differ."""
        self._lag.observe(max(0.0, seconds))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Note how long a request took.

        Args:
            method: of HTTP; one of the usual ones.
            route: the route's own path, with its placeholders; never what was asked for.
            status: of the answer; its class alone is kept.
            seconds: from the request's head until the answer's end.
        """
        key = (method, route, status // 100)
        child = self._routes.get(key)
        if child is None:
            child = self._http.labels(method, route, f"{status // 100}xx")
            self._routes[key] = child
        child.observe(seconds)
