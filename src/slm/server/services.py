"""What the routes work with, in one value. Holds; does nothing itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from slm.server.auth import TokenTable
from slm.server.catalog import Catalog
from slm.server.database import Database
from slm.server.feed import ChangeFeed
from slm.server.hub import Hub
from slm.server.prepare import Prepared
from slm.server.registry import AgentRegistry
from slm.server.settings import Settings


@dataclass
class RequestCounts:
    """What `/metrics` tells of requests."""

    writes: int = 0
    key_reads: int = 0
    auth_failures: int = 0
    failures: int = 0


@dataclass(frozen=True)
class Services:
    """The parts of one running server."""

    settings: Settings
    database: Database
    registry: AgentRegistry
    catalog: Catalog
    hub: Hub
    feed: ChangeFeed
    tokens: TokenTable
    counts: RequestCounts = field(default_factory=RequestCounts)


def make_services(settings: Settings, prepared: Prepared) -> Services:
    """Put the parts together; nothing runs yet."""
    catalog, hub, tokens = Catalog(), Hub(settings), TokenTable()
    return Services(
        settings=settings,
        database=prepared.database,
        registry=AgentRegistry(prepared.database, prepared.vault),
        catalog=catalog,
        hub=hub,
        feed=ChangeFeed(prepared.database, catalog, hub, tokens, settings),
        tokens=tokens,
    )
