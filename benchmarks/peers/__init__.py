"""What the SLM is held against: for each peer how to start it, write to it and watch it.

Every peer is used as its own documentation shows, through its usual Python client, on loopback,
with one change of about the size of a change frame. None of them knows the SLM.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.peers.base import Peer, Record, Watcher

__all__ = ["PEERS", "Peer", "Record", "Watcher", "load"]

PEERS = {
    "slm": "benchmarks.peers.slm_server:SlmPeer",
    "redis": "benchmarks.peers.redis_pubsub:RedisPeer",
    "etcd": "benchmarks.peers.etcd_watch:EtcdPeer",
    "nats": "benchmarks.peers.nats_kv:NatsPeer",
    "postgres": "benchmarks.peers.postgres_notify:PostgresPeer",
}
"""Peers that push; Unleash, which polls, has a bench of its own."""


def load(name: str) -> type[Peer]:
    """Return the class of a peer; its client library is imported when it is first used."""
    module, _, attribute = PEERS[name].partition(":")
    cls: type[Peer] = getattr(import_module(module), attribute)
    return cls
