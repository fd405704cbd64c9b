"""One SLM as a fault test has it: a database on either engine, and servers that share it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import psycopg
from sqlalchemy import text
from sqlalchemy.engine import make_url

from slm.schemas import Agent
from tests.support.faults import recording
from tests.support.faults.history import Frame
from tests.support.faults.subscriber import CONFIG_FIELDS
from tests.support.servers import InLoopServer, ServerProcess

KEY: Final = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="

QUICK: Final[dict[str, Any]] = {
    "lock_timeout_seconds": 0.5,
    "database_timeout_seconds": 1.0,
    "idle_in_transaction_seconds": 0.5,
    "compact_interval_seconds": 0.1,
}
"""The database's timings at a tenth, no shorter than two busy cores can keep."""


class Site:
    """A database and its servers.

    Args:
        engine: `sqlite` or `postgresql`.
        root: a folder of the test's own.
        database_url: of the empty PostgreSQL database.
        through_url: the way of the servers to it, where that is another one.
    """

    def __init__(
        self, engine: str, root: Path, database_url: str | None, through_url: str | None = None
    ) -> None:
        self.engine = engine
        self.root = root
        self.database_url = database_url
        self.through_url = through_url or database_url

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return what every server of this site is set to."""
        recording.now.databases[id(self)] = self.committed
        shared = QUICK | {"encryption_keys": KEY}
        if self.through_url is not None:
            shared["database_url"] = self.through_url
        return shared | more

    def in_loop(self, number: int = 0, **more: Any) -> InLoopServer:
        """Return a server that will run in the test's own loop."""
        # It stands still whenever the test does; its transactions shall not end for that.
        patient = {"idle_in_transaction_seconds": 5.0, "lock_timeout_seconds": 2.0} | more
        return InLoopServer(self.root / f"replica-{number}", **self.settings(**patient))

    def process(self, number: int = 0, **more: Any) -> ServerProcess:
        """Return a server that will be a process of its own."""
        return ServerProcess(self.root / f"replica-{number}", **self.settings(**more))

    @property
    def admin_token(self) -> str:
        """A token of every scope but key:read; the first server to start wrote it."""
        return self._token("admin")

    @property
    def backend_token(self) -> str:
        """A token of a backend."""
        return self._token("backend")

    def _token(self, name: str) -> str:
        return next(self.root.glob(f"replica-*/{name}.token")).read_text().strip()

    def committed(self) -> dict[tuple[str, int], Frame]:
        """Return the frame that each change in the database stands for.

        It looks past SLM, with the driver alone; on SQLite the server must be stopped.
        """
        return {(epoch, frame["revision"]): frame for epoch, frame in self._frames()}

    def _frames(self) -> Iterator[tuple[str, Frame]]:
        rows = self.rows(
            "SELECT state.epoch, changes.revision, type, agent, change_id FROM changes, state"
            " ORDER BY changes.revision"
        )
        for epoch, revision, kind, agent, change_id in rows:
            yield epoch, wire_frame(kind, revision, agent, change_id)

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        """Return the rows of a statement, asked of the database itself."""
        if self.database_url is None:
            with closing(sqlite3.connect(self.root / "replica-0" / "slm.db", timeout=5)) as there:
                return there.execute(statement).fetchall()
        plain = make_url(self.database_url).set(drivername="postgresql")
        with psycopg.connect(plain.render_as_string(hide_password=False)) as connection:
            return connection.execute(statement.encode()).fetchall()


def wire_frame(kind: str, revision: int, agent: str, change_id: str) -> Frame:
    """Return the change frame of docs/protocol.md section 4 for a row of `changes`."""
    data = Agent.model_validate_json(agent).model_dump(mode="json")
    frame = {
        "type": kind,
        "agent_id": data["agent_id"],
        "revision": revision,
        "change_id": change_id,
    }
    if kind != "agent_deleted":
        frame["config"] = {name: data[name] for name in CONFIG_FIELDS}
    return frame


async def rows_of(server: InLoopServer, statement: str) -> list[Any]:
    """Return the rows of a statement, asked through a running server's own connection."""
    database = server.running.services.database
    return await database.read(lambda connection: list(connection.execute(text(statement)).all()))


@dataclass
class Operator:
    """Whoever changes agents over HTTP.

    Attributes:
        http: the session.
        url: of the server, or a function asked before each request.
        token: of scope agents:write.
    """

    http: aiohttp.ClientSession
    url: str | Callable[[], str]
    token: str

    async def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, Any]:
        """Make one request; return status, headers and what the answer says."""
        url = self.url if isinstance(self.url, str) else self.url()
        async with self.http.request(
            method,
            url + path,
            json=body,
            headers={"Authorization": f"Bearer {self.token}"} | headers,
            timeout=aiohttp.ClientTimeout(total=30),
        ) as answer:
            is_json = answer.content_type.endswith("json")
            said = await answer.json(content_type=None) if is_json else await answer.text()
            return answer.status, answer.headers, said

    async def create(self, agent_id: str, **fields: Any) -> int:
        """Create an agent and return the revision."""
        body = {"agent_id": agent_id, "name": agent_id, "llm_provider": "ollama", "llm_model": "m"}
        status, headers, said = await self.ask("POST", "/api/agents", body | fields)
        assert status == 201, (status, said)
        return int(headers["SLM-Revision"])

    async def set(self, agent_id: str, **fields: Any) -> int:
        """Change an agent and return the revision."""
        status, headers, said = await self.ask("PUT", f"/api/agents/{agent_id}", fields)
        assert status == 200, (status, said)
        return int(headers["SLM-Revision"])

    async def delete(self, agent_id: str) -> int:
        """Delete an agent and return the revision."""
        status, headers, said = await self.ask("DELETE", f"/api/agents/{agent_id}")
        assert status == 204, (status, said)
        return int(headers["SLM-Revision"])

    async def agents(self) -> dict[str, dict[str, Any]]:
        """Return every agent as a subscriber believes it: by agent_id, the frame's fields."""
        status, _, said = await self.ask("GET", "/api/agents")
        assert status == 200, (status, said)
        return {a["agent_id"]: {n: a[n] for n in CONFIG_FIELDS} for a in said["agents"]}
