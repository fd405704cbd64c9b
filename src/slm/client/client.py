"""SLMClient: what a backend holds, from its connecting to its closing, in one loop or many.

It puts the parts together: `sync` keeps the cache equal to the SLM, `chain` answers from it. While
live an answer is one lookup in a dict: no lock, no clock, no await that waits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from pydantic import SecretStr

from slm.client.cache import AgentConfigCache
from slm.client.chain import Chain
from slm.client.config import ResolvedConfig
from slm.client.explain import explain_steps
from slm.client.hooks import Hooks, OnChange, Validator
from slm.client.in_use import InUse, KeysInUse
from slm.client.options import read_options
from slm.client.retry import ClientStatus
from slm.client.snapshot_file import Contents, Saver, SnapshotFile
from slm.client.sync import Synchroniser
from slm.client.timings import Timings, check_seconds
from slm.client.tls import ClientCert
from slm.errors import ConfigurationError, SLMError
from slm.protocol import ClientInfo, Explanation, storable

_log = logging.getLogger("slm.client")
_T = TypeVar("_T")

_NOTHING: Final[Mapping[str, ResolvedConfig]] = {}


class SLMClient:
    """A backend's view of its SLM: every agent's LLM configuration, live (docs/protocol.md 5).

    Make one for each process and share it; it belongs to the event loop in which it is connected.
    `connect` (or `async with`) starts it; a client that is asked before connects by itself.

    Args:
        slm_url: the SLM's address, an http(s) or ws(s) URL; plain http for this machine alone.
            Several, as a list or separated by commas, are tried in turn. Else SLM_URL.
        token: the bearer token; else `token_file`, SLM_TOKEN or SLM_TOKEN_FILE.
        token_file: a file that holds it; read anew for each connection, so it may be replaced.
        cache_file: where to keep the last known good configuration for a start without the SLM;
            else SLM_CACHE_FILE.
        cache_key: a Fernet key that encrypts that file; without one no API key is in it. Else
            SLM_CACHE_KEY.
        ca_file: the PEM file of a private CA; certificates are verified against it alone. Else
            SLM_CA_FILE.
        client_cert: this backend's own certificate, for an SLM that asks for one: a PEM file with
            certificate and key, or a pair of files. Else SLM_CLIENT_CERT and SLM_CLIENT_KEY.
            These files may be replaced while the backend runs, like the token's.
        name: what this backend is called in the SLM's fleet view; else SLM_NAME, else the host's
            name.
        proxy: the URL of an HTTP proxy on the way to the SLM, with a user name and password where
            it wants them; else SLM_PROXY.
        trust_env: whether HTTP_PROXY, HTTPS_PROXY and NO_PROXY count, where no proxy is named.
        allow_insecure: allows plain http to another machine, where something else encrypts what is
            sent. It is logged at each start. Else SLM_ALLOW_INSECURE=1.
        strict: raise instead of answering with the default agent or the built-in values.
        ttl_seconds: without a live stream, after how long a value is refreshed and counts as stale.
        start_timeout: how long `connect` waits for the SLM at most, in seconds.
        key_wait: how long an answer waits for a key that changed a moment ago, in seconds.
        max_stale_seconds: how long past the TTL a value may still be served; None: for ever.
        timings: every other duration.

    Raises:
        ConfigurationError: an argument or a variable makes no sense, or there is no address or no
            token.
    """

    def __init__(
        self,
        slm_url: str | Sequence[str] | None = None,
        token: str | SecretStr | None = None,
        token_file: str | os.PathLike[str] | None = None,
        *,
        cache_file: str | os.PathLike[str] | None = None,
        cache_key: str | SecretStr | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        client_cert: ClientCert | None = None,
        name: str | None = None,
        proxy: str | SecretStr | None = None,
        trust_env: bool = False,
        allow_insecure: bool | None = None,
        strict: bool = False,
        ttl_seconds: float = 300,
        start_timeout: float = 5,
        key_wait: float = 2,
        max_stale_seconds: float | None = None,
        timings: Timings | None = None,
    ) -> None:
        self._options = read_options(
            slm_url,
            token,
            token_file,
            cache_file=cache_file,
            cache_key=cache_key,
            ca_file=ca_file,
            client_cert=client_cert,
            name=name,
            proxy=proxy,
            trust_env=trust_env,
            allow_insecure=allow_insecure,
        )
        self._file = self._options.file
        self._instance = uuid.uuid4().hex[:12]
        self._start_timeout = check_seconds("start_timeout", start_timeout)
        self._key_wait = check_seconds("key_wait", key_wait)
        self._timings = timings or Timings()
        self._cache = AgentConfigCache(ttl_seconds, max_stale_seconds=max_stale_seconds)
        # What may be answered without a second look: the cache's own dict while live, else nothing.
        self._hot = _NOTHING
        self._sync: Synchroniser | None = None
        self._closed = False
        self._hooks = Hooks(self._judge_anew)
        self._in_use = KeysInUse()
        self._cache.refused = self._hooks.refusal
        self._chain = Chain(self._cache, self._key_wait, strict=strict)
        self._saver: Saver | None = None
        _clients.add(self)

    # --- life ---

    async def connect(self) -> None:
        """Start following the SLM, and wait up to `start_timeout` until its state is here.

        Returns in any case, at once where the SLM refuses the token: `status` and `last_error` say
        how things stand, and trying goes on in the background.
        """
        self._closed = False
        sync = self._started()
        try:
            async with asyncio.timeout(self._start_timeout):
                await sync.settled.wait()
        except TimeoutError:
            sync.settled.set()  # long enough for all who wait
            _log.warning(
                "the SLM at %s did not answer within %g s: %s; trying on in the background",
                self._options.site,
                self._start_timeout,
                sync.last_error or "no answer yet",
            )

    async def close(self) -> None:
        """Stop following the SLM; what is known can still be asked for."""
        self._closed = True
        self._hot = _NOTHING
        sync, self._sync = self._sync, None
        if sync is not None:
            await sync.close()
        if self._saver is not None:
            await self._saver.close()

    async def __aenter__(self) -> SLMClient:
        await self.connect()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def status(self) -> ClientStatus:
        """How this client stands to its SLM."""
        if self._closed:
            return ClientStatus.CLOSED
        return self._sync.status if self._sync is not None else ClientStatus.STARTING

    @property
    def last_error(self) -> str | None:
        """What failed last, as a sentence without secrets; None while all is well."""
        return self._sync.last_error if self._sync is not None else None

    @property
    def revision(self) -> int:
        """Every change up to this revision was received; 0 before the first contact."""
        return self._cache.revision

    # --- answers ---

    async def resolve(self, agent_id: str) -> ResolvedConfig:
        """Return the agent's configuration by the chain: agent, default, environment, hardcoded.

        Raises:
            AgentKeyUnavailable: the agent needs an API key that cannot be had now.
            AgentUnknown: the client is strict; there is no such agent, or it is switched off.
            SLMUnavailable: the client is strict, and neither the SLM nor the environment answers.
        """
        config = self._hot.get(agent_id)
        if config is not None:
            return config
        return await self._in_own_loop(self._answer(agent_id))

    async def get_agent_config(self, agent_id: str) -> dict[str, Any]:
        """Return the agent's llm_* fields with `llm_api_key` as a dict of your own.

        The key is a string that prints as `***` wherever the dict is printed.

        Raises:
            AgentKeyUnavailable: the agent needs an API key that cannot be had now.
        """
        config = self._hot.get(agent_id)
        if config is None:
            config = await self._in_own_loop(self._answer(agent_id))
        return config.as_dict()

    async def get_default_agent_config(self) -> dict[str, Any]:
        """Return the default agent's llm_* fields, or what the chain's later steps say.

        Raises:
            AgentKeyUnavailable: the default agent needs an API key that cannot be had now.
        """
        return (await self._in_own_loop(self._answer(None))).as_dict()

    async def explain(self, agent_id: str) -> Explanation:
        """Say how this agent is resolved now: what each step of the chain says, and which answers.

        Holds revisions, ages, why a step is passed over and where a key came from, never a key.
        """
        return await self._in_own_loop(self._explained(agent_id))

    def peek(self, agent_id: str) -> ResolvedConfig | None:
        """Return the agent's own config if it is at hand and live; safe from any thread."""
        return self._hot.get(agent_id)

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Have `callback(agent_id, config)` called after each swap; return how to stop that.

        A request that begins after the call uses the new config or a newer one. The callback may be
        a coroutine function. What it raises is logged and harms nobody.
        """
        return self._hooks.on_change(callback)

    def register_validator(self, validator: Validator) -> Callable[[], None]:
        """Have `validator(config)` asked before a config comes into force; return how to stop that.

        Where it gives a reason, the agent's last good config stays in use and the SLM is told
        (docs/protocol.md section 4, `not_in_force`). `LLMInterface` registers one by itself.
        """
        return self._hooks.register_validator(validator)

    def in_use(self, config: ResolvedConfig) -> InUse:
        """Return a context manager that holds the config's key for the length of a call.

        While it is held, the SLM's fleet view says that this backend still uses that key.
        `LLMInterface` does so by itself.
        """
        return InUse(self._in_use, config, self._cache.key_revision, self._key_use_changed)

    # --- loops, forks and files ---

    def _started(self) -> Synchroniser:
        """Return what follows the SLM, started in the running loop if it is not yet."""
        sync = self._sync
        loop = asyncio.get_running_loop()
        if sync is not None and sync.loop is not loop:
            if sync.loop.is_running():
                raise ConfigurationError(
                    "this SLMClient is connected in another event loop; resolve() works from here, "
                    "connect() and close() belong there"
                )
            self._abandon()
            sync = None
        if sync is None:
            if self._file is not None:
                if self._cache.epoch is None:
                    self._load(self._file)
                interval = self._timings.save_interval_seconds
                self._saver = Saver(self._file, interval, self._contents)
            sync = self._sync = Synchroniser(
                self._cache,
                self._options.site,
                self._timings,
                self._info(),
                self._swapped,
                self._liveness,
                self._in_use,
                self._key_wait,
                self._explained,
            )
            self._options.log_decisions()
            sync.start()
        return sync

    async def _answer(self, agent_id: str | None) -> ResolvedConfig:
        starting = self._sync is None or not self._sync.settled.is_set()
        if starting and not self._closed:
            await self.connect()
        return await self._chain.answer(agent_id, self._sync)

    async def _explained(self, agent_id: str) -> Explanation:
        answer, error = None, None
        try:
            answer = await self._answer(agent_id)
        except Exception as problem:
            # Whatever it is, it is what a caller who resolves this agent gets.
            error = str(problem) if isinstance(problem, SLMError) else type(problem).__name__
        cache = self._cache
        unreachable = self.last_error or f"it is {self.status.value}"
        return Explanation(
            agent_id=storable(agent_id),
            answered_by=None if answer is None else answer.step.value,
            error=error and storable(error),
            status=self.status.value,
            revision=cache.revision,
            epoch=cache.epoch and storable(cache.epoch),
            last_error=self.last_error and storable(self.last_error),
            steps=explain_steps(cache, agent_id, answer, unreachable),
        )

    async def _in_own_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run in the loop in which the client is connected, wherever this one is."""
        sync = self._sync
        if sync is not None and sync.loop is not asyncio.get_running_loop():
            if sync.loop.is_running():
                return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, sync.loop))
            self._abandon()
        return await work

    def _abandon(self) -> None:
        """Let go of a loop that runs no more, or runs in the process that this one was forked from.

        Nothing of it is closed or collected: closing a socket that two processes share could say
        goodbye in the other's name, or take it out of the other's selector.
        """
        if self._sync is not None:
            _abandoned.append(self._sync)
        self._sync = None
        self._saver = None
        self._hot = _NOTHING
        self._hooks.abandon()
        self._in_use.start_anew()
        self._instance = uuid.uuid4().hex[:12]
        self._cache.distrust()

    def _info(self) -> ClientInfo:
        # Imported here: it loads email, csv and zipfile, for which a backend's start would wait.
        from importlib.metadata import version

        host = socket.gethostname()
        return ClientInfo(
            name=storable(self._options.name or host, 128),
            instance=self._instance,
            version=version("autobot-slm"),
            host=storable(host, 255),
            pid=os.getpid(),
            plain_http=self._options.insecure or None,
        )

    def _liveness(self) -> None:
        live = self._cache.live
        if live and self._hot is _NOTHING and self._saver is not None:
            self._saver.soon()
        self._hot = self._cache.ready if live else _NOTHING

    def _swapped(self, agent_id: str) -> None:
        if self._saver is not None:
            self._saver.soon()
        known = self._cache.find(agent_id)
        self._hooks.tell(agent_id, known.in_force if known is not None else None)

    def _judge_anew(self) -> None:
        sync = self._sync
        if sync is None or sync.loop is _running_loop():
            for agent_id in self._cache.judge_anew():
                self._swapped(agent_id)
            if sync is not None:
                sync.acks.changed()
        elif sync.loop.is_running():
            # The cache has one writer: its own loop.
            sync.loop.call_soon_threadsafe(self._judge_anew)

    def _key_use_changed(self) -> None:
        if self._sync is not None:
            self._sync.acks.changed_elsewhere()

    def _load(self, file: SnapshotFile) -> None:
        loaded = file.load()
        if loaded is not None:
            self._cache.load(
                loaded.agents,
                epoch=loaded.epoch,
                revision=loaded.revision,
                complete=loaded.complete,
                age_seconds=loaded.age_seconds,
                change_id=loaded.change_id,
            )

    def _contents(self) -> Contents | None:
        cache = self._cache
        # In between two lives of the database there is nothing that could be resumed from.
        if cache.epoch is None or not cache.synced:
            return None
        complete = not cache.keys_awaited()
        revision, change_id = cache.heard
        return Contents(cache.everything(), cache.epoch, revision, complete, change_id)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_clients: weakref.WeakSet[SLMClient] = weakref.WeakSet()
_abandoned: list[Synchroniser] = []


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
