"""Every agent in memory at one revision, its responses ready as bytes.

Only the feed changes it. Holds no key and no ciphertext, since `schemas.Agent` has neither. Knows
no database and no HTTP.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from slm.schemas import Agent
from slm.server.agents.changes import CommittedChange
from slm.server.security.agent_scope import EVERYTHING, View

GZIP_LEVEL: Final = 5
"""A higher level makes a list hardly smaller and takes twice as long."""


class CatalogEntry:
    """One agent in the catalog, encoded when first requested."""

    def __init__(self, agent: Agent, epoch: str) -> None:
        self.agent = agent
        self._epoch = epoch

    @cached_property
    def body(self) -> bytes:
        """The agent as JSON."""
        return self.agent.model_dump_json().encode()

    @cached_property
    def etag(self) -> str:
        """The entity tag (protocol section 3)."""
        return agent_etag(self._epoch, self.agent.revision)

    @cached_property
    def searchable(self) -> str:
        """The text that `search` looks through, case-folded."""
        agent = self.agent
        return "\n".join((agent.agent_id, agent.name, agent.description or "")).casefold()


def agent_etag(epoch: str, revision: int) -> str:
    """Return the entity tag of an agent: the epoch and the revision of its last change."""
    return f'"{epoch}-{revision}"'


@dataclass(frozen=True)
class AgentFilter:
    """Which agents to list: those in the view; a field that is None does not filter."""

    agent_id: str | None = None
    search: str | None = None
    provider: str | None = None
    is_active: bool | None = None
    view: View = EVERYTHING

    def matches(self, entry: CatalogEntry) -> bool:
        """Return whether the agent is in the list."""
        agent = entry.agent
        return (
            self.view.sees(agent.agent_id, agent.is_default)
            and (self.agent_id is None or agent.agent_id == self.agent_id)
            and (self.provider is None or agent.llm_provider == self.provider)
            and (self.is_active is None or agent.is_active == self.is_active)
            and (self.search is None or self.search.casefold() in entry.searchable)
        )


EVERY_AGENT = AgentFilter()


class Catalog:
    """All agents at `revision` of `epoch`; each method that is not async runs in one loop step.

    Attributes:
        revision: the revision of the last change it holds.
        epoch: the epoch that the revision belongs to.
        change_id: the id of the change that made the revision.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.epoch = ""
        self.change_id = ""
        self._entries: dict[str, CatalogEntry] = {}
        self._default_id: str | None = None
        self._whole_list: bytes | None = None
        self._compressed: asyncio.Future[bytes] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, agents: Iterable[Agent], revision: int, epoch: str, change_id: str = "") -> None:
        """Replace everything; `agents` come in the order of their ids."""
        self._entries = {agent.agent_id: CatalogEntry(agent, epoch) for agent in agents}
        self._default_id = next(
            (e.agent.agent_id for e in self._entries.values() if e.agent.is_default), None
        )
        self.revision, self.epoch, self.change_id = revision, epoch, change_id
        self._whole_list = self._compressed = None

    def apply(self, changes: Sequence[CommittedChange], head: int) -> None:
        """Move to `head`; `changes` are all changes after `revision` up to it, in order."""
        for change in changes:
            agent = change.agent
            agent_id = agent.agent_id
            if change.deletes:
                self._entries.pop(agent_id, None)
            else:
                # A new id is higher than all others, so the dict stays in the order of the ids.
                self._entries[agent_id] = CatalogEntry(agent, self.epoch)
            if agent.is_default and not change.deletes:
                self._default_id = agent_id
            elif self._default_id == agent_id:
                self._default_id = None
        self.revision = head
        if changes:
            self.change_id = changes[-1].change_id
        self._whole_list = self._compressed = None

    def get(self, agent_id: str) -> CatalogEntry | None:
        """Return the agent with exactly this agent_id."""
        return self._entries.get(agent_id)

    @property
    def default_id(self) -> str | None:
        """The agent_id of the current default."""
        return self._default_id

    def agent(self, agent_id: str) -> Agent | None:
        """Return the agent with exactly this agent_id, without its encoded responses."""
        entry = self._entries.get(agent_id)
        return None if entry is None else entry.agent

    def default(self) -> CatalogEntry | None:
        """Return the current default agent."""
        return None if self._default_id is None else self._entries.get(self._default_id)

    def agents(self) -> list[Agent]:
        """Return every agent, in the order of the ids."""
        return [entry.agent for entry in self._entries.values()]

    def list_body(
        self, wanted: AgentFilter = EVERY_AGENT, *, limit: int | None = None, offset: int = 0
    ) -> bytes:
        """Return the JSON of GET /api/agents; `total` is the number before limit and offset."""
        if wanted == EVERY_AGENT and limit is None and not offset:
            if self._whole_list is None:
                self._whole_list = self._encode(list(self._entries.values()), len(self._entries))
            return self._whole_list
        found = [entry for entry in self._entries.values() if wanted.matches(entry)]
        stop = None if limit is None else offset + limit
        return self._encode(found[offset:stop], len(found))

    async def compressed_list(self) -> bytes:
        """Return the gzip of GET /api/agents, compressed once per revision.

        It has the revision at which it was requested, even if a change comes meanwhile.
        """
        if self._compressed is None:
            body = self.list_body()
            # In a thread: ten thousand agents take 50 ms, which would hold up the streams.
            compressing = asyncio.to_thread(gzip.compress, body, GZIP_LEVEL, mtime=0)
            self._compressed = asyncio.ensure_future(compressing)
        return await asyncio.shield(self._compressed)

    def _encode(self, entries: Sequence[CatalogEntry], total: int) -> bytes:
        bodies = b",".join(entry.body for entry in entries)
        # An epoch is hexadecimal and needs no escaping.
        tail = f'],"total":{total},"revision":{self.revision},"epoch":"{self.epoch}"}}'
        return b'{"agents":[' + bodies + tail.encode()
