"""The startup hook for a FastAPI or Starlette backend, in one line of its code.

Knows only the shape of ASGI's lifespan: neither framework is imported.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from slm.client.client import SLMClient
from slm.client.options import cache_file_from_environment

Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


def lifespan(
    slm: str | SLMClient | None = None, inner: Callable[[Any], Any] | None = None, **options: Any
) -> Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Return a lifespan that connects a client at startup and closes it at shutdown.

    The client is `app.state.slm`, and `request.state.slm` in each request. It keeps the last known
    good configuration in a file of the account's state directory, so that an application restarted
    while the SLM is down still has it; `cache_file=False` or SLM_CACHE_FILE=off keeps none.

    Example:
        >>> from fastapi import FastAPI
        >>> import slm
        >>> app = FastAPI(lifespan=slm.lifespan("https://slm.internal"))

    Args:
        slm: the SLM's address, or a client that you made; None: the address is SLM_URL.
        inner: your own lifespan, if you have one; it runs inside, and finds `app.state.slm`.
        options: arguments for `SLMClient`, if an address is given.
    """

    @asynccontextmanager
    async def start_up(app: Any) -> AsyncIterator[Mapping[str, Any]]:
        client = slm if isinstance(slm, SLMClient) else SLMClient(slm, **_with_cache_file(options))
        async with client:
            app.state.slm = client
            if inner is None:
                yield {"slm": client}
                return
            async with inner(app) as state:
                yield {**(state or {}), "slm": client}

    return start_up


def _with_cache_file(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("cache_file") is None and cache_file_from_environment() is None:
        return options | {"cache_file": True}
    return options
