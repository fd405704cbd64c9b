"""Everything the routes work with, in one value. A container; does nothing itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from slm.server.agents.catalog import Catalog
from slm.server.agents.credentials import KeyedReads
from slm.server.agents.registry import AgentRegistry
from slm.server.db.database import Database
from slm.server.encryption.keyring import Keyring, read_keys
from slm.server.encryption.rotation import KeyRotation
from slm.server.fleet.ack_queue import AckQueue
from slm.server.fleet.explain import Explanations
from slm.server.fleet.receipts import Receipts
from slm.server.fleet.replication import FleetSync
from slm.server.fleet.tracker import Fleet
from slm.server.lifecycle.housekeeping import Caretaker
from slm.server.lifecycle.startup import PreparedDatabase
from slm.server.metrics import Metrics
from slm.server.security.audit import AuditLog
from slm.server.security.rate_limits import Gauge, Rate, TokenBuckets
from slm.server.security.token_store import TokenStore
from slm.server.security.token_table import TokenTable
from slm.server.security.token_watch import TokenWatch
from slm.server.settings import Settings
from slm.server.stream.feed import ChangeFeed
from slm.server.stream.hub import Hub
from slm.server.stream.openings import Openings
from slm.server.stream.revocation import Doorkeeper
from slm.server.tasks.supervisor import Supervisor
from slm.server.transport.connections import Connections, connection_limit
from slm.server.transport.process import open_files_limit


@dataclass
class RequestCounts:
    """The request counts that `/metrics` reports."""

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
    reads: KeyedReads
    catalog: Catalog
    hub: Hub
    fleet: Fleet
    fleet_sync: FleetSync
    receipts: Receipts
    explanations: Explanations
    acks: AckQueue
    feed: ChangeFeed
    metrics: Metrics
    tokens: TokenTable
    keyring: Keyring
    rotation: KeyRotation
    token_store: TokenStore
    audit: AuditLog
    failed_logins: TokenBuckets
    writes: TokenBuckets
    streams: Gauge
    waits: Gauge
    openings: Openings
    connections: Connections
    snapshots: Gauge
    doorkeeper: Doorkeeper
    token_watch: TokenWatch
    caretaker: Caretaker
    supervisor: Supervisor
    counts: RequestCounts = field(default_factory=RequestCounts)


def make_services(settings: Settings, prepared: PreparedDatabase) -> Services:
    """Connect the parts with each other; nothing runs yet."""
    catalog, metrics, supervisor = Catalog(), Metrics(), Supervisor()
    tokens = TokenTable(max_age_seconds=settings.max_outage_seconds)
    database = prepared.database
    keyring = Keyring(prepared.vault, lambda: read_keys(settings).keys)
    reads = KeyedReads(database, keyring)
    token_store = TokenStore(database, tokens)
    caretaker = Caretaker(settings, database, keyring, reads, tokens, token_store, supervisor)
    lease = caretaker.lease
    fleet = Fleet(
        lease.id,
        lease.name,
        tokens.name_of,
        settings.behind_after_seconds,
        agent=catalog.agent,
    )
    fleet_sync = FleetSync(
        database, fleet, settings.fleet_interval_seconds, settings.lease_seconds, supervisor
    )
    # They need each other: acks wait for a broadcast, and the hub reports when it has ended.
    acks = AckQueue(lambda: hub.is_writing)
    hub = Hub(settings, fleet, supervisor, on_pushed=metrics.pushed, on_written=acks.written)
    feed = ChangeFeed(database, catalog, hub, tokens, settings, metrics, supervisor)
    return Services(
        settings=settings,
        database=database,
        registry=AgentRegistry(
            database, prepared.vault, reads, keyring, settings.endpoint_policy, feed.committed
        ),
        reads=reads,
        catalog=catalog,
        hub=hub,
        fleet=fleet,
        fleet_sync=fleet_sync,
        receipts=Receipts(database, fleet, fleet_sync),
        explanations=Explanations(database, fleet, hub),
        acks=acks,
        feed=feed,
        metrics=metrics,
        tokens=tokens,
        keyring=keyring,
        rotation=KeyRotation(settings, database, keyring, caretaker.lease),
        token_store=token_store,
        audit=AuditLog(database, lambda seal: keyring.vault.unseal(seal)),
        failed_logins=TokenBuckets(
            Rate(settings.auth_failures_per_second, settings.auth_failures_burst)
        ),
        writes=TokenBuckets(Rate(settings.writes_per_second, settings.writes_burst)),
        streams=Gauge(settings.streams_per_token),
        waits=Gauge(settings.waits_per_token),
        openings=Openings(settings.max_opening_streams, settings.header_timeout_seconds),
        connections=Connections(connection_limit(settings.max_connections, open_files_limit())),
        snapshots=Gauge(settings.max_snapshots),
        doorkeeper=Doorkeeper(tokens, hub, supervisor),
        token_watch=TokenWatch(database, tokens, settings.poll_interval_seconds, supervisor),
        caretaker=caretaker,
        supervisor=supervisor,
    )
