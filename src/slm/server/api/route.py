"""The route class: the checks before an endpoint, and where each of its parameters comes from.

A request passes three checks: the token and its scope, the parameters, and the body's type, size
and strict JSON. So no body is read without a token, and no error reveals anything about one.
FastAPI finds the route and writes the OpenAPI document from the same signature
(docs/decisions/0063).
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi import params as marks
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.routing import request_response

from slm.errors import BadRequest, ContentTooLarge, InvalidRequest, UnsupportedMediaType
from slm.server.api.access import Given, Requires, place_to_wait, services_of
from slm.server.api.parameters import NoQuery, QueryModel, UpToDateQuery, WaitQuery, at_least
from slm.server.api.problems import broken_rules
from slm.server.api.scope import ENCODED_SLASH
from slm.server.security.token_table import Caller
from slm.server.services import Services
from slm.server.strict_json import NotStrictJSON, loads

_JSON_TYPE: Final = re.compile(r"application/(json|[\w.-]+\+json)\s*(;.*)?", re.IGNORECASE)

_NO_PLACE: Final = contextlib.nullcontext()

Endpoint = Callable[..., Coroutine[Any, Any, Response]]
Model = TypeVar("Model", bound=BaseModel)


class SLMRoute(APIRoute):
    """A route with the three checks; the OpenAPI document shows its scope."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        requirement = _Signature(self.endpoint).requirement
        if requirement is not None:
            security = {"security": [{"bearer": [requirement.scope]}]}
            self.openapi_extra = (self.openapi_extra or {}) | security
        # Starlette's, since FastAPI's keeps two stacks for kinds of dependency that we do not use.
        self.app = request_response(self.get_route_handler())

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the request handler: the checks, then the endpoint."""
        endpoint: Endpoint = self.endpoint
        signature = _Signature(endpoint)
        requirement = signature.requirement

        async def through_the_doors(request: Request) -> Response:
            services = services_of(request)
            caller = None if requirement is None else requirement.check(request, services)
            query = signature.query_of(request)
            values = signature.values(request, services, caller, query)
            if signature.body is not None:
                name, model = signature.body
                values[name] = await _body(request, services, caller, model)
            if caller is None:
                return await endpoint(**values)
            with _place_to_wait(services, caller, query):
                if request.method != "GET":
                    # A write that was made gets its response; the endpoint checks the token itself.
                    return await endpoint(**values)
                async with services.doorkeeper.while_it_counts(caller):
                    if isinstance(query, UpToDateQuery) and query.min_revision is not None:
                        await at_least(request, services, query.min_revision)
                    return await endpoint(**values)

        return through_the_doors


def _place_to_wait(
    services: Services, caller: Caller, query: QueryModel
) -> contextlib.AbstractContextManager[None]:
    if isinstance(query, WaitQuery) and query.wait is not None:
        return place_to_wait(services, caller)
    return _NO_PLACE


class _Signature:
    """Where each parameter of an endpoint comes from, read once from its annotations.

    Raises:
        TypeError: a parameter has no known source.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.requirement: Requires | None = None
        self.query_of: Callable[[Request], QueryModel] = _reader_of(NoQuery)
        self.body: tuple[str, type[BaseModel]] | None = None
        self._request_name = ""
        self._query_name = ""
        self._given: list[tuple[str, Given]] = []
        self._paths: list[tuple[str, TypeAdapter[Any]]] = []
        hints = get_type_hints(endpoint, include_extras=True)
        for name in inspect.signature(endpoint).parameters:
            self._note(name, hints[name])

    def values(
        self, request: Request, services: Services, caller: Caller | None, query: QueryModel
    ) -> dict[str, Any]:
        """Return the value of every parameter but the body's."""
        values: dict[str, Any] = {
            name: given.take(request, services, caller) for name, given in self._given
        }
        for name, kind in self._paths:
            values[name] = _path_value(request, name, kind)
        if self._request_name:
            values[self._request_name] = request
        if self._query_name:
            values[self._query_name] = query
        return values

    def _note(self, name: str, hint: Any) -> None:
        kind = getattr(hint, "__origin__", hint)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, marks.Depends) and isinstance(mark.dependency, Given):
                self._given.append((name, mark.dependency))
                if isinstance(mark.dependency, Requires):
                    self.requirement = mark.dependency
                return
            if isinstance(mark, marks.Path):
                self._paths.append((name, TypeAdapter(hint)))
                return
            if isinstance(mark, marks.Query) and issubclass(kind, QueryModel):
                self._query_name, self.query_of = name, _reader_of(kind)
                return
        if kind is Request:
            self._request_name = name
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and self.body is None:
            self.body = (name, kind)
        else:
            raise TypeError(f"{name} is neither given, nor in the path, the query or the body")


def _reader_of(model: type[QueryModel]) -> Callable[[Request], QueryModel]:
    """Return a function that parses the query string with this model.

    A misspelt filter is refused: ignoring it would return more than was asked for.
    """
    required = any(field.is_required() for field in model.model_fields.values())
    nothing = None if required else model()

    def read(request: Request) -> QueryModel:
        if nothing is not None and not request.scope["query_string"]:
            return nothing
        pairs = request.query_params.multi_items()
        values = dict(pairs)
        if len(values) < len(pairs):
            what = "a parameter that is there twice"
            raise InvalidRequest(errors=[{"loc": ["query"], "msg": what, "type": "unknown_field"}])
        return _parsed(model, values, "query")

    return read


def _path_value(request: Request, name: str, kind: TypeAdapter[Any]) -> Any:
    text = request.path_params[name].replace(ENCODED_SLASH, "/")
    try:
        return kind.validate_python(text)
    except ValidationError as error:
        broken = [{**each, "loc": ("path", name)} for each in error.errors()]
        raise InvalidRequest(errors=broken_rules(broken)) from None


def _parsed(model: type[Model], value: object, place: str) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        broken = [{**each, "loc": (place, *each["loc"])} for each in error.errors()]
        raise InvalidRequest(errors=broken_rules(broken)) from None


async def _body(
    request: Request, services: Services, caller: Caller | None, model: type[Model]
) -> Model:
    """Return the body of a request.

    Raises:
        UnsupportedMediaType: its content type is not JSON.
        ContentTooLarge: it is larger than allowed.
        BadRequest: it was cut off.
        InvalidRequest: it is not strict JSON, or breaks a rule of the model.
        Unauthorized: the token is no longer valid.
    """
    if not _JSON_TYPE.fullmatch(request.headers.get("content-type", "")):
        raise UnsupportedMediaType("Send the body as application/json.")
    body = await _read_bounded(request, services.settings.max_body_bytes)
    if caller is not None:
        # A body may arrive slowly, and the token may have been revoked meanwhile.
        services.tokens.require(caller)
    try:
        value = loads(body)
    except NotStrictJSON as error:
        rule = {"loc": ["body"], "msg": str(error), "type": "json_invalid"}
        raise InvalidRequest("The body is not JSON as it must be.", [rule]) from None
    return _parsed(model, value, "body")


async def _read_bounded(request: Request, limit: int) -> bytes:
    # The HTTP parser accepts nothing but digits.
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
