"""Settings: what an operator sets, by argument or environment."""

from __future__ import annotations

import ipaddress
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from slm.errors import ConfigurationError
from slm.server.settings import load_settings


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
