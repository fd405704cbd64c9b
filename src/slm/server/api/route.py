"""The route class: what a request passes before its endpoint, and how its body is read.

A request passes three doors before FastAPI looks at it: the token and its scope, the body's type
and size, and strict JSON. So nobody without a token has a body read, and no error tells of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from fastapi import Request, Response
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query as QueryParameter
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from slm.errors import (
    BadRequest,
    ContentTooLarge,
    InvalidRequest,
    UnsupportedMediaType,
)
from slm.server.api.access import CALLER, place_to_wait, requirement_of, services_of
from slm.server.api.middleware import ENCODED_SLASH
from slm.server.api.problems import broken_rules
from slm.server.security.token_table import Caller
from slm.server.services import Services
from slm.server.strict_json import NotStrictJSON, loads

_JSON_TYPE: Final = re.compile(r"application/(json|[\w.-]+\+json)\s*(;.*)?", re.IGNORECASE)


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
                caller = request.scope[CALLER] = requirement.check(request)
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
            with place_to_wait(request, caller):
                if request.method != "GET":
                    # What it writes stands, so it is answered; it asks about the token by itself.
                    return await handler(request)
                async with services_of(request).doorkeeper.while_it_counts(caller):
                    return await handler(request)

        return through_the_doors


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
    caller: Caller | None = request.scope.get(CALLER)
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
