"""The prose of docs/performance.md. It holds no figure of a run: those come from the results."""

from __future__ import annotations

INTRODUCTION = """\
# Performance

How long a change takes to reach a fleet and what it costs a backend to read its configuration,
measured beside products that are used for the same purpose. `make bench` took every figure on this
page. Each section and each target names the date and the file of its figures, which has the
raw values of every repeat.

A figure is the **median** of the repeats, followed by the lowest and highest of them unless all
are the same. Within a bench, each repeat takes all contestants in turn. Ratios are computed repeat
by repeat, which cancels much of the machine's noise; times on your machine will differ. A figure
is of the commit that its section names, which may be older than this page; do not compare benches
of different dates or commits with each other.

Run it yourself: `make bench` takes about fifteen minutes. `make bench-quick` takes two: it measures
smaller sizes once, prints the table of targets and leaves this page alone. The bench starts and
stops Redis, etcd, NATS, PostgreSQL and Unleash where they are installed (`make bench-peers` on
Debian), and names those that are not. The page is generated: edit `benchmarks/report/`, then run
`python -m benchmarks --report`."""

LOADED = """\
**The machine was not quiet.** The load before the benches was {lowest:.0f} to {highest:.0f} on
{cores} cores, so times are too long and ratios less reliable. Measure again on a quiet machine."""

UNFINISHED = """\
**Not everything was measured.** These benches failed or were not run: {names}."""

NOT_HERE = "Not measured here: {missing}."

TAKEN = """\
Taken {taken}, {repeats} repeats in {seconds:.0f} s, commit {commit}, load before
{machine[load_before]:.1f}: `benchmarks/results/{name}.json`."""

FANOUT = """\
The server runs on one core, and a C program with N WebSocket subscribers on the other. Each round
uses the same connections for three things: a C loop that calls `send()` on every socket with a
prepared frame; a real change, from its commit until the last subscriber has the frame; and a naive
loop that awaits `send_text` for one subscriber after the other on uvicorn's protocol objects.
"Writes alone" counts from the first subscriber's frame to the last one's.

"If all ack" is the same change to subscribers that acknowledge it, as every SDK client does; the
other columns are subscribers that only listen. "Program late" is the time from the C loop's last
`send()` to the subscriber program's last frame (negative if the frame was there before the call
returned), and "program busy" the share of its core that the program used. If the program were late,
the ratios to the C loop would look better than they are."""

ACCEPT = """\
From connecting to `subscribed`: TCP, TLS where it is named, HTTP upgrade, token, subscription and
its answer, for {connections:,} connections, 128 at a time."""

PROPAGATION = """\
One writer, and one process with all watchers in one event loop; neither is pinned to a core. Times
run from just before the write is sent to the watcher's callback. SLM's callback is the SDK's
`on_change`, called after the change is validated and applied; the others receive bytes. Each of
500 watchers has its own connection. All clients are Python libraries, so the 500-watcher table
compares those libraries, running 500 times in one process, as much as the servers."""

POLLING = """\
{product} on PostgreSQL with {clients} Python SDK clients at their default poll interval of
{poll_seconds} s, {changes} changes, from the write until a client returns the new value:
p50 **{p50:.1f}** s, p99 **{p99:.1f}** s. The interval can be set; these figures are for the
default."""

READS = """\
One process with {values:,} agents or flags in memory, all with the same value. The figures include
the loop around the call. SLM's client is connected throughout; the others use no network here and
record no metrics or events."""

HTTP = """\
The server on one core with 1,000 agents, each with a key; a load generator in C on the other core
with {connections} kept connections (4 for the keyed snapshot). The server answers reads without
keys from memory, and asks the database for each keyed one."""

DURING = """\
While changes go out to {subscribers:,} subscribers: p50 {p50}, p99 {p99}, of {requests:,} requests
under way during {broadcasts:,} broadcasts."""

STARTUP = """\
Each import runs in a fresh interpreter with the files in the page cache. `import slm` includes
SLMClient and LLMInterface, which load when they are first used."""

CONNECT = """\
`connect()` with {agents:,} agents, each with a key, takes {seconds}, of which {cpu} are the
backend's own CPU. The process is larger by {memory} an agent afterwards."""

LLM = """\
The same chat completion, sent to a local endpoint that answers at once, so that the client's own
work remains. All keep their connection and take turns in one process. "Lean" is the official SDK
on an HTTP client without proxies, netrc and timeouts: its distance to the SDK as it comes is what
those cost, and its distance to LLMInterface is not due to them."""

GROWTH = """\
One server and one connected client for each size, all running at once and measured in turn."""

HISTORY = """\
The server with {rows:,} changes and as many audit entries, asked for {pages} pages of 100 one after
the other. Memory is the most by which the server grew meanwhile. The rows that name a token of one
agent or of none are lists of which that token sees little or nothing."""

MACHINE = """\
{cores} cores of {cpu}, {memory_gib} GiB, {system}, Linux {kernel}, Python {python},
SQLite {sqlite}, {openssl}, databases on {file_system}."""

PLACE = """\
The server runs on the first core and its load on the last, except where a section says that neither
is pinned. All traffic is loopback. A + behind a commit means that files differed from it."""

MISSED = {
    "commit to callback, 1 backend, p50": """\
The time runs from the commit to the SDK's callback in another process; the results do not divide it
further.""",
    "PUT sent to callback, 1 watcher: SLM / etcd watch": """\
Most of the time passes before the commit: the part after it is
"commit to callback, 1 backend". etcd also syncs to disk before it answers, so that sync alone does
not explain the difference.""",
    "`import slm` / `import aiohttp, pydantic`": """\
Most of the time is that of aiohttp and pydantic. Part of the rest are pydantic's models, which
`import pydantic` alone does not load and any program that declares a model does; the section on a
backend's start has each of them.""",
}
"""Why a target is missed, by its label: only what a row of the page shows."""

NOT_EXPLAINED = "The results do not show why."
