"""SLMClient: what a backend holds, for asynchronous and synchronous code, in any thread and loop.

Following the SLM is the background thread's work (`follower`); here are the two ways in. While live
an answer is one lookup in a dict and one look at the clock, in whatever thread.
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
    """A backend's view of its SLM: every agent's LLM configuration, live (docs/protocol.md 5).

    Make one for each process and share it among all its threads and event loops. Each question has
    two forms: `await client.resolve(…)` and, for synchronous code, `client.resolve_now(…)`. The
    client is started by `connect`, `connect_now`, `with` or `async with`, or by its first question.

    It follows the SLM in a thread that all clients of the process share, so that neither a loop
    that ends nor one that is blocked keeps a change from arriving. A forked child makes its own.

    Args:
        slm_url: the SLM's address, an http(s) or ws(s) URL; plain http for this machine alone.
            Several, as a list or separated by commas, are tried in turn. Else SLM_URL.
        token: the bearer token; else `token_file`, SLM_TOKEN or SLM_TOKEN_FILE.
        token_file: a file that holds it; read anew for each connection, so it may be replaced.
        cache_file: where to keep the last known good configuration for a start without the SLM;
            True for a file in the account's state directory, False for none. Else SLM_CACHE_FILE,
            which may be `on` or `off`; else none.
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
        # A client that nobody holds any more is closed; at exit, the thread ends with the process.
        weakref.finalize(self, self._follower.drop).atexit = False

    # --- life ---

    async def connect(self) -> None:
        """Start following the SLM, and wait up to `start_timeout` until its state is here.

        Returns in any case, at once where the SLM refuses the token: `status` and `last_error` say
        how things stand, and trying goes on in the background.
        """
        await self._waited(self._follower.connect)

    def connect_now(self) -> None:
        """Do what `connect` does, in synchronous code."""
        self._wait(self._follower.connect)

    async def close(self) -> None:
        """Stop following the SLM; what is known can still be asked for.

        Questions that are waited for in other threads and loops are answered from what is known.
        `connect` starts the client again.
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
            # Nobody will leave what nobody entered.
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
        """How this client stands to its SLM."""
        return self._follower.status

    @property
    def last_error(self) -> str | None:
        """What failed last, as a sentence without secrets; None while all is well."""
        return self._follower.last_error

    @property
    def revision(self) -> int:
        """Every change up to this revision was received; 0 before the first contact."""
        return self._cache.position.revision

    # --- answers ---

    async def resolve(self, agent_id: str) -> ResolvedConfig:
        """Return the agent's configuration by the chain: agent, default, environment, hardcoded.

        Raises:
            AgentKeyUnavailable: the agent needs an API key that cannot be had now.
            AgentUnknown: the client is strict; there is no such agent, or it is switched off.
            SLMUnavailable: the client is strict, and neither the SLM nor the environment answers.
        """
        config = self._ready.get(agent_id)
        if config is not None and now() < self._liveness.live_until:
            return config
        return await self._answered(agent_id)

    def resolve_now(self, agent_id: str) -> ResolvedConfig:
        """Do what `resolve` does, in synchronous code: at once while live.

        Raises:
            AgentKeyUnavailable: the agent needs an API key that cannot be had now.
        """
        config = self._ready.get(agent_id)
        if config is not None and now() < self._liveness.live_until:
            return config
        return self._answered_now(agent_id)

    async def get_agent_config(self, agent_id: str) -> dict[str, Any]:
        """Return the agent's llm_* fields with `llm_api_key` as a dict of your own.

        The key is a string that prints as `***` wherever the dict is printed.

        Raises:
            AgentKeyUnavailable: the agent needs an API key that cannot be had now.
        """
        config = self._ready.get(agent_id)
        if config is None or now() >= self._liveness.live_until:
            config = await self._answered(agent_id)
        return config.as_dict()

    def get_agent_config_now(self, agent_id: str) -> dict[str, Any]:
        """Do what `get_agent_config` does, in synchronous code."""
        return self.resolve_now(agent_id).as_dict()

    async def get_default_agent_config(self) -> dict[str, Any]:
        """Return the default agent's llm_* fields, or what the chain's later steps say.

        Raises:
            AgentKeyUnavailable: the default agent needs an API key that cannot be had now.
        """
        return (await self._answered(None)).as_dict()

    def get_default_agent_config_now(self) -> dict[str, Any]:
        """Do what `get_default_agent_config` does, in synchronous code."""
        return self._answered_now(None).as_dict()

    async def explain(self, agent_id: str) -> Explanation:
        """Say how this agent is resolved now: what each step of the chain says, and which answers.

        Holds revisions, ages, why a step is passed over and where a key came from, never a key.
        """
        judged = not callbacks.is_here
        return await self._waited(lambda: self._follower.explained(agent_id, judged=judged))

    def explain_now(self, agent_id: str) -> Explanation:
        """Do what `explain` does, in synchronous code."""
        judged = not callbacks.is_here
        return self._wait(lambda: self._follower.explained(agent_id, judged=judged))

    def peek(self, agent_id: str) -> ResolvedConfig | None:
        """Return the agent's own config if it is at hand and live; asks nobody."""
        return self._ready.get(agent_id) if now() < self._liveness.live_until else None

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Have `callback(agent_id, config)` called after each swap; return how to stop that.

        A request that begins after the call uses the new config or a newer one. A plain function is
        called in one thread of its own, which all clients of the process share; a coroutine
        function in the event loop that registers it, for as long as that one lasts. Both may ask
        the client anything, and close it. What they raise is logged and harms nobody. One that is a
        thousand changes behind hears only the newest of each agent.
        """
        return self._hooks.on_change(callback)

    def register_validator(self, validator: Validator) -> Callable[[], None]:
        """Have `validator(config)` asked before a config comes into force; return how to stop that.

        It is called in the thread of the plain callbacks. Where it gives a reason, the agent's last
        good config stays in use and the SLM is told (docs/protocol.md section 4, `not_in_force`).
        While it thinks, questions wait for it for up to `key_wait`. `LLMInterface` registers one by
        itself.
        """
        return self._hooks.register_validator(validator)

    def in_use(self, config: ResolvedConfig) -> InUse:
        """Return a context manager that holds the config's key for the length of a call.

        While it is held, the SLM's fleet view says that this backend still uses that key.
        `LLMInterface` does so by itself.
        """
        follower = self._follower
        return InUse(follower.in_use, config, self._cache.key_revision, follower.key_use_changed)

    # --- the two ways in ---

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
        # A verdict that is to be given in this very thread would be waited for in vain.
        judged = not callbacks.is_here
        return self._wait(lambda: follower.answer(agent_id, judged=judged))

    def _closes(self) -> bool:
        """Return whether there is anything to close."""
        self._follower.hear_no_more()
        return following.is_running

    async def _waited(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        return await following.start(work).waited()

    def _wait(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run in the background, and wait in this thread.

        Raises:
            ConfigurationError: this is the background thread, which cannot wait for itself.
        """
        if following.is_here:
            raise ConfigurationError("this cannot be waited for in the client's own thread")
        return following.start(work).wait()
