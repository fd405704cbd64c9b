"""The prose of docs/performance.md. Holds no figure: those come from the results alone."""

INTRODUCTION = """\
# Performance

How long a change takes to reach a fleet, and what it costs a backend to ask, beside what people
use for it otherwise. Every figure here was taken by `make bench` on one machine in one run, side
by side, and is a **median** over the repeats with the lowest and highest of them behind it; each
repeat takes all contestants in turn. Ratios come first and are taken repeat by repeat: the
machine's noise is in both halves of a ratio, and a time on your machine will be another one.

Run it yourself: `make bench` (about twenty minutes), or `make bench-quick` for a look (two
minutes, one repeat, prints its table and leaves this page alone). Redis, etcd, NATS, PostgreSQL
and Unleash are started and stopped by the bench where they are installed (`make bench-peers` on
Debian); one that is not installed is named as missing. This page is written by the bench: edit
`benchmarks/notes.py`, not the page."""

FANOUT = """\
The server on one core, N WebSocket subscribers (a C program on epoll) on the other. In each
round, on the same connections: a C loop that calls `send()` on each socket with a frame made
beforehand; a real change, from its commit until the last subscriber has the frame, so that the
feed's look at the database and the encoding are in it; and the naive loop, `await send_text` to
one after the other. "Its writes alone" counts from the first subscriber's frame to the last
one's."""

ACCEPT = """\
From connecting to `subscribed`: TCP, (TLS,) HTTP upgrade, token, subscription and its answer, for
{count:,} connections, 128 of them under way at a time."""

PROPAGATION = """\
One writer, and one process with all watchers in one event loop, as a backend's callbacks are;
both unpinned. The time is from before the write is sent to the watcher's callback. The SLM's
callback is `on_change` of the SDK: the change is then validated, applied and in force. The peers'
callbacks have the bytes and nothing else. For 500 watchers each has its own connection."""

POLLING = """\
Unleash 7 on PostgreSQL, {clients} Python SDK clients at their default poll interval of
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
below 1 comes from the shared, leaner HTTP transport that LLMInterface hands to the SDK."""

GROWTH = """\
One server and one connected client for each size, all up at once, asked in turn."""

LOADED = """\
**The machine was not quiet.** Its load was {lowest:.0f} to {highest:.0f} on {cores} cores while
this was taken, so the times here are several times too long, and ratios are blurred too. Take
them for what the bench can show, not for what the SLM can do, until a run on a quiet machine
replaces them."""

UNFINISHED = """\
**The run was cut short.** These benches were not finished and their rows say so: {names}."""

STAMP = """\
In the run kept here the commit was noted only after the feed's own look at the database, some
tenths of a millisecond late: that makes the row of 100 subscribers worthless and means little
from 1,000 on. The bench has been changed since. The run's scheduling priority was raised before
the last two repeats."""
"""Dropped with the first run that is taken after it."""

STAMP_COMMITS = ("ada4b39",)
"""The commits whose results STAMP is about."""

MISSED: dict[str, str] = {
    "fanout-10000": """\
measured on a loaded machine, and no profile was taken on a quiet one yet, so the cause is not
known. What can be said: the naive loop is at about 2 times the C loop, as it was when the
targets were set, while ours is further from it than then; that points at the hub's walk over its
subscribers. To be tried first: fewer objects and layers between the hub and the transport for
each subscriber.""",
    "fanout-1000": "the same as for 10,000; the spread reaches below the target.",
    "accept": """\
measured on a loaded machine. Each connection costs a handshake in Python, a task and the
subscription; handing a subscribed connection to a slimmer protocol would save memory, not this.""",
    "connect": """\
the time is the server's: each key is decrypted for each snapshot, on a core that was shared,
while the backend's own CPU is a tenth of a second. The memory is mostly not held: what the SDK
keeps was traced at 0.8 KiB an agent; the rest is heap that parsing the whole snapshot at once
leaves behind. Parsing it agent by agent would bring the process near to what is kept.""",
    "import": """\
`import pydantic` alone loads little of pydantic 2.14; whoever makes one model loads the rest,
and the SDK makes models. Beside that (the second figure) what is left is our own modules and
models. To meet the target as it is written the SDK would have to do without pydantic at import.""",
}
"""Why a target is missed and what would have to change, by the target's key."""

NOT_EXPLAINED = "not explained yet."
