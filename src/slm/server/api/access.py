"""Who may: the scope that a route asks for, the caller it lets in, and what that caller sees.

Every refusal is counted, and a failed login against its address. Knows no route and no answer.
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
    """What the server itself gives an endpoint for one of its parameters.

    To FastAPI it is a dependency without parameters of its own, so the API's document has no word
    of it; `SLMRoute` calls `take`.
    """

    async def __call__(self) -> None:
        """Stand for a dependency in the signature; nobody calls it."""
        raise NotImplementedError

    @abstractmethod
    def take(self, request: Request, services: Services, caller: Caller | None) -> object:
        """Return the value for this request."""


class Requires(Given):
    """The scope that a route asks for; the caller that has it is the parameter's value.

    `SLMRoute` checks it before the body is read, and the API's document takes the scope from it.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope

    def take(self, request: Request, services: Services, caller: Caller | None) -> object:
        """Return the caller that `check` let in."""
        return caller

    def check(self, connection: HTTPConnection, parts: Services) -> Caller:
        """Return the caller, if its token is known and has the scope.

        Raises:
            Unauthorized: the token is not known.
            DatabaseUnavailable: nobody can know any more which tokens count.
            Forbidden: it lacks the scope.
            TooManyRequests: this address failed too often, or this token writes too often. Who has
                a token that counts is never refused for what others of its address do.
        """
        try:
            caller = parts.tokens.authenticate(connection.headers)
            # Whoever has one is not closed to make room for others.
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
        TooManyRequests: there were too many from there.
    """
    parts = services_of(connection)
    parts.counts.auth_failures += 1
    address = client_address(connection, parts.settings.trusted_proxies)
    parts.failed_logins.check(network_of(address), "Too many failed logins")


def who_of(connection: HTTPConnection, caller: Caller) -> Who:
    """Return who asks, and from where, for the audit."""
    proxies = services_of(connection).settings.trusted_proxies
    return Who(caller.name, client_address(connection, proxies), caller)


@contextlib.contextmanager
def place_to_wait(services: Services, caller: Caller) -> Iterator[None]:
    """Hold one of the token's places among the requests that wait.

    Raises:
        TooManyRequests: there is none left.
    """
    if not services.waits.take(caller.token_id):
        raise TooManyRequests("This token has reached its limit of waiting requests.")
    try:
        yield
    finally:
        services.waits.release(caller.token_id)


def sees_today(catalog: Catalog, caller: Caller, agent_id: str) -> bool:
    """Whether the caller may see this agent now, and so its past.

    What was the default once is not seen for that.
    """
    return caller.view.sees(agent_id, agent_id == catalog.default_id)


def services_of(connection: HTTPConnection) -> Services:
    """Return the parts of the server that this request came to."""
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
"""Who asks, and from where, for the audit."""
