"""What an operator can set, by argument or by an SLM_* environment variable.

Only holds values: knows no database and no socket, and opens no file. No secret has a default.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from slm.common.environment import listed
from slm.endpoints import EndpointPolicy, parse_allowed
from slm.errors import ConfigurationError
from slm.server.database_url import sqlalchemy_spelling
from slm.server.settings_source import PREFIX, TidyEnvironment

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]
PerSecond = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Burst = Annotated[int, Field(gt=0)]

SQLITE_FILE: Final = "slm.db"


class Settings(BaseSettings):
    """The server's settings; each is also read from `SLM_` plus its name in capitals.

    The texts are also the table of docs/reference/variables.md (`python -m tools.docs` writes it).

    Attributes:
        host: the address to listen on.
        port: the port; 0 takes a free one.
        data_dir: the directory of `slm.db`, `encryption.key`, `admin.token` and `backend.token`.
        database_url: `postgresql+psycopg://…` or `sqlite:///…`, special characters of a password
            percent-encoded (`@` is `%40`); without it, `slm.db` in the data directory.
        tls_cert: the certificate chain, PEM. Keys leave the server's machine over TLS only.
        tls_key: the certificate's private key, PEM.
        tls_client_ca: CA certificates, PEM; clients must present a certificate that one of them
            signed.
        encryption_keys: Fernet keys separated by commas. On the first start the first of them
            becomes the active key; after that the database records which key is active. Without it,
            `encryption.key` is created for a new SQLite file.
        encryption_key_command: a command that prints such keys, for a vault or a KMS; it is run
            without a shell.
        encryption_key_command_env: variables that the command gets besides `PATH`, `HOME` and the
            like, such as `VAULT_ADDR, AWS_*`; it never gets any of SLM's own.
        endpoints: `strict` also refuses agent endpoints on loopback or in private ranges.
        endpoint_allow: hosts, addresses and networks that `strict` allows.
        metrics_token: the bearer token that `/metrics` asks for; without it, `/metrics` is open.
        trusted_proxies: addresses or networks of proxies trusted to set forwarding headers.
        trusted_networks: addresses or networks from which plain http may ask for keys, such as
            those of a mesh whose sidecars encrypt; logged at each start.
        changes_keep: how many changes are kept for clients that resume, for the history and for
            rollback; without it, all.
        audit_keep_days: how many days audit entries are kept; older ones are removed once `slm
            audit export` has written them. Without it, all are kept.
        log_level: `debug`, `info`, `warning` or `error`; the log goes to stderr.
        heartbeat_seconds: the time between two heartbeats of a stream.
        ping_interval_seconds: the time between two pings of a stream.
        ping_timeout_seconds: how long a peer may take to answer a ping.
        behind_after_seconds: after how long without reading the database successfully the server
            is considered behind.
        poll_interval_seconds: how often the server looks for changes without being notified.
        max_outage_seconds: how long plain reads and streams continue without the database, the only
            place that records revoked tokens.
        min_revision_wait_seconds: how long a read waits for `min_revision`.
        lock_timeout_seconds: how long a transaction waits for a lock.
        database_timeout_seconds: how long a whole transaction may take before it is aborted.
        idle_in_transaction_seconds: after how long PostgreSQL ends an idle transaction.
        compact_interval_seconds: how often changes beyond `changes_keep` are removed.
        audit_trim_seconds: how often entries beyond `audit_keep_days` are removed.
        fleet_interval_seconds: the shortest time between two reports of a replica's backends to the
            other replicas; a waiting receipt is reported at once.
        lease_seconds: after how long without a sign of life a replica is considered gone.
        key_command_seconds: how long `encryption_key_command` may take.
        key_check_seconds: how often all stored keys are tried; `/readyz` reports the result.
        last_used_seconds: how often the time of a token's last use is saved.
        auth_failures_per_second: how many failed authentications per second one address may have,
            on average.
        auth_failures_burst: how many of them at once.
        writes_per_second: how many writes per second one token may make, on average.
        writes_burst: how many of them at once.
        streams_per_token: how many streams one token may have open on this server; without it, any
            number.
        waits_per_token: how many requests with `?wait=` one token may have running on this
            server.
        max_connections: how many connections may be open at once, 256 of them reserved for plain
            HTTP; without it, the limit of open files less 100.
        max_opening_streams: how many streams may be on their way from handshake to live at once;
            the rest wait, and one token has at most half of the places.
        max_snapshots: how many snapshots may be requested at once; they are made one at a time.
        buffer_bytes: how much data may wait for one slow reader.
        buffer_total_bytes: how much data may wait for all slow readers together.
        max_body_bytes: the largest request body.
        max_header_bytes: the largest request head.
        header_timeout_seconds: how long the head of a request may take, then its body, and how long
            a peer may leave a response unread.
        tls_handshake_seconds: how long a TLS handshake may take; 10 at most.
        shutdown_seconds: the longest time over which a stopping server spreads the closing of its
            streams; it closes up to 500 a second.
        replay_page: how many changes one page of a replay holds.
        testing: allows what only tests may do.
        failpoint: where to fail on purpose; refused unless `testing`.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the arguments, then the environment."""
        return init_settings, TidyEnvironment(settings_cls)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8760
    data_dir: Path = Path("slm-data")
    database_url: SecretStr | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    encryption_keys: SecretStr | None = None
    encryption_key_command: str | None = None
    encryption_key_command_env: tuple[str, ...] = ()
    endpoints: Literal["open", "strict"] = "open"
    endpoint_allow: tuple[str, ...] = ()
    metrics_token: SecretStr | None = None
    trusted_proxies: tuple[Network, ...] = ()
    trusted_networks: tuple[Network, ...] = ()
    changes_keep: Annotated[int, Field(ge=0)] | None = None
    audit_keep_days: Annotated[int, Field(ge=1, le=36_500)] | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    heartbeat_seconds: Seconds = 20
    ping_interval_seconds: Seconds = 20
    ping_timeout_seconds: Seconds = 20
    behind_after_seconds: Seconds = 5
    poll_interval_seconds: Seconds = 1
    max_outage_seconds: Seconds = 300
    min_revision_wait_seconds: Seconds = 2
    lock_timeout_seconds: Seconds = 2
    database_timeout_seconds: Seconds = 10
    idle_in_transaction_seconds: Seconds = 5
    compact_interval_seconds: Seconds = 60
    audit_trim_seconds: Seconds = 3600
    fleet_interval_seconds: Seconds = 1
    lease_seconds: Seconds = 15
    key_command_seconds: Seconds = 30
    key_check_seconds: Seconds = 300
    last_used_seconds: Seconds = 60
    header_timeout_seconds: Seconds = 10
    tls_handshake_seconds: Annotated[float, Field(gt=0, le=10)] = 5
    shutdown_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3

    auth_failures_per_second: PerSecond = 10
    auth_failures_burst: Burst = 50
    writes_per_second: PerSecond = 1000
    writes_burst: Burst = 5000
    streams_per_token: Annotated[int, Field(gt=0)] | None = None
    waits_per_token: Annotated[int, Field(gt=0)] = 100

    max_connections: Annotated[int, Field(gt=0)] | None = None
    max_opening_streams: Annotated[int, Field(gt=0)] = 500
    max_snapshots: Annotated[int, Field(gt=0)] = 1000
    buffer_bytes: Bytes = 1024 * 1024
    buffer_total_bytes: Bytes = 256 * 1024 * 1024
    max_body_bytes: Bytes = 262_144
    max_header_bytes: Bytes = 8192
    replay_page: Annotated[int, Field(gt=0)] = 500

    testing: bool = False
    failpoint: str | None = None

    @field_validator("trusted_proxies", "trusted_networks", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        """Accept `10.0.0.1, 192.168.0.0/16`; a single address is a network of one."""
        return tuple(listed(value) if isinstance(value, str) else value)

    @field_validator("encryption_key_command_env", mode="before")
    @classmethod
    def _variables(cls, value: Any) -> Any:
        """Accept `VAULT_ADDR, AWS_*`; refuse the server's own variables, which hold secrets."""
        value = listed(value) if isinstance(value, str) else value
        if any(name.upper().startswith(("SLM_", "AUTOBOT_")) for name in value):
            raise ValueError(
                "must not name SLM_ or AUTOBOT_ variables: the command never gets those"
            )
        return tuple(value)

    @field_validator("endpoint_allow", mode="before")
    @classmethod
    def _places(cls, value: Any) -> Any:
        return parse_allowed(value) if isinstance(value, str) else tuple(value)

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            url = make_url(sqlalchemy_spelling(value.get_secret_value()))
            backend = url.get_backend_name()
        except (ArgumentError, ValueError):
            backend = ""
        else:
            # The part of a password after an "@" would be taken for the host.
            before_query = value.get_secret_value().partition("?")[0]
            if backend != "sqlite" and ("@" in (url.host or "") or before_query.count("@") > 1):
                backend = ""
        # `from None`: the URL contains a password, and the chained exception would show it.
        if backend not in ("sqlite", "postgresql", "postgres"):
            raise ValueError(
                "must be a postgresql+psycopg:// or sqlite:/// URL, in which special characters of"
                " user and password are percent-encoded (@ is %40, / %2F, : %3A, # %23, ? %3F,"
                " % %25)"
            ) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.encryption_keys is not None and self.encryption_key_command is not None:
            raise ValueError("encryption_keys and encryption_key_command exclude each other")
        if self.failpoint is not None and not self.testing:
            raise ValueError("failpoint is for tests alone and needs SLM_TESTING=1")
        return self

    @property
    def endpoint_policy(self) -> EndpointPolicy:
        """Which values of `llm_endpoint` may be saved."""
        return EndpointPolicy(self.endpoints == "strict", self.endpoint_allow)

    @property
    def url(self) -> URL:
        """The database's URL, for `slm.server.db.database.Database`."""
        if self.database_url is None:
            return URL.create("sqlite", database=str(self.data_dir / SQLITE_FILE))
        url = make_url(sqlalchemy_spelling(self.database_url.get_secret_value()))
        if url.get_backend_name() in ("postgresql", "postgres"):
            # psycopg 3 is the only driver; many hosting services still write `postgres://`.
            return url.set(drivername="postgresql+psycopg")
        return url


def load_settings(**overrides: Any) -> Settings:
    """Return the settings from the environment, overridden by the arguments that are not None.

    Raises:
        ConfigurationError: a value is invalid; the message names the variable, never the value.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = f"SLM_{str(first['loc'][0]).upper()}: " if first["loc"] else ""
        raise ConfigurationError(name + first["msg"].removeprefix("Value error, ")) from None
