"""What the routes share: the route class, the dependencies, and the answers.

A request passes three doors before FastAPI looks at it: the token and its scope, the body's type
and size, and strict JSON. So nobody without a token has a body read, and no error tells of one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Path, Query, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query as QueryParameter
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection

from slm.errors import (
    AgentNotFound,
    BadRequest,
    Behind,
    ContentTooLarge,
    DatabaseUnavailable,
    EncryptionKeyMissing,
    Forbidden,
    InsufficientStorage,
    InternalError,
    InvalidRequest,
    OutcomeUnknown,
    PreconditionFailed,
    ProblemError,
    TooManyRequests,
    Unauthorized,
    UnsupportedMediaType,
)
from slm.server.agents.catalog import Catalog
from slm.server.agents.service import Version
from slm.server.api.middleware import ENCODED_SLASH, STAMP
from slm.server.api.peer import client_address
from slm.server.api.problems import broken_rules, documented
from slm.server.security.audit import Who
from slm.server.security.rate_limits import network_of
from slm.server.security.token_table import Caller
from slm.server.services import Services
from slm.server.strict_json import MAX_INTEGER, NotStrictJSON, loads
from slm.server.transport.connections import TOKEN_SHOWN

_CALLER: Final = "slm.caller"
_JSON_TYPE: Final = re.compile(r"application/(json|[\w.-]+\+json)\s*(;.*)?", re.IGNORECASE)


class Requires:
    """The dependency that a route names its scope with; the caller is its value.

    `SLMRoute` asks it before the body is read, and the API's document takes the scope from it.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Caller:
        """Return the caller that the route's first door let in."""
        caller: Caller = request.scope[_CALLER]
        return caller

    def check(self, connection: HTTPConnection) -> Caller:
        """Return the caller, if its token is known and has the scope.

        Raises:
            Unauthorized: the token is not known.
            DatabaseUnavailable: nobody can know any more which tokens count.
            Forbidden: it lacks the scope.
            TooManyRequests: this address failed too often, or this token writes too often. Who has
                a token that counts is never refused for what others of its address do.
        """
        parts = services_of(connection)
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


def requirement_of(dependant: Dependant) -> Requires | None:
    """Return the scope that a route asks for, or None where it is open to all."""
    for dependency in dependant.dependencies:
        if isinstance(dependency.call, Requires):
            return dependency.call
    return None


class _ReadRequest(Request):
    """A request whose body was read and parsed strictly before FastAPI asks for it."""

    def __init__(self, request: Request, body: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._body = body
        self._json = value


Body = TypeVar("Body", bound=BaseModel)


async def body_of(request: Request, model: type[Body]) -> Body:
    """Return the body of a request that is answered at once, by the rules of all other bodies.

    Raises:
        UnsupportedMediaType: it is not said to be JSON.
        ContentTooLarge: it has more bytes than are taken.
        BadRequest: it was cut off.
        InvalidRequest: it is not strict JSON, or breaks a rule of the model.
    """
    value = await (await _read_strictly(request)).json()
    try:
        # What FastAPI asks of pydantic, so that the errors are the same.
        return model.model_validate(value, from_attributes=True)
    except ValidationError as error:
        broken = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise InvalidRequest(errors=broken_rules(broken)) from None


AtOnce = Callable[[Request, Services, Caller], Coroutine[Any, Any, Response]]
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def answered_at_once(answer: AtOnce) -> Callable[[_Endpoint], _Endpoint]:
    """Have `answer` take the requests without a query string; the endpoint takes the others.

    With nothing to parse, FastAPI's look at the parameters is half the cost of a plain read, and a
    third of what a write costs before and after its transaction.
    """

    def mark(endpoint: _Endpoint) -> _Endpoint:
        _AT_ONCE[endpoint] = answer
        return endpoint

    return mark


_AT_ONCE: Final[dict[Callable[..., Any], AtOnce]] = {}


class SLMRoute(APIRoute):
    """A route with the three doors; its scope is in the API's document too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        requirement = requirement_of(self.dependant)
        if requirement is not None:
            security = {"security": [{"bearer": [requirement.scope]}]}
            self.openapi_extra = (self.openapi_extra or {}) | security

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        handler = super().get_route_handler()
        requirement = requirement_of(self.dependant)
        takes_body = self.body_field is not None
        at_once = _AT_ONCE.get(self.endpoint)
        parameters: set[str] = {
            field.alias
            for field in get_flat_params(self.dependant)
            if isinstance(field.field_info, QueryParameter)
        }

        async def through_the_doors(request: Request) -> Response:
            caller: Caller | None = None
            if requirement is not None:
                caller = request.scope[_CALLER] = requirement.check(request)
            if ENCODED_SLASH in request.scope["path"]:
                request.scope["path_params"] = {
                    name: value.replace(ENCODED_SLASH, "/")
                    for name, value in request.path_params.items()
                }
            if request.scope["query_string"]:
                _refuse_unknown(request, parameters)
            elif at_once is not None and caller is not None:
                return await at_once(request, services_of(request), caller)
            if takes_body:
                request = await _read_strictly(request)
            if caller is None:
                return await handler(request)
            with _place_to_wait(request, caller):
                if request.method != "GET":
                    # What it writes stands, so it is answered; it asks about the token by itself.
                    return await handler(request)
                async with services_of(request).doorkeeper.while_it_counts(caller):
                    return await handler(request)

        return through_the_doors


@contextlib.contextmanager
def _place_to_wait(request: Request, caller: Caller) -> Iterator[None]:
    """Hold one of the token's places among the requests that wait, if this one does.

    Raises:
        TooManyRequests: there is none left.
    """
    if not request.scope["query_string"] or "wait" not in request.query_params:
        yield
        return
    waits = services_of(request).waits
    if not waits.take(caller.token_id):
        raise TooManyRequests("This token has reached its limit of waiting requests.")
    try:
        yield
    finally:
        waits.release(caller.token_id)


def _refuse_unknown(request: Request, parameters: set[str]) -> None:
    """Refuse a misspelt filter, which would answer with more than was asked for."""
    names = [name for name, _ in request.query_params.multi_items()]
    if not parameters.issuperset(names):
        what = "a parameter that is not known"
    elif len(set(names)) < len(names):
        what = "a parameter that is there twice"
    else:
        return
    raise InvalidRequest(errors=[{"loc": ["query"], "msg": what, "type": "unknown_field"}])


async def _read_strictly(request: Request) -> Request:
    content_type = request.headers.get("content-type", "")
    if not _JSON_TYPE.fullmatch(content_type):
        raise UnsupportedMediaType("Send the body as application/json.")
    services = services_of(request)
    body = await _read_bounded(request, services.settings.max_body_bytes)
    caller: Caller | None = request.scope.get(_CALLER)
    if caller is not None:
        # A body may take its time, and the token may have been revoked meanwhile.
        services.tokens.require(caller)
    try:
        value = loads(body)
    except NotStrictJSON as error:
        rule = {"loc": ["body"], "msg": str(error), "type": "json_invalid"}
        raise InvalidRequest("The body is not JSON as it must be.", [rule]) from None
    return _ReadRequest(request, body, value)


async def _read_bounded(request: Request, limit: int) -> bytes:
    # The HTTP parser let only digits through.
    declared = request.headers.get("content-length", "0")
    too_large = ContentTooLarge(f"A body has at most {limit} bytes.")
    if len(declared) > len(str(limit)) or int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise BadRequest("The body was cut off.") from None
    return bytes(body)


def services_of(connection: HTTPConnection) -> Services:
    """Return the parts of the server that this request came to."""
    parts: Services = connection.app.state.services
    return parts


def _known_agent_id(agent_id: str) -> str:
    # A database may refuse to be asked for it; there can be no agent of that name.
    if "\x00" in agent_id:
        raise AgentNotFound
    return agent_id


async def _at_least(
    request: Request,
    min_revision: Annotated[
        int | None,
        Query(ge=0, le=MAX_INTEGER, description="wait until the answer is at least this new"),
    ] = None,
) -> Services:
    """Return the services once the catalog has `min_revision`.

    Raises:
        Behind: it has not within min_revision_wait_seconds.
    """
    services = services_of(request)
    if min_revision is not None:
        seconds = services.settings.min_revision_wait_seconds
        if not await services.feed.passed(min_revision, seconds):
            raise Behind(f"This replica is at revision {services.feed.position}.")
        stamp = request.scope[STAMP]
        stamp.revision, stamp.epoch = services.catalog.revision, services.catalog.epoch
    return services


async def _services(request: Request) -> Services:
    # Not a plain function: FastAPI would run that in a thread.
    return services_of(request)


Parts = Annotated[Services, Depends(_services)]
Reader = Annotated[Caller, Depends(Requires("config:read"))]
KeyReader = Annotated[Caller, Depends(Requires("key:read"))]
Writer = Annotated[Caller, Depends(Requires("agents:write"))]
Admin = Annotated[Caller, Depends(Requires("admin"))]
UpToDate = Annotated[Services, Depends(_at_least)]
AgentIdPath = Annotated[str, Path(), AfterValidator(_known_agent_id)]

READ_PROBLEMS: Final = (
    Unauthorized,
    Forbidden,
    InvalidRequest,
    InternalError,
    Behind,
    DatabaseUnavailable,
)
# A key read is a row in the audit, so it can fail as a write does.
KEYED_PROBLEMS: Final = (
    *READ_PROBLEMS,
    EncryptionKeyMissing,
    InsufficientStorage,
    OutcomeUnknown,
)


def json_response(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer whose JSON is ready."""
    return Response(body, status, headers, media_type="application/json")


def not_modified(etag: str, headers: Mapping[str, str]) -> Response:
    """Return 304: the caller has it already."""
    return Response(None, 304, {**headers, "etag": etag})


def sees_today(services: Services, caller: Caller, agent_id: str) -> bool:
    """Whether the caller may see this agent now, and so its past.

    What was the default once is not seen for that.
    """
    return caller.view.sees(agent_id, agent_id == services.catalog.default_id)


async def catch_up(services: Services, revision: int, change_id: str | None = None) -> bool:
    """Wait until this replica's other answers are not older than one that is of `revision`.

    With the id of the change: until they are of the database that it was committed to, too.
    """
    return await services.feed.settled(revision, change_id)


def revision_headers(revision: int, epoch: str) -> dict[str, str]:
    """Return the headers that name what an answer is of."""
    return {"slm-revision": str(revision), "slm-epoch": epoch}


def catalog_headers(services: Services) -> dict[str, str]:
    """Return the headers of an answer from the catalog as it is now."""
    catalog: Catalog = services.catalog
    headers = revision_headers(catalog.revision, catalog.epoch)
    if not services.feed.current:
        headers["slm-stale"] = "true"
    return headers


_ETAGS: Final = re.compile(r'\s*(?:(W/)?"([\x21\x23-\x7e\x80-\xff]*)"\s*(?:,|$)\s*)+')
_ETAG: Final = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
# As `catalog.agent_etag` makes it; without an epoch it is what a person types. A proxy that
# compresses writes its coding after it: Apache `-gzip`, others `--gzip` or `;br`.
_AGENT_ETAG: Final = re.compile(
    r"(?:([0-9A-Za-z._-]{1,64})-)?([0-9]{1,18})(?:(?:--?|;)(?:gzip|br|deflate|zstd))?"
)


def none_match(headers: Headers, etag: str) -> bool:
    """Say whether If-None-Match lets a full answer through (RFC 9110 section 13.1.2).

    A weak tag is as good as a strong one here; several headers count as one list.
    """
    values = headers.getlist("if-none-match")
    if not values:
        return True
    header = ", ".join(values)
    if header.strip() == "*":
        return False
    return etag.strip('"') not in (tag for _, tag in _ETAG.findall(header))


def versions_matched(headers: Headers) -> list[Version] | None:
    """Return the versions of an agent that If-Match allows (RFC 9110 section 13.1.1); None: any.

    Raises:
        BadRequest: it is not a list of entity tags.
        PreconditionFailed: no tag of it can be an agent's.
    """
    # Strictly, a weak tag never matches here. But it is what a proxy that compresses makes of ours
    # (nginx `W/"…"`), and it names one revision all the same: it is no digest of a text.
    values = headers.getlist("if-match")
    header = ", ".join(values)
    if not values or header.strip() == "*":
        return None
    if not _ETAGS.fullmatch(header):
        raise BadRequest("If-Match takes entity tags, such as an ETag with its quotes.")
    named = [
        Version(int(found[2]), found[1])
        for _, tag in _ETAG.findall(header)
        if (found := _AGENT_ETAG.fullmatch(tag))
    ]
    if not named:
        raise PreconditionFailed
    return named


def problem_responses(*classes: type[ProblemError]) -> dict[int | str, dict[str, Any]]:
    """Return the document of these problems, those that every route can have included."""
    return documented(
        *dict.fromkeys((*classes, Unauthorized, Forbidden, TooManyRequests, InternalError))
    )
