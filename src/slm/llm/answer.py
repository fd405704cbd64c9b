"""A provider's HTTP response body: read in pieces, decompressed, and limited in size.

Knows nothing about its content or its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aiohttp import ClientResponse


class AnswerUnreadable(Exception):
    """The response is larger than allowed, or its compression is broken or was not requested."""


class Answer:
    """A response with its head received and its body arriving in pieces, decompressed.

    Attributes:
        status: the HTTP status.
        headers: by name, case-insensitive.
        content_type: without parameters, in lower case.
    """

    def __init__(self, response: ClientResponse, max_bytes: int) -> None:
        self._response = response
        self._left = max_bytes
        self._max_bytes = max_bytes
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.content_type = (
            response.headers.get("content-type", "").partition(";")[0].strip().lower()
        )
        self._inflate = _decompressor(response.headers.get("content-encoding", ""))

    async def some(self) -> bytes:
        """Return the next bytes of the body; empty at its end.

        Raises:
            AnswerUnreadable: it is larger than allowed, or its compression is broken.
        """
        while data := await self._response.content.readany():
            if self._inflate is not None:
                data = self._inflated(data, self._inflate)
            self._left -= len(data)
            if self._left < 0:
                raise AnswerUnreadable(f"the answer is larger than {self._max_bytes} bytes")
            if data:
                return data
        return b""

    async def read(self, limit: int | None = None) -> bytes:
        """Return the body, or its first `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        while data := await self.some():
            parts.append(data)
            size += len(data)
            if limit is not None and size >= limit:
                break
        return b"".join(parts)[:limit]

    async def drain(self, seconds: float) -> None:
        """Read the rest if it arrives soon, so that the connection can be reused."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(seconds):
                while await self.some():
                    pass

    def _inflated(self, data: bytes, inflate: Decompressor) -> bytes:
        try:
            # One byte more than allowed is enough to tell; the rest is never decompressed.
            return inflate.decompress(data, self._left + 1)
        except zlib.error:
            raise AnswerUnreadable("the answer is not compressed as it says") from None


class Decompressor(Protocol):
    """The result of `zlib.decompressobj`."""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Decompress the data to at most this many bytes."""


def _decompressor(encoding: str) -> Decompressor | None:
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    raise AnswerUnreadable("the answer is compressed in a way that was not asked for")
