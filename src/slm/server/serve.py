"""serve: the whole server on a socket, from its start to SIGTERM or SIGINT.

Puts uvicorn around the application with our limits; knows no route.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from slm.errors import StartupError
from slm.protocol import MAX_ACK_BYTES
from slm.server import failpoints
from slm.server.app import create_app
from slm.server.lifecycle.startup import PreparedDatabase, prepare
from slm.server.services import Services
from slm.server.settings import Settings
from slm.server.tasks.supervisor import SupervisedTask
from slm.server.transport.acceptor import Acceptor
from slm.server.transport.http_protocol import http_protocol
from slm.server.transport.process import forbid_core_dumps, raise_open_files, tune_interpreter
from slm.server.transport.tls import ServerTls
from slm.server.transport.ws_handshake import handshake_protocol

logger = logging.getLogger(__name__)

FINISH_SECONDS = 5
"""How long running requests may take after a stop; with the closes it stays under ten."""

GIVE_UP_SECONDS = 4
"""How long a transaction may last after a stop; not at all if the database is known to be away.

Less than requests get, so that a request waiting for a transaction learns how it ended.
"""

START_ENDS_SECONDS = 1.5
"""How long an interrupted start may take to end cleanly."""

CLOSED_A_SECOND = 500
"""How many streams a stopping server closes per second; other servers have time for each."""

UNSENT_BYTES = 128 * 1024
"""How much the kernel buffers for a peer that does not read; the rest waits where we count it.

Its own limit is megabytes per connection: a slow reader would be noticed late, and a thousand of
them would take gigabytes that none of our settings limits.
"""

KEEP_ALIVE_SECONDS = 75
"""How long an idle HTTP connection is kept; longer than load balancers keep theirs."""


async def serve(
    settings: Settings,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
    on_note: Callable[[str], None] = logger.info,
) -> None:
    """Run the server until SIGTERM or SIGINT; SIGHUP reloads its TLS certificate.

    For a process that only runs the server: it takes over the process's signals and interpreter.

    Args:
        settings: the operator's settings.
        on_ready: called with the URL, including the actual port, when the server answers.
        on_note: called with each sentence about what was created at the start, and where.

    Raises:
        StartupError: it cannot start; one sentence says why.
    """
    forbid_core_dumps()
    raise_open_files()
    server = SLMServer(settings)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - for the type checker

    def told_to_stop() -> None:
        if not stop.is_set() and not server.url:
            logger.info("asked to stop during the start")
            _exit_within(START_ENDS_SECONDS)
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop)
    loop.add_signal_handler(signal.SIGHUP, server.reload_tls)
    try:
        try:
            url = await server.start()
        except asyncio.CancelledError:
            if stop.is_set():
                return
            raise
        tune_interpreter()
        for note in server.notes:
            on_note(note)
        on_ready(url)
        await stop.wait()
    finally:
        await server.stop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def _exit_within(seconds: float) -> None:
    """End this process after this time, even if a thread hangs on a dead network or in a command.

    Nothing is lost: a start is one transaction, which is rolled back with its connection.
    """
    ending = threading.Timer(seconds, os._exit, args=(0,))
    ending.daemon = True
    ending.start()


class SLMServer:
    """One server in the running loop, without signal handlers: `start` and `stop`.

    Attributes:
        url: where it answers, once started.
        notes: what was created at the start, and where.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = ""
        self.notes: list[str] = []
        self._tls: ServerTls | None = None
        self._prepared: PreparedDatabase | None = None
        self._app: FastAPI | None = None
        self._server: _Uvicorn | None = None
        self._ticking: SupervisedTask | None = None

    @property
    def services(self) -> Services:
        """The parts of the running server."""
        assert self._app is not None, "the server is not started"  # noqa: S101
        services: Services = self._app.state.services
        return services

    async def start(self) -> str:
        """Prepare the database, listen, and return the URL once the server answers.

        Raises:
            StartupError: it cannot start; one sentence says why.
        """
        self._tls = _tls_of(self.settings)
        failpoints.arm(self.settings.failpoint, testing=self.settings.testing)
        self._prepared = await prepare(self.settings)
        try:
            self.notes = self._prepared.notes
            self._app = create_app(self.settings, self._prepared)
            with _listening(self.settings) as listener:
                await self._start_uvicorn(self._app, listener)
                self.url = _url(self.settings, listener)
                for exposed in _exposures(self.settings, listener):
                    logger.warning(exposed)
        except BaseException:
            await self.stop()
            raise
        return self.url

    def reload_tls(self) -> None:
        """Read the TLS certificate again, for new connections."""
        if self._tls is not None:
            self._tls.reload()

    async def stop(self) -> None:
        """Close the streams one by one, finish the requests, and close the database."""
        server, self._server = self._server, None
        ticking, self._ticking = self._ticking, None
        if ticking is not None:
            await ticking.stop()
        if server is not None:
            try:
                await server.stop_in_order()
            except Exception as error:
                # The database is closed whatever happened to the connections.
                logger.error("stopping the connections failed with %s", type(error).__name__)
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await prepared.database.close()

    async def _start_uvicorn(self, app: FastAPI, listener: socket.socket) -> None:
        settings = self.settings
        config = uvicorn.Config(
            app,
            http=http_protocol(
                settings.max_header_bytes,
                settings.header_timeout_seconds,
                app.state.services.connections,
            ),
            ws=handshake_protocol(settings.ping_interval_seconds, settings.ping_timeout_seconds),
            # The largest message is an ack; the application limits others to 64 KiB.
            ws_max_size=MAX_ACK_BYTES,
            ws_ping_interval=None,
            ws_per_message_deflate=False,
            lifespan="on",
            interface="asgi3",
            log_config=None,
            # Its INFO lines contain whole URLs, and a token may have been put into one by mistake.
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=FINISH_SECONDS,
        )
        config.load()
        server = _Uvicorn(config, self)
        await server.begin(listener, None if self._tls is None else self._tls.context())
        self._server = server
        self._ticking = self.services.supervisor.task("uvicorn", server.main_loop)
        self._ticking.start()


class _Uvicorn(uvicorn.Server):
    """uvicorn's server without its signal handlers; it closes the streams one by one."""

    def __init__(self, config: uvicorn.Config, server: SLMServer) -> None:
        super().__init__(config)
        self._slm = server

    async def begin(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Start the application and accept connections.

        Raises:
            StartupError: the application did not start.
        """
        self.lifespan = self.config.lifespan_class(self.config)
        self.servers = []
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise StartupError("The server could not start; its log says why.")
        self.started = True
        # uvicorn sets the Date header in its loop, which has not run yet.
        await self.on_tick(0)
        services, settings = self._slm.services, self._slm.settings
        connections, openings = services.connections, services.openings
        connections.watch(self.server_state.connections, settings.header_timeout_seconds / 4)
        self._acceptor = Acceptor(
            listener,
            self._protocol,
            connections,
            is_busy=lambda: openings.is_busy,
            tls=tls,
            handshake_seconds=settings.tls_handshake_seconds,
        )
        openings.when_free(self._acceptor.get_on)

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    async def stop_in_order(self) -> None:
        """Stop accepting, close the streams one by one, finish the requests, and cut the rest."""
        self._acceptor.close()
        answers = self._slm.services.feed.current
        self._slm.services.database.give_up_in(GIVE_UP_SECONDS if answers else 0)
        self._slm.services.fleet.close()
        hub = self._slm.services.hub
        spread = len(hub.subscribers()) / CLOSED_A_SECOND
        await hub.close_streams(min(spread, self._slm.settings.shutdown_seconds))
        await self.shutdown()
        self._slm.services.connections.stop_watching()
        for connection in list(self.server_state.connections):
            connection.transport.abort()


@contextlib.contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """Bind the port; the socket is closed again if the block fails.

    Raises:
        StartupError: the address is not this machine's, or the port is in use.
    """
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # One address, so that port 0 is one port; IPv4 first, as `localhost` is usually meant.
        family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6() and address[0] == "::"
        listener = socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=dual)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Every accepted connection inherits it.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise StartupError(
            f"The server cannot listen on {settings.host} port {settings.port}:"
            f" {error.strerror or error}."
            + (" Choose another port with --port or SLM_PORT." if taken else "")
        ) from None
    # Accepted sockets inherit it. asyncio sets it by itself only if a socket names its protocol;
    # without it a response or a frame in two writes waits 40 ms for the peer's delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        yield listener
    except BaseException:
        listener.close()
        raise


def _tls_of(settings: Settings) -> ServerTls | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    tls = ServerTls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    # Before the database is touched: a wrong file is the quickest error to report.
    tls.context()
    return tls


def _exposures(settings: Settings, listener: socket.socket) -> Iterator[str]:
    """Yield what an operator must know, at each start, about connections without TLS."""
    if settings.trusted_networks:
        networks = ", ".join(map(str, settings.trusted_networks))
        yield (
            f"API keys are handed out over plain http to {networks} (SLM_TRUSTED_NETWORKS): whoever"
            " can read what is sent there can read the keys, unless something else encrypts it"
        )
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    encrypted = settings.tls_cert or settings.trusted_proxies or settings.trusted_networks
    if not encrypted and not address.is_loopback:
        yield (
            f"listening on {address} without TLS: from other machines nobody can fetch or set an"
            " API key (403 tls-required), SDKs and the command line refuse an http:// address of"
            " another machine, and whoever does connect sends its token in the clear. Set"
            " SLM_TLS_CERT and SLM_TLS_KEY (`slm certs dev` makes some to try with); where a proxy"
            " ends TLS in front of this server, or a mesh encrypts, name it in SLM_TRUSTED_PROXIES"
            " or SLM_TRUSTED_NETWORKS"
        )


def _url(settings: Settings, listener: socket.socket) -> str:
    scheme = "https" if settings.tls_cert is not None else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
