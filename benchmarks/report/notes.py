"""The prose of docs/performance.md.

Holds no figure of a run, which come from the results alone; why a target is missed quotes profiles.
"""

from __future__ import annotations

from dataclasses import dataclass

INTRODUCTION = """\
# Performance

How long a change takes to reach a fleet, and what it costs a backend to ask, beside what people
use for it otherwise. Every figure here was taken by `make bench` {when}, each bench's contestants
side by side, and is a **median** over the repeats with the lowest and highest of them behind it;
each repeat takes all contestants in turn. Ratios come first and are taken repeat by repeat: the
machine's noise is in both halves of a ratio, and a time on your machine will be another one.

Run it yourself: `make bench` (about fifteen minutes), or `make bench-quick` for a look (two
minutes, one repeat, prints its table and leaves this page alone). Redis, etcd, NATS, PostgreSQL
and Unleash are started and stopped by the bench where they are installed (`make bench-peers` on
Debian); one that is not installed is named as not measured. This page is written by the bench: edit
`benchmarks/report/notes.py`, not the page."""

ONE_RUN = "on one machine in one run"
SEVERAL_RUNS = "in several runs"

NOT_ONE_RUN = """\
**This is not one run.** These figures were taken in several runs or of several commits, so those of
one bench are not to be held against another's: {runs}."""

FANOUT = """\
The server on one core, N WebSocket subscribers (a C program on epoll) on the other. In each
round, on the same connections: a C loop that calls `send()` on each socket with a frame made
beforehand; a real change, from its commit until the last subscriber has the frame, so that the
feed and the encoding are in it; and the naive loop, `await send_text` to one after the other, on
uvicorn's own protocol objects. "Its writes alone" counts from the first subscriber's frame to the
last one's."""

ACCEPT = """\
From connecting to `subscribed`: TCP, (TLS,) HTTP upgrade, token, subscription and its answer, for
{count:,} connections, 128 of them under way at a time."""

PROPAGATION = """\
One writer, and one process with all watchers in one event loop, as a backend's callbacks are;
both unpinned. The time is from before the write is sent to the watcher's callback. The SLM's
callback is `on_change` of the SDK: the change is then validated, applied and in force. The peers'
callbacks have the bytes and nothing else. For 500 watchers each has its own connection."""

FANOUT_ACKING = """\
"Acking" is the same change to subscribers that all acknowledge what they have, as the SDK does, so
that the server has their acks to read as well."""

FANOUT_FARM = """\
"Farm late" is how long after the C loop's last `send()` had returned the subscribers' program had
its last frame (below 0: before), and "farm busy" the share of its core that it used meanwhile. Were
it late, the ratios would be the farm's as much as the server's, and too near to 1."""

FARM_LIMITS = """\
**The subscribers' program was a limit itself.** At {sizes} subscribers it was late by more than
5 % of the C loop's time; ratios to the C loop are flattered there."""

POLLING = """\
{product} on PostgreSQL, {clients} Python SDK clients at their default poll interval of
{poll_seconds} s, {changes} changes: from the write until a client answers the new value."""

READS = """\
One process, {values:,} agents or flags in memory, the same value each; every contestant in turn.
The loop around the call is in every figure. For the SLM the stream is live throughout; the others
never touch a network here, and make no metrics or events."""

HTTP = """\
The server on one core with 1,000 agents, each with a key; a load in C over {connections} kept
connections on the other core (4 for the keyed snapshot). Plain reads come from the catalog, keyed
ones from the database, decrypted for each request."""

STARTUP = """\
Each in a fresh interpreter with warm files. `import slm` here has touched SLMClient and
LLMInterface, so that what a backend uses is loaded; a provider's SDK comes with the first call."""

LLM = """\
The same chat completion to an endpoint on loopback that answers at once: what is left is the
client's own work. Both keep their connection; blocks of calls take turns in one process. A ratio
below 1 comes from what LLMInterface leaves out: it speaks the protocol by itself, without the SDK's
models. The SDK is there on a lean HTTP client, too, without proxies, netrc and time-outs."""

GROWTH = """\
One server and one connected client for each size, all up at once, asked in turn."""

HISTORY = """\
The server on {rows:,} changes and as many entries of the audit; one page of 100 after the other is
asked for, {pages} times. Memory is how much more the server held at most while it answered them.
A token of one agent and one of none see little or nothing of what is looked at."""

LOADED = """\
**The machine was not quiet.** Its load was {lowest:.0f} to {highest:.0f} on {cores} cores while
this was taken, so the times here are several times too long, and ratios are blurred too. Take
them for what the bench can show, not for what the SLM can do, until a run on a quiet machine
replaces them."""

UNFINISHED = """\
**Not everything was measured.** These benches have no figures, because they failed or were not
run: {names}."""

NOT_HERE = "Not measured here: {missing}."


@dataclass(frozen=True)
class Missed:
    """Why a target is missed, from profiles, and one thing that would have to change."""

    why: str
    remedy: str


MISSED = {
    "fanout-10000": Missed(
        """\
Each write costs what C's does and some 2 microseconds of Python. On one loaded machine, with
nothing else in the loop, `os.write` to every socket took 1.08 times as long as the C loop; plain
`transport.write`, the connection with its checks and the hub's whole walk lay between 1.14 and
1.32, within each other's noise. Part of it is a turn for everyone else after 200 writes, for which
GETs are answered within 20 ms meanwhile.""",
        "the writes of a broadcast in C, many sockets in one call.",
    ),
    "fanout-1000": Missed(
        """\
The same as for 10,000, and what comes before the first write counts for ten times as much: from
the commit to the loop, through the encoding, to the first write it is 0.2 ms on an idle server,
where each step finds cold caches, and half of that on a busy one.""",
        "the frame encoded by the thread that commits, so that the loop only writes.",
    ),
    "accept": Missed(
        """\
430 microseconds of CPU a connection, spread thinly: the handshake in Python through HTTP and
WebSocket parsers, FastAPI's way to the route, a task, the subscription. The cyclic collector took
another 290 until the serving process was told to look less often.""",
        "an upgrade answered by a parser in C, before the application.",
    ),
    "connect": Missed(
        """\
The time is the server's, 0.4 s of CPU for 10,000 keys: a third Fernet, a third reading and
checking the rows, the rest encoding; the backend takes 0.1 s. The memory is what the SDK holds,
0.8 KiB an agent, and the heap that parsing a whole snapshot leaves behind; each row is let go of as
it is taken over, which makes it 1.8 KiB in all rather than 2.0.""",
        """\
for the time, keys decrypted by one call in C rather than Fernet's several steps in Python; for the
memory, a snapshot read agent by agent out of the text, which was measured at 0.9 KiB in all, and
nearly twice the time.""",
    ),
    "import": Missed(
        """\
Some 170 ms are aiohttp and pydantic themselves. pydantic's models are some 28 more, which
`import pydantic` alone leaves out and whoever declares one model loads (the second figure is beside
that). What is SLM's own is some 30, compiled: it declares 27 models and 15 dataclasses and builds
no model yet; the protocol takes 4, the schemas 3, the LLM's values 3, the rest smaller pieces.""",
        """\
messages without pydantic; or parts loaded when they are first asked for, which would only move the
cost to `connect()`.""",
    ),
    "commit-1": Missed(
        """\
It is wake-ups: the write's thread wakes the loop, the loop the broadcast, the kernel the backend.
From the commit to the first write it is 0.2 to 0.3 ms, with nothing read back from the database;
then a core is woken for the backend, whose own part (read, parse, check, apply, call back) is 0.03
in a busy process and several times that in one whose caches are cold. Pinned and busy all of it is
less.""",
        """\
one hand-over fewer, with the thread that commits writing to the sockets itself, which would then no
longer be the loop's alone.""",
    ),
    "commit-500": Missed(
        """\
500 backends in one process are 500 times read, parse, check, apply and call back in one
interpreter, some 30 microseconds of CPU each; each message is taken in the turn of the loop that
reads it, and in a loop that is behind acks come after the callbacks. Telling several changes at
once would not help one change.""",
        "one stream for all clients of a process, so that a change is read and parsed once.",
    ),
    "put-1": Missed(
        """\
An idle server finds everything cold. Seen from inside one, with 5 ms between writes, 2.0 ms lie
between the request's last byte and the first write to a stream: the way in (HTTP, token, routing,
validation) 0.6, the hop to the database's thread 0.1, the statements 0.5, the commit with its
fsync 0.5, the way to the socket 0.2. Without the pause the same code takes 0.8 in all. The rest is
the two peers' own work. etcd does it all in compiled code. Two things were tried: with uvloop in
the server the whole was 2.5 ms beside 2.5 without, and with both cores kept awake by a spinner of
idle priority 2.0 to 2.2, etcd's being 1.1 in both. So it is not the loop, and little of it is the
cores' waking; it is SLM's own Python on cold caches.""",
        """\
a shorter way in than FastAPI's through its middlewares and routes, and fewer statements for the
audit's chain.""",
    ),
    "put-500": Missed(
        """\
It is the write, as with 1 backend, and then 500 callbacks in one interpreter, each of which parses,
checks and applies the change, where the peers' have the bytes and nothing else.""",
        "the shorter way in for a write, and one stream for all clients of a process.",
    ),
}
"""By the target's key."""

NOT_EXPLAINED = Missed("Not explained yet.", "not known before there is a profile.")
