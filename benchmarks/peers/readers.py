"""How a backend reads one value with each SDK, from memory, with 1,000 values held.

Each reader is prepared once and gives a function that reads `calls` times and returns nothing; the
loop around the call is in every figure. Values are the same for all: one agent's configuration.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.harness.errors import Missing

COUNT = 1000
WANTED = "agent-00500"

VALUE = {
    "llm_provider": "openai",
    "llm_endpoint": "https://gateway.example.com/v1",
    "llm_model": "gpt-6-luna",
    "llm_timeout": 30,
    "llm_temperature": 0.7,
    "llm_max_tokens": 4096,
    "llm_options": {"top_p": 0.95, "seed": 7},
}

Reads = Callable[[int], None]
AsyncReads = Callable[[int], Awaitable[None]]


def names() -> list[str]:
    """Return the names of all values."""
    return [f"agent-{number:05d}" for number in range(COUNT)]


def plain_dict() -> Reads:
    """A dict, looked up by name: the least that any of this can cost."""
    held: dict[str, Any] = dict.fromkeys(names(), VALUE)

    def read(calls: int) -> None:
        for _ in range(calls):
            held[WANTED]

    return read


def awaited_dict() -> AsyncReads:
    """The same lookup behind one `await`: the floor of an asynchronous SDK."""
    held: dict[str, Any] = dict.fromkeys(names(), VALUE)

    async def get(name: str) -> Any:
        return held[name]

    async def read(calls: int) -> None:
        for _ in range(calls):
            await get(WANTED)

    return read


def launchdarkly() -> Reads:
    """LaunchDarkly's server SDK on its TestData source; events off."""
    try:
        import ldclient
        from ldclient.config import Config
        from ldclient.integrations.test_data import TestData
    except ImportError:
        raise Missing("launchdarkly-server-sdk (PyPI)") from None
    logging.getLogger("ldclient.util").setLevel(logging.ERROR)
    data = TestData.data_source()
    for name in names():
        flag = data.flag(name).variations(VALUE).fallthrough_variation(0).on(True)
        data.update(flag)
    config = Config("sdk-key", update_processor_class=data, send_events=False)
    client = ldclient.LDClient(config, start_wait=5)
    context = ldclient.Context.create("backend")
    if client.variation(WANTED, context, None) != VALUE:
        raise RuntimeError("LaunchDarkly does not answer the value")

    def read(calls: int) -> None:
        variation = client.variation
        for _ in range(calls):
            variation(WANTED, context, None)

    return read


def unleash() -> Reads:
    """UnleashClient, bootstrapped from a dict; metrics and registration off."""
    try:
        from UnleashClient import UnleashClient
        from UnleashClient.cache import FileCache
    except ImportError:
        raise Missing("UnleashClient (PyPI)") from None
    logging.getLogger("UnleashClient").setLevel(logging.ERROR)
    payload = {"type": "json", "value": json.dumps(VALUE)}
    variant = {
        "name": "config",
        "weight": 1000,
        "weightType": "variable",
        "stickiness": "default",
        "payload": payload,
    }
    features = [
        {
            "name": name,
            "type": "release",
            "enabled": True,
            "stale": False,
            "strategies": [{"name": "default", "parameters": {}}],
            "variants": [variant],
        }
        for name in names()
    ]
    cache = FileCache("slm-bench", directory=tempfile.mkdtemp(prefix="slm-bench-unleash-"))
    cache.bootstrap_from_dict({"version": 2, "features": features})
    client = UnleashClient(
        "http://127.0.0.1:9/api",
        "slm-bench",
        cache=cache,
        disable_metrics=True,
        disable_registration=True,
    )
    client.initialize_client(fetch_toggles=False)
    context = {"userId": "backend"}
    if json.loads(client.get_variant(WANTED, context)["payload"]["value"]) != VALUE:
        raise RuntimeError("Unleash does not answer the value")

    def read(calls: int) -> None:
        get_variant = client.get_variant
        for _ in range(calls):
            get_variant(WANTED, context)

    return read


def openfeature() -> Reads:
    """OpenFeature's SDK on its in-memory provider."""
    try:
        from openfeature import api
        from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider
    except ImportError:
        raise Missing("openfeature-sdk (PyPI)") from None
    flags = {name: InMemoryFlag("on", {"on": VALUE}) for name in names()}
    set_provider = getattr(api, "set_provider_and_wait", api.set_provider)
    set_provider(InMemoryProvider(flags))
    client = api.get_client()
    if client.get_object_value(WANTED, {}) != VALUE:
        raise RuntimeError("OpenFeature does not answer the value")

    def read(calls: int) -> None:
        get = client.get_object_value
        for _ in range(calls):
            get(WANTED, {})

    return read


PEERS: dict[str, tuple[str, Callable[[], Reads], int]] = {
    "dict": ("a dict", plain_dict, 1_000_000),
    "openfeature": ("OpenFeature, in memory", openfeature, 5_000),
    "launchdarkly": ("LaunchDarkly `variation`, TestData", launchdarkly, 5_000),
    "unleash": ("Unleash `get_variant`, bootstrapped", unleash, 2_000),
}
"""Label, how to prepare it, calls a repeat."""
