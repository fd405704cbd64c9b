"""One HTTP call to a provider: sends it, reads the response, resends without refused parameters.

Knows no provider: each adapter translates a request and reads a response. The only retry here is
for a parameter that the model refuses and that the request can do without.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, TypeVar

from slm import __version__
from slm.endpoints import origin
from slm.llm.answer import Answer
from slm.llm.providers.adjustments import REASONING, Adjustments
from slm.llm.providers.base import (
    PARTS,
    Accumulator,
    ChatRequest,
    Completion,
    End,
    Message,
    StreamChunk,
    ToolCallDelta,
    parts_of,
    translated,
)
from slm.llm.providers.failures import (
    OF_NO_PROTOCOL,
    Failure,
    Refused,
    Unsupported,
    failure_of,
    not_an_answer,
    refused,
)
from slm.llm.providers.parsing import AnswerParser
from slm.llm.providers.wire import Body, Done, ServerSentEvent, StreamReader, json_of
from slm.llm.providers.words import Words, error_in_answer
from slm.llm.transport import Connections

T = TypeVar("T")

GRACE_SECONDS: Final = 0.25
"""How long a stream may continue after its finish reason.

Some servers send the usage after it; others keep the connection open and send nothing more.
"""

MAX_ORIGINS: Final = 256
_DRAIN_SECONDS: Final = 0.05
_ERROR_SECONDS: Final = 5.0
_MAX_ERROR_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as it is sent."""

    request: ChatRequest
    place: str
    url: str
    path: str
    body: dict[str, Any]
    adjusted: tuple[str, ...]
    other_header: bool


class HTTPProvider:
    """The common base of the adapters; see `slm.llm.providers.base.Provider`."""

    name: ClassVar[str]
    route: ClassVar[str]
    lines: ClassVar[bool] = False
    renamed: ClassVar[Mapping[str, str]] = {}
    # Every successful response contains one of these.
    members: ClassVar[frozenset[str]] = frozenset()

    # Another header that some servers expect the key in, and what they say if it is missing.
    other_key_header: ClassVar[str] = "api-key"
    other_key_words: ClassVar[re.Pattern[str]] = re.compile(r"subscription key|\bapi-key\b")

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._adjustments = Adjustments(self.renamed)
        # Origins that only accept the key in the other header.
        self._others: OrderedDict[str, None] = OrderedDict()

    # --- overridden by adapters ---

    def headers(self, request: ChatRequest, *, other: bool) -> dict[str, str]:
        """Return the headers for this protocol."""
        secret = request.secret()
        if secret is None:
            return {}
        if other:
            return {self.other_key_header: secret}
        return {"Authorization": f"Bearer {secret}"}

    def body(self, request: ChatRequest, *, streamed: bool) -> tuple[dict[str, Any], list[str]]:
        """Return the request's body, and what in it differs from the agent's configuration."""
        raise NotImplementedError

    def completion(self, answer: Mapping[str, Any]) -> Completion:
        """Parse a whole response; raises any exception if it does not follow the protocol."""
        raise NotImplementedError

    def parser(self, request: ChatRequest) -> AnswerParser:
        """Return a parser for one stream."""
        raise NotImplementedError

    def learn(self, sent: Sent, error: Refused) -> bool:
        """Return whether the request should be sent again with a change."""
        if error.status == 401 and sent.request.key is not None:
            return self._learn_key_header(sent, error)
        earlier = _earlier_members(sent.request.messages, self.name, sent.place)
        return self._adjustments.learn(
            sent.place, sent.request.model, sent.body, error, earlier=earlier
        )

    def _learn_key_header(self, sent: Sent, error: Refused) -> bool:
        if sent.other_header:
            # The key was wrong, not its header.
            self._others.pop(sent.place, None)
            return False
        if not self.other_key_words.search(error.words.text.lower()):
            return False
        self._others[sent.place] = None
        if len(self._others) > MAX_ORIGINS:
            self._others.popitem(last=False)
        return True

    # --- the call ---

    async def chat(self, request: ChatRequest) -> Completion:
        """Return the whole response."""
        while True:
            sent = self._fitted(request, streamed=False)
            try:
                async with self._post(sent) as answer:
                    completion = self._read(await answer.read(), answer, sent)
            except Refused as error:
                if not self.learn(sent, error):
                    raise
                continue
            return replace(completion, adjusted=sent.adjusted)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[StreamChunk, None]:
        """Yield the response as it arrives."""
        while True:
            sent = self._fitted(request, streamed=True)
            begun = False
            try:
                async with (
                    self._post(sent) as answer,
                    contextlib.aclosing(self._chunks(sent, answer)) as chunks,
                ):
                    async for chunk in chunks:
                        begun = True
                        yield chunk
            except Refused as error:
                if begun or not self.learn(sent, error):
                    raise
                continue
            return

    def secrets(self, endpoint: str) -> list[str]:
        """Return other secrets sent to the endpoint, which an error must not repeat."""
        return self._connections.secrets(origin(self.name, endpoint))

    def explain(self, error: Exception) -> Failure:
        """Return the meaning of an exception from `chat` or `stream`."""
        return failure_of(error)

    def _fitted(self, request: ChatRequest, *, streamed: bool) -> Sent:
        place = origin(self.name, request.endpoint)
        own: list[str] = []
        if self._adjustments.refuses(place, request.model, REASONING):
            bare = [{k: v for k, v in each.items() if k != PARTS} for each in request.messages]
            if any(parts_of(message, self.name, place) for message in request.messages):
                own.append(f"{REASONING} dropped")
            request = replace(request, messages=bare)
        body, more = translated(functools.partial(self.body, streamed=streamed), request)
        adjusted = self._adjustments.applied(place, request.model, body)
        url, path = url_of(request.endpoint, self.route)
        other = place in self._others
        return Sent(request, place, url, path, body, (*own, *more, *adjusted), other)

    @contextlib.asynccontextmanager
    async def _post(self, sent: Sent) -> AsyncIterator[Answer]:
        data = _encoded(sent.body)
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream, application/x-ndjson",
            # Compressed streams arrive late, so none is requested; decompression is limited anyway.
            "Accept-Encoding": "identity",
            "User-Agent": f"autobot-slm/{__version__}",
            **self.headers(sent.request, other=sent.other_header),
        }
        async with self._connections.post(
            sent.url, data, headers, bound_to=sent.place, secret=sent.request.secret()
        ) as answer:
            if not 200 <= answer.status < 300:
                raise await self._refusal(answer, sent)
            yield answer

    async def _refusal(self, answer: Answer, sent: Sent) -> Refused:
        data = b""
        # The status is enough if the body breaks off or never ends.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ERROR_SECONDS):
                data = await answer.read(_MAX_ERROR_BYTES)
        return refused(answer.status, data.decode("utf-8", "replace"), answer.headers, sent.path)

    def _read(self, data: bytes, answer: Answer, sent: Sent) -> Completion:
        """Parse these bytes as a whole response, or as a stream that was not requested."""
        value = _json_or_none(data)
        if value is not None:
            return self._whole(value, data, answer, sent)
        reader = StreamReader(answer.content_type, lines=self.lines)
        parser = self.parser(sent.request)
        received = Accumulator()
        for item in (*reader.feed(data), *reader.end()):
            if isinstance(item, Body):
                raise _no_answer(item.data, sent)
            if isinstance(item, Done):
                parser.done = True
            elif not parser.done:
                self._raise_error_in(item.value, answer, sent)
                received.add(parser.take(item) or StreamChunk())
        received.add(parser.end() or StreamChunk())
        if not received.ended:
            raise _no_answer(data, sent)
        return received.completion()

    def _whole(self, value: Any, data: bytes, answer: Answer, sent: Sent) -> Completion:
        self._raise_error_in(value, answer, sent)
        if not isinstance(value, dict):
            raise _no_answer(data, sent)
        with contextlib.suppress(*OF_NO_PROTOCOL):
            return self.completion(value)
        raise _no_answer(data, sent)

    async def _chunks(self, sent: Sent, answer: Answer) -> AsyncGenerator[StreamChunk, None]:
        reader = StreamReader(answer.content_type, lines=self.lines)
        parser = self.parser(sent.request)
        head = b""
        more = True
        while more and not parser.done:
            items: Iterable[ServerSentEvent | Done | Body | Exception]
            try:
                data = await _some(answer, parser.finish_reason is not None)
            except Exception as error:
                items = (error,)
            else:
                more = bool(data)
                head = head or data[:_MAX_ERROR_BYTES]
                items = _caught(reader.feed(data) if more else reader.end())
            for item in items:
                if parser.done:
                    break
                if isinstance(item, Exception):
                    # Whatever breaks after the finish reason, the response is complete.
                    if parser.finish_reason is None:
                        raise item
                    more = False
                    break
                if isinstance(item, Body):
                    # Read it as what it is, without asking again: it has been paid for.
                    whole = self._whole(_json_or_none(item.data), item.data, answer, sent)
                    yield _as_chunk(whole, sent.adjusted)
                    return
                if isinstance(item, Done):
                    parser.done = True
                    break
                if parser.finish_reason is None:
                    self._raise_error_in(item.value, answer, sent)
                    if self.lines and not self.members & item.value.keys():
                        raise _no_answer(head, sent)
                chunk = parser.take(item)
                if chunk is not None:
                    yield chunk
        last = parser.end()
        if last is None and self.lines and _json_or_none(head) == []:
            raise _no_answer(head, sent)
        if last is not None:
            end = replace(last.end or End(), adjusted=sent.adjusted)
            yield replace(last, end=end)
            if more:
                await answer.drain(_DRAIN_SECONDS)

    def _raise_error_in(self, value: Any, answer: Answer, sent: Sent) -> None:
        if error_in_answer(value, self.members):
            raise refused(200, value, answer.headers, sent.path, in_answer=True)


@functools.lru_cache(maxsize=1024)
def url_of(endpoint: str, route: str) -> tuple[str, str]:
    """Return the URL to request, and its path without the query.

    Keeps the endpoint's query. If the endpoint already ends with the route, as an adopted row's
    may, the route is not added again.

    Args:
        endpoint: the base URL.
        route: what the protocol adds to its path.
    """
    base, mark, query = endpoint.partition("?")
    url = base.rstrip("/").removesuffix(route) + route
    return url + mark + query, "/" + url.partition("://")[2].partition("/")[2]


def _caught(items: Iterable[T]) -> Iterator[T | Exception]:
    """Yield the items, then any exception; the caller handles what came before it."""
    try:
        yield from items
    except Exception as error:
        yield error


async def _some(answer: Answer, finished: bool) -> bytes:
    if not finished:
        return await answer.some()
    async with asyncio.timeout(GRACE_SECONDS):
        return await answer.some()


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(
            body, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_dict
        )
        return text.encode()
    except (ValueError, TypeError, RecursionError):
        pass
    raise Unsupported("the request holds a value that JSON cannot carry")


def _earlier_members(messages: Sequence[Message], provider: str, place: str) -> set[str]:
    """Return the names of provider-specific fields that are sent back to the provider."""
    found: set[str] = set()
    for message in messages:
        parts = parts_of(message, provider, place)
        found |= parts.get("message", {}).keys()
        for extra in parts.get("tool_calls", {}).values():
            found |= extra.keys()
    return found


def _as_dict(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError("not JSON")


def _json_or_none(data: bytes) -> Any:
    try:
        return json_of(data)
    except (ValueError, RecursionError):
        return None


def _no_answer(data: bytes, sent: Sent) -> Refused:
    return Refused(200, Words(""), not_an_answer(data[:_MAX_ERROR_BYTES], sent.path))


def _as_chunk(whole: Completion, adjusted: tuple[str, ...]) -> StreamChunk:
    return StreamChunk(
        text=whole.text,
        reasoning=whole.reasoning,
        tool_calls=tuple(
            ToolCallDelta(
                index=index, id=call.id, name=call.name, arguments_json=call.arguments_json
            )
            for index, call in enumerate(whole.tool_calls)
        ),
        finish_reason=whole.finish_reason,
        usage=whole.usage,
        end=End(tool_calls=whole.tool_calls, parts=whole.parts, adjusted=adjusted),
    )
