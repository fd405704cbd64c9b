"""Access control: the scope a route requires, the caller it admits, and what that caller sees.

Counts every refusal, and failed logins by address. Knows no route and no response.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import HTTPConnection

from slm.errors import Forbidden, TooManyRequests, Unauthorized
from slm.server.agents.catalog import Catalog
from slm.server.api.peer import client_address
from slm.server.security.audit import Who
from slm.server.security.rate_limits import network_of
from slm.server.security.token_table import Caller
from slm.server.services import Services
from slm.server.transport.connections import TOKEN_SHOWN


class Given(ABC):
    """A value that the server itself supplies to an endpoint parameter.

    To FastAPI it is a dependency without parameters of its own, so it does not appear in the
    OpenAPI document; `SLMRoute` calls `take`.
    """

    async def __call__(self) -> None:
        """Act as a dependency in the signature; never called."""
        raise NotImplementedError

    @abstractmethod
    def take(self, request: Request, services: Services, caller: Caller | None) -> object:
        """Return the value for this request."""


class Requires(Given):
    """The scope that a route requires; the parameter's value is the caller, who has that scope.

    `SLMRoute` checks it before it reads the body; the OpenAPI document takes the scope from it.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope

    def take(self, request: Request, services: Services, caller: Caller | None) -> object:
        """Return the caller that `check` admitted."""
        return caller

    def check(self, connection: HTTPConnection, parts: Services) -> Caller:
        """Return the caller, if its token is known and has the scope.

        Raises:
            Unauthorized: the token is unknown.
            DatabaseUnavailable: the server can no longer tell which tokens are valid.
            Forbidden: the token lacks the scope.
            TooManyRequests: this address failed too often, or this token writes too often. A caller
                with a valid token is never refused because of others at its address.
        """
        try:
            caller = parts.tokens.authenticate(connection.headers)
            # A connection with a valid token is not closed to make room for others.
            connection.scope.setdefault("state", {})[TOKEN_SHOWN] = True
            caller.require(self.scope)
        except Forbidden:
            parts.counts.auth_failures += 1
            raise
        except Unauthorized:
            note_failed_login(connection)
            raise
        if self.scope == "agents:write":
            parts.writes.check(caller.token_id, "This token writes too often")
        return caller


def note_failed_login(connection: HTTPConnection) -> None:
    """Count a failed authentication against its address.

    Raises:
        TooManyRequests: too many came from there.
    """
    parts = services_of(connection)
    parts.counts.auth_failures += 1
    address = client_address(connection, parts.settings.trusted_proxies)
    parts.failed_logins.check(network_of(address), "Too many failed logins")


def who_of(connection: HTTPConnection, caller: Caller) -> Who:
    """Return who is asking, and from where, for the audit."""
    proxies = services_of(connection).settings.trusted_proxies
    return Who(caller.name, client_address(connection, proxies), caller)


@contextlib.contextmanager
def place_to_wait(services: Services, caller: Caller) -> Iterator[None]:
    """Hold one of the token's places for waiting requests.

    Raises:
        TooManyRequests: none is left.
    """
    if not services.waits.take(caller.token_id):
        raise TooManyRequests("This token has reached its limit of waiting requests.")
    try:
        yield
    finally:
        services.waits.release(caller.token_id)


def sees_today(catalog: Catalog, caller: Caller, agent_id: str) -> bool:
    """Return whether the caller may see this agent now, and so its past.

    Having once been the default does not make an agent visible.
    """
    return caller.view.sees(agent_id, agent_id == catalog.default_id)


def services_of(connection: HTTPConnection) -> Services:
    """Return the services of the server that received this request."""
    parts: Services = connection.app.state.services
    return parts


Reader = Annotated[Caller, Depends(Requires("config:read"))]
KeyReader = Annotated[Caller, Depends(Requires("key:read"))]
Writer = Annotated[Caller, Depends(Requires("agents:write"))]
Admin = Annotated[Caller, Depends(Requires("admin"))]


class _Asking(Given):
    def take(self, request: Request, services: Services, caller: Caller | None) -> object:
        assert caller is not None, "beside a parameter that names a scope"  # noqa: S101
        return who_of(request, caller)


Asking = Annotated[Who, Depends(_Asking())]
"""Who is asking, and from where, for the audit."""
