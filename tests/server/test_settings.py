"""Settings: what an operator sets, by argument or environment."""

from __future__ import annotations

import ipaddress
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from slm.errors import ConfigurationError
from slm.server.settings import Settings, load_settings
from slm.server.settings_source import ignored_variables


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("SLM_")]:
        monkeypatch.delenv(name)


def test_defaults_are_those_of_the_documentation() -> None:
    """With nothing set: loopback, port 8760, a SQLite file in slm-data, and no secret."""
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8760)
    assert settings.url.render_as_string() == "sqlite:///slm-data/slm.db"
    assert settings.encryption_keys is None
    assert settings.metrics_token is None


def test_the_environment_sets_and_an_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLM_PORT and the like count where no argument is given."""
    monkeypatch.setenv("SLM_PORT", "0")
    monkeypatch.setenv("SLM_HOST", "0.0.0.0")
    monkeypatch.setenv("SLM_DATA_DIR", "/var/lib/slm")
    monkeypatch.setenv("SLM_HEARTBEAT_SECONDS", "0.5")
    monkeypatch.setenv("SLM_URL", "http://elsewhere")  # of the client: none of ours
    settings = load_settings(host="127.0.0.1", port=None)
    assert (settings.host, settings.port) == ("127.0.0.1", 0)
    assert settings.data_dir == Path("/var/lib/slm")
    assert settings.heartbeat_seconds == 0.5


def test_an_empty_variable_is_one_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SLM_ENCRYPTION_KEYS=` in a unit file means none."""
    monkeypatch.setenv("SLM_ENCRYPTION_KEYS", "")
    monkeypatch.setenv("SLM_DATABASE_URL", "")
    settings = load_settings()
    assert settings.encryption_keys is None
    assert settings.database_url is None


def test_proxies_are_addresses_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLM_TRUSTED_PROXIES takes addresses and networks, separated by commas."""
    monkeypatch.setenv("SLM_TRUSTED_PROXIES", "10.0.0.1, 192.168.0.0/16,::1")
    assert load_settings().trusted_proxies == (
        ipaddress.ip_network("10.0.0.1/32"),
        ipaddress.ip_network("192.168.0.0/16"),
        ipaddress.ip_network("::1/128"),
    )


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_any_spelling_of_postgresql_is_psycopg(scheme: str) -> None:
    """Hosts hand out postgres:// and postgresql:// URLs; both work."""
    url = load_settings(database_url=SecretStr(f"{scheme}://u:p@h/d")).url
    assert url.render_as_string(hide_password=False) == "postgresql+psycopg://u:p@h/d"


def test_a_data_directory_may_have_any_name() -> None:
    """A question mark or a percent sign in a path is no part of a URL."""
    assert load_settings(data_dir=Path("/a?b %20")).url.database == "/a?b %20/slm.db"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"port": 70000}, "SLM_PORT"),
        ({"port": "canary"}, "SLM_PORT"),
        ({"heartbeat_seconds": 0}, "SLM_HEARTBEAT_SECONDS"),
        ({"heartbeat_seconds": float("nan")}, "SLM_HEARTBEAT_SECONDS"),
        ({"trusted_proxies": "canary"}, "SLM_TRUSTED_PROXIES"),
        ({"trusted_proxies": "10.0.0.1/8"}, "SLM_TRUSTED_PROXIES"),
        ({"database_url": "mysql://u:canary@h/d"}, "SLM_DATABASE_URL"),
        ({"database_url": "canary"}, "SLM_DATABASE_URL"),
        ({"tls_cert": Path("cert.pem")}, "tls_key"),
        ({"failpoint": "after_commit:kill"}, "SLM_TESTING"),
    ],
)
def test_what_makes_no_sense_is_named_and_not_repeated(given: dict[str, Any], names: str) -> None:
    """A wrong setting is one sentence with the variable's name; a URL may hold a password."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**given)
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings can be logged."""
    monkeypatch.setenv("SLM_ENCRYPTION_KEYS", "canary-key")
    monkeypatch.setenv("SLM_METRICS_TOKEN", "canary-token")
    monkeypatch.setenv("SLM_DATABASE_URL", "postgresql://u:canary-password@h/d")
    assert "canary" not in repr(load_settings())


KUBERNETES = {
    "SLM_SERVICE_HOST": "10.96.0.12",
    "SLM_SERVICE_PORT": "8760",
    "SLM_SERVICE_PORT_HTTP": "8760",
    "SLM_PORT": "tcp://10.96.0.12:8760",
    "SLM_PORT_8760_TCP": "tcp://10.96.0.12:8760",
    "SLM_PORT_8760_TCP_PROTO": "tcp",
    "SLM_PORT_8760_TCP_PORT": "8760",
    "SLM_PORT_8760_TCP_ADDR": "10.96.0.12",
}


def test_what_kubernetes_sets_for_a_service_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a Service named slm each pod of the namespace has SLM_PORT=tcp://…: ignored, and said."""
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLM_HOST", "0.0.0.0")
    settings = load_settings()
    assert (settings.host, settings.port) == ("0.0.0.0", 8760)
    said = ignored_variables()
    assert said is not None
    assert said.startswith("ignored SLM_PORT, SLM_PORT_8760_TCP, SLM_PORT_8760_TCP_ADDR and 5 more")
    assert ignored_variables({"SLM_HOST": "0.0.0.0", "SLM_PORT": "8760", "PORT": "tcp://x"}) is None


@pytest.mark.parametrize("value", ["tcp://10.0.0.1:80", "udp://[::1]:53", ' "TCP://h" '])
@pytest.mark.parametrize("name", ["SLM_PORT", "SLM_HEARTBEAT_SECONDS", "SLM_LOG_LEVEL", "SLM_HOST"])
def test_no_setting_is_the_address_of_a_service(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Whatever the Service is called, its address is nobody's setting, and the default counts."""
    monkeypatch.setenv(name, value)
    assert load_settings() == Settings()
    field = name.removeprefix("SLM_").lower()
    assert getattr(load_settings(), field) == Settings.model_fields[field].default
    assert name in (ignored_variables() or "")


@pytest.mark.parametrize("form", ["{}", '"{}"', "'{}'", " {}\r\n", '\ufeff"{}"', "\u201c{}\u201d"])
def test_values_may_come_in_quotes(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """An env file's quotes, blanks and byte order mark are no part of a value."""
    for name, value in {
        "SLM_HOST": "0.0.0.0",
        "SLM_PORT": "0",
        "SLM_TESTING": "true",
        "SLM_DATA_DIR": "/var/lib/s l m",
        "SLM_DATABASE_URL": "postgresql://u:p%40@h/d",
        "SLM_ENDPOINTS": "strict",
        "SLM_ENDPOINT_ALLOW": "a.internal, 10.0.0.0/8",
        "SLM_TRUSTED_PROXIES": "10.0.0.1, 10.0.0.2",
        "SLM_ENCRYPTION_KEY_COMMAND": "vault read x",
    }.items():
        monkeypatch.setenv(name, form.format(value))
    settings = load_settings()
    assert (settings.host, settings.port, settings.testing) == ("0.0.0.0", 0, True)
    assert settings.data_dir == Path("/var/lib/s l m")
    assert settings.url.password == "p@"
    assert settings.endpoint_policy.allow == ("a.internal", "10.0.0.0/8")
    assert len(settings.trusted_proxies) == 2
    assert settings.encryption_key_command == "vault read x"


@pytest.mark.parametrize("password", ["p@ss", "a@b@c", "p@x/y", "p@x:y", "p?@", "p,@x"])
def test_a_password_with_special_characters_is_explained(password: str) -> None:
    """What makes a URL unreadable is named with its escape, and the password is not shown."""
    with pytest.raises(ConfigurationError, match="@ is %40") as caught:
        load_settings(database_url=SecretStr(f"postgresql://slm:{password}@db/slm"))
    assert password not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"), [("p%40s%25", "p@s%"), ("pa/ss#?:", "pa/ss#?:"), ("a,b", "a,b")]
)
def test_other_passwords_are_understood(written: str, meant: str) -> None:
    """Escapes are decoded, and what can be read without one is."""
    url = load_settings(database_url=SecretStr(f"postgresql://slm:{written}@db/slm")).url
    assert (url.password, url.host, url.database) == (meant, "db", "slm")
