"""What tests of the store share: a prepared database, raw SQL on it, and the laws it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from slm.schemas import Agent
from slm.server.agents.credentials import KeyedReads
from slm.server.agents.mapping import agent_of
from slm.server.agents.registry import AgentRegistry
from slm.server.agents.schemas import AgentCreate
from slm.server.db.database import Database
from slm.server.db.tables import CHANGES, SELECT_AGENTS
from slm.server.encryption.keyring import Keyring
from slm.server.encryption.vault import Vault
from slm.server.lifecycle.startup import prepare
from slm.server.settings import Settings

KEY = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
OTHER_KEY = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVowMTIzNDU="


@dataclass
class Store:
    """A database made ready by `prepare`, and its registry."""

    settings: Settings
    database: Database
    vault: Vault
    registry: AgentRegistry
    reads: KeyedReads
    notes: list[str]

    @classmethod
    async def open(cls, settings: Settings) -> Store:
        """Prepare the database of these settings."""
        prepared = await prepare(settings)
        database, vault = prepared.database, prepared.vault
        keyring = Keyring(vault, tuple)
        reads = KeyedReads(database, keyring)
        registry = AgentRegistry(database, vault, reads, keyring)
        return cls(settings, database, vault, registry, reads, prepared.notes)

    async def close(self) -> None:
        """Close the database."""
        await self.database.close()

    async def sql(self, statement: str, **parameters: Any) -> list[Any]:
        """Run one statement as somebody with a SQL prompt would, and return its rows."""

        def work(connection: Any) -> list[Any]:
            result = connection.execute(text(statement), parameters)
            return list(result.all()) if result.returns_rows else []

        return await self.database.run(work)

    async def agents(self) -> dict[str, Agent]:
        """Return the table, as it is served."""
        rows = await self.database.read(lambda connection: connection.execute(SELECT_AGENTS).all())
        return {agent.agent_id: agent for agent in (agent_of(row) for row in rows)}

    async def agent(self, agent_id: str) -> Agent:
        """Return one agent, as it is served."""
        return (await self.agents())[agent_id]

    async def changes(self) -> list[Any]:
        """Return the change rows, in order."""
        return await self.database.read(
            lambda connection: list(connection.execute(CHANGES.select().order_by("revision")).all())
        )

    async def head(self) -> int:
        """Return the revision of the last committed change."""
        revision: int = (await self.sql("SELECT revision FROM state"))[0][0]
        return revision

    async def check_laws(self) -> None:
        """Assert what holds after any run of writes (docs/protocol.md section 2)."""
        changes = await self.changes()
        head = await self.head()
        assert [change.revision for change in changes] == list(range(1, head + 1))
        agents = await self.agents()
        defaults = [agent for agent in agents.values() if agent.is_default]
        assert len(defaults) == 1
        assert defaults[0].is_active
        assert replay(changes) == agents


def replay(changes: list[Any]) -> dict[str, Agent]:
    """Return the table that the changes lead to, as a cache would build it."""
    agents: dict[str, Agent] = {}
    for change in changes:
        agent = Agent.model_validate_json(change.agent)
        assert agent.agent_id == change.agent_id
        known = agents.pop(change.agent_id, None)
        assert change.was_default == (known is not None and known.is_default)
        match change.type:
            case "agent_deleted":
                assert agent == known
            case "agent_created":
                assert known is None
                assert agent.revision == change.revision
                agents[change.agent_id] = agent
            case "agent_config_changed":
                assert known is not None
                assert agent.revision == change.revision
                agents[change.agent_id] = agent
            case other:
                raise AssertionError(other)
    return agents


def new_agent(agent_id: str = "billing", **fields: Any) -> AgentCreate:
    """Return the body of a POST."""
    return AgentCreate.model_validate(
        {
            "agent_id": agent_id,
            "name": agent_id.title(),
            "llm_provider": "openai",
            "llm_model": "gpt-6.1-sol",
        }
        | fields
    )
