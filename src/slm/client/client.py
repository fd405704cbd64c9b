"""SLMClient: the object a backend uses, from async or sync code, in any thread and event loop.

A background thread follows the SLM (`follower`); this module has the two ways to call it. While
live, an answer is one dict lookup and one read of the clock, in any thread.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self, TypeVar

from pydantic import SecretStr

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.keys_in_use import InUse
from slm.client.config import ResolvedConfig
from slm.client.options import read_options
from slm.client.runtime.background import following
from slm.client.runtime.callbacks import OnChange, Validator
from slm.client.runtime.clock import now
from slm.client.runtime.dispatch import callbacks
from slm.client.status import ClientStatus
from slm.client.sync.follower import Follower, Settings
from slm.client.sync.follower import _abandoned as _abandoned
from slm.client.timings import Timings, check_seconds
from slm.client.transport.tls import ClientCert
from slm.errors import ConfigurationError
from slm.protocol import Explanation

_T = TypeVar("_T")


class SLMClient:
    """Receives every agent's LLM configuration from the SLM as it changes (docs/protocol.md 5).

    Make one client per process and share it among all threads and event loops. Methods that are
    coroutines have a form for synchronous code: `await client.resolve(…)`, `client.resolve_now(…)`.
    `connect`, `connect_now`, `with`, `async with` or the first question start the client.

    It follows the SLM in a background thread that all clients of the process share, so changes
    arrive even if an event loop is blocked or has ended. A forked child starts its own thread.

    Args:
        slm_url: the SLM's address, an http(s) or ws(s) URL; plain http only on this machine.
            Several addresses, as a list or separated by commas, are tried in turn. Default:
            SLM_URL.
        token: the bearer token. Default: `token_file`, SLM_TOKEN or SLM_TOKEN_FILE.
        token_file: a file that holds the token; read for each connection, so it can be replaced.
        cache_file: where to keep the last known good configuration for a start without the SLM;
            True for a file in the account's state directory, False for none. Default:
            SLM_CACHE_FILE, which may be `on` or `off`; otherwise none.
        cache_key: a Fernet key that encrypts the cache file; without it, the file holds no API
            keys. Default: SLM_CACHE_KEY.
        ca_file: the PEM file of a private CA; certificates are verified against it alone.
            Default: SLM_CA_FILE.
        client_cert: this backend's certificate, for an SLM that asks for one: a PEM file with
            certificate and key, or a pair of files. These can be replaced while the backend runs.
            Default: SLM_CLIENT_CERT and SLM_CLIENT_KEY.
        name: the backend's name in the fleet. Default: SLM_NAME, or the host's name.
        proxy: the URL of an HTTP proxy on the way to the SLM, with user name and password if it
            needs them. Default: SLM_PROXY.
        trust_env: whether to use HTTP_PROXY, HTTPS_PROXY and NO_PROXY if no proxy is named.
        allow_insecure: allow plain http to another machine, if something else encrypts the
            connection; logged at each start. Default: SLM_ALLOW_INSECURE.
        strict: raise an error instead of using the default agent or the built-in values.
        ttl_seconds: after how long without a live connection a value is refreshed and marked stale.
        start_timeout: how long `connect` waits for the SLM, in seconds.
        key_wait: how long a question waits for an API key that has just changed, in seconds.
        max_stale_seconds: how long after the TTL a value may still be used; None: without limit.
        timings: all other durations.

    Raises:
        ConfigurationError: an argument or a variable is invalid, or the address or the token is
            missing.
    """

    def __init__(
        self,
        slm_url: str | Sequence[str] | None = None,
        token: str | SecretStr | None = None,
        token_file: str | os.PathLike[str] | None = None,
        *,
        cache_file: str | os.PathLike[str] | bool | None = None,
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
        options = read_options(
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
        settings = Settings(
            options=options,
            strict=strict,
            start_timeout=check_seconds("start_timeout", start_timeout),
            key_wait=check_seconds("key_wait", key_wait),
            timings=timings or Timings(),
        )
        self._cache = AgentConfigCache(ttl_seconds, max_stale_seconds=max_stale_seconds)
        self._ready = self._cache.ready
        self._liveness = self._cache.liveness
        self._follower = Follower(settings, self._cache)
        self._hooks = self._follower.hooks
        # A client that nothing refers to any more is closed; at exit, the thread ends with the
        # process.
        weakref.finalize(self, self._follower.drop).atexit = False

    # --- start and stop ---

    async def connect(self) -> None:
        """Start following the SLM, and wait until its state has arrived, up to `start_timeout`.

        Always returns, and at once if the SLM refuses the token. `status` and `last_error` say
        how the client is connected; it keeps trying in the background.
        """
        await self._waited(self._follower.connect)

    def connect_now(self) -> None:
        """Do what `connect` does, in synchronous code."""
        self._wait(self._follower.connect)

    async def close(self) -> None:
        """Stop following the SLM; the last known configurations can still be read.

        Pending questions in other threads and loops are answered from them. `connect` starts the
        client again.
        """
        if self._closes():
            await self._waited(self._follower.close)

    def close_now(self) -> None:
        """Do what `close` does, in synchronous code."""
        if self._closes():
            self._wait(self._follower.close)

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            # `__aexit__` is not called if `__aenter__` fails.
            following.start(self._follower.close)
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __enter__(self) -> Self:
        try:
            self.connect_now()
        except BaseException:
            following.start(self._follower.close)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close_now()

    @property
    def status(self) -> ClientStatus:
        """How the client is connected."""
        return self._follower.status

    @property
    def last_error(self) -> str | None:
        """What failed last, in one sentence without secrets; None if nothing is wrong."""
        return self._follower.last_error

    @property
    def revision(self) -> int:
        """Every change up to this revision was received; 0 before the first contact."""
        return self._cache.position.revision

    # --- resolving ---

    async def resolve(self, agent_id: str) -> ResolvedConfig:
        """Return the agent's configuration, from the first step of the chain that has one.

        The steps are agent, default, environment and hardcoded.

        Raises:
            AgentKeyUnavailable: the agent's API key is unavailable.
            AgentUnknown: the client is strict, and the agent does not exist or is inactive.
            SLMUnavailable: the client is strict, and has no configuration to return.
        """
        config = self._ready.get(agent_id)
        if config is not None and now() < self._liveness.live_until:
            return config
        return await self._answered(agent_id)

    def resolve_now(self, agent_id: str) -> ResolvedConfig:
        """Do what `resolve` does, in synchronous code; returns at once while live.

        Raises:
            AgentKeyUnavailable: the agent's API key is unavailable.
        """
        config = self._ready.get(agent_id)
        if config is not None and now() < self._liveness.live_until:
            return config
        return self._answered_now(agent_id)

    async def get_agent_config(self, agent_id: str) -> dict[str, Any]:
        """Return the agent's llm_* fields, with `llm_api_key`, as a new dict.

        The key is a string that prints as `***` when the dict is printed.

        Raises:
            AgentKeyUnavailable: the agent's API key is unavailable.
        """
        config = self._ready.get(agent_id)
        if config is None or now() >= self._liveness.live_until:
            config = await self._answered(agent_id)
        return config.as_dict()

    def get_agent_config_now(self, agent_id: str) -> dict[str, Any]:
        """Do what `get_agent_config` does, in synchronous code."""
        return self.resolve_now(agent_id).as_dict()

    async def get_default_agent_config(self) -> dict[str, Any]:
        """Return the default agent's llm_* fields, or those of the chain's later steps.

        Raises:
            AgentKeyUnavailable: the default agent's API key is unavailable.
        """
        return (await self._answered(None)).as_dict()

    def get_default_agent_config_now(self) -> dict[str, Any]:
        """Do what `get_default_agent_config` does, in synchronous code."""
        return self._answered_now(None).as_dict()

    async def explain(self, agent_id: str) -> Explanation:
        """Explain how the agent is resolved now: what each step has, and which one is used.

        The answer has revisions, ages, the reason why a step was skipped and the source of the API
        key, but never the key.
        """
        judged = not callbacks.is_here
        return await self._waited(lambda: self._follower.explained(agent_id, judged=judged))

    def explain_now(self, agent_id: str) -> Explanation:
        """Do what `explain` does, in synchronous code."""
        judged = not callbacks.is_here
        return self._wait(lambda: self._follower.explained(agent_id, judged=judged))

    def peek(self, agent_id: str) -> ResolvedConfig | None:
        """Return the agent's own configuration if it is cached and live; makes no request."""
        return self._ready.get(agent_id) if now() < self._liveness.live_until else None

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Call `callback(agent_id, config)` after each change; returns a function that removes it.

        `config` is None if the agent was deleted or switched off. A request that starts after the
        callback uses the new configuration. Plain functions are called one at a time in a thread
        that all clients of the process share; coroutine functions run in the event loop that
        registered them, as long as it runs. Both may call any method of the client. Exceptions are
        logged. A callback that is a thousand changes behind gets only the newest of each agent.
        """
        return self._hooks.on_change(callback)

    def register_validator(self, validator: Validator) -> Callable[[], None]:
        """Call `validator(config)` before a configuration is used; the result removes it again.

        If it returns a reason, the agent's last good configuration stays in use and the SLM shows
        the reason (docs/protocol.md section 4, `not_in_force`). It is called in the thread of the
        plain callbacks; questions wait for it up to `key_wait`. `LLMInterface` registers one.
        """
        return self._hooks.register_validator(validator)

    def in_use(self, config: ResolvedConfig) -> InUse:
        """Return a context manager that marks the configuration's API key as in use.

        Until it is left, the fleet shows that this backend still uses that key. `LLMInterface` does
        this by itself.
        """
        follower = self._follower
        return InUse(follower.in_use, config, self._cache.key_revision, follower.key_use_changed)

    # --- asynchronous and synchronous calls ---

    async def _answered(self, agent_id: str | None) -> ResolvedConfig:
        follower = self._follower
        if follower.closed:
            return follower.answer_in_place(agent_id)
        judged = not callbacks.is_here  # as for a coroutine that runs in the callbacks' thread
        return await self._waited(lambda: follower.answer(agent_id, judged=judged))

    def _answered_now(self, agent_id: str | None) -> ResolvedConfig:
        follower = self._follower
        if follower.closed or following.is_here:
            return follower.answer_in_place(agent_id)
        # Waiting here for a verdict that this very thread must give would never end.
        judged = not callbacks.is_here
        return self._wait(lambda: follower.answer(agent_id, judged=judged))

    def _closes(self) -> bool:
        """Return whether there is anything to close."""
        self._follower.hear_no_more()
        return following.is_running

    async def _waited(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        return await following.start(work).waited()

    def _wait(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run work in the background thread and wait for it in this one.

        Raises:
            ConfigurationError: this is the background thread, which cannot wait for itself.
        """
        if following.is_here:
            raise ConfigurationError("this cannot be waited for in the client's own thread")
        return following.start(work).wait()
