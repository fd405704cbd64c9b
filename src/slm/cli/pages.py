"""Reads a paginated list; a page may be short and still have a next one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from slm.cli.api_client import Api, ApiAnswer
from slm.cli.target import Target


def collect(
    target: Target, path: str, params: dict[str, Any], *, rows: str, cursor: str, limit: int
) -> ApiAnswer:
    """Return the last page's response with the rows of all pages, up to `limit`.

    Args:
        target: the server.
        path: the list's path.
        params: the parameters of the first page, without its limit.
        rows: the name of the rows in the response.
        cursor: the parameter that takes a response's `next`.
        limit: the maximum number of rows.
    """

    async def all_pages() -> ApiAnswer:
        async with Api(target) as api:
            return await collect_from(api, path, params, rows=rows, cursor=cursor, limit=limit)

    return asyncio.run(all_pages())


async def collect_from(
    api: Api, path: str, params: dict[str, Any], *, rows: str, cursor: str, limit: int
) -> ApiAnswer:
    """Do the same with an open session."""
    found: list[Any] = []
    while True:
        answer = await api.call("GET", path, params=params | {"limit": limit - len(found)})
        page = answer.data.get(rows)
        if not isinstance(page, list):
            return answer
        found += page
        # An older server has no `next`, but its pages are never short.
        following = answer.data.get("next")
        if following is None or len(found) >= limit:
            return replace(answer, data=answer.data | {rows: found})
        params = params | {cursor: following}
