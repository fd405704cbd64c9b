"""What an operator can set, by argument or by an SLM_* environment variable.

Holds values only: knows no database, no socket, and opens no file. No secret has a default.
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
from slm.server.db.engines.postgresql import sqlalchemy_spelling
from slm.server.settings_source import PREFIX, TidyEnvironment

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]
PerSecond = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Burst = Annotated[int, Field(gt=0)]

SQLITE_FILE: Final = "slm.db"


class Settings(BaseSettings):
    """The server's settings; each is also read from `SLM_` and its name in capitals.

    Attributes:
        host: the address to listen on.
        port: the port; 0 takes a free one.
        data_dir: where the SQLite file, the generated encryption key and the first tokens live.
        database_url: `postgresql+psycopg://…` or `sqlite:///…`; none: `slm.db` in `data_dir`.
        tls_cert: the certificate chain in PEM; goes with `tls_key`.
        tls_key: the private key in PEM.
        tls_client_ca: certificates in PEM; whoever connects must show one that these have signed.
        encryption_keys: Fernet keys separated by commas; at the first start the first is the
            active one, later the database names it.
        encryption_key_command: a command, run without a shell, that prints such keys; for a vault
            or a KMS.
        encryption_key_command_env: which variables the command gets besides PATH, HOME and the
            like; `VAULT_*` stands for all that begin so. Those of SLM itself it never gets.
        endpoints: `strict` refuses an `llm_endpoint` on loopback or in a private range, too.
        endpoint_allow: hosts, addresses and networks that `strict` lets through.
        metrics_token: what `/metrics` asks for; none: it is open.
        trusted_proxies: addresses or networks whose Forwarded headers count.
        trusted_networks: addresses or networks from which plain http may ask for keys, such as
            those of a mesh whose sidecars encrypt.
        changes_keep: how many changes are kept for resuming; none: all.
        audit_keep_days: how old an entry of the audit gets once it was exported; none: any age.
        log_level: how much the server tells on stderr.
        heartbeat_seconds: how often a stream hears a heartbeat.
        ping_interval_seconds: how often a stream is pinged.
        ping_timeout_seconds: how long a peer has to answer a ping.
        behind_after_seconds: after how long without a good look at the database the feed is behind.
        poll_interval_seconds: how often the feed looks without being woken.
        max_outage_seconds: how long plain reads and streams go on without the database, which
            alone knows of a revoked token.
        min_revision_wait_seconds: how long a read waits for `min_revision`.
        lock_timeout_seconds: how long a transaction waits for a lock.
        database_timeout_seconds: how long a whole transaction may take before it is given up.
        idle_in_transaction_seconds: after this PostgreSQL ends a transaction that says nothing.
        compact_interval_seconds: how often changes beyond `changes_keep` are looked for.
        audit_trim_seconds: how often entries beyond `audit_keep_days` are looked for.
        fleet_interval_seconds: how often a replica tells others of its backends at most, unless a
            receipt waits.
        lease_seconds: after how long without a word a replica counts as gone.
        key_command_seconds: how long `encryption_key_command` may take.
        key_check_seconds: how often all stored keys are tried, so that `/readyz` can tell.
        last_used_seconds: how often it is written down when a token was last used.
        auth_failures_per_second: how often one address may fail to authenticate, in the long run.
        auth_failures_burst: how often at once.
        writes_per_second: how often one token may write, in the long run.
        writes_burst: how often at once.
        streams_per_token: how many streams one token may have open here; none: any number.
        waits_per_token: how many requests with `?wait=` one token may have under way here.
        max_connections: how many connections may be open at once; none, or more than there are
            file descriptors for: as many as those. 256 of them are kept for plain HTTP.
        max_opening_streams: how many streams may be on their way from handshake to live at once;
            the rest wait, and one token has half of the places at most.
        max_snapshots: how many snapshots may be asked for at once; one is made at a time.
        buffer_bytes: how much may wait for one slow reader.
        buffer_total_bytes: how much may wait for all of them.
        max_body_bytes: the largest request body.
        max_header_bytes: the largest request head.
        header_timeout_seconds: how long a request's head may take, then its body, and how long a
            peer may read nothing of its answer.
        tls_handshake_seconds: how long a TLS handshake may take.
        shutdown_seconds: over how long a stopping server spreads the closing of its streams.
        replay_page: how many changes one page of a replay holds.
        testing: allows what only a test may do.
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
        """Read arguments, then the environment."""
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
        """Take `10.0.0.1, 192.168.0.0/16`; a single address is a network of one."""
        return tuple(listed(value) if isinstance(value, str) else value)

    @field_validator("encryption_key_command_env", mode="before")
    @classmethod
    def _variables(cls, value: Any) -> Any:
        """Take `VAULT_ADDR, AWS_*`; the server's own variables hold secrets."""
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
        # `from None`: the URL holds a password, and the chain would show it.
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
        """Which `llm_endpoint` may be saved."""
        return EndpointPolicy(self.endpoints == "strict", self.endpoint_allow)

    @property
    def url(self) -> URL:
        """The database's URL, for `slm.server.db.database.Database`."""
        if self.database_url is None:
            return URL.create("sqlite", database=str(self.data_dir / SQLITE_FILE))
        url = make_url(sqlalchemy_spelling(self.database_url.get_secret_value()))
        if url.get_backend_name() in ("postgresql", "postgres"):
            # psycopg 3 is the one driver; `postgres://` is how many hosts still write it.
            return url.set(drivername="postgresql+psycopg")
        return url


def load_settings(**overrides: Any) -> Settings:
    """Return the settings from the environment, overridden by the arguments that are not None.

    Raises:
        ConfigurationError: a value makes no sense; the message names the variable, never the value.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = f"SLM_{str(first['loc'][0]).upper()}: " if first["loc"] else ""
        raise ConfigurationError(name + first["msg"].removeprefix("Value error, ")) from None
