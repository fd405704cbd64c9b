"""What a client is made with, from arguments and from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from slm import BlockingSLMClient, ClientStatus, ConfigurationError, SLMClient, lifespan
from slm.client.options import read_options
from slm.client.transport.addresses import usable_urls
from tests.support.servers import InLoopServer, eventually

NOTHING = {
    "cache_file": None,
    "cache_key": None,
    "ca_file": None,
    "client_cert": None,
    "name": None,
    "proxy": None,
    "trust_env": False,
    "allow_insecure": None,
}


def options(**given: object) -> object:
    arguments = {"slm_url": None, "token": "slm_t", "token_file": None} | NOTHING | given
    return read_options(**arguments)  # type: ignore[arg-type]


async def test_a_client_without_arguments_reads_the_environment(
    server: InLoopServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLM_URL, SLM_TOKEN_FILE, SLM_NAME, SLM_CACHE_FILE and SLM_CACHE_KEY, as with any SDK."""
    key = Fernet.generate_key().decode()
    token = tmp_path / "backend.token"
    token.write_bytes(b"\xef\xbb\xbf" + server.backend_token.encode() + b"\r\n")
    monkeypatch.setenv("SLM_URL", f' "{server.url}/" ')
    monkeypatch.setenv("SLM_TOKEN_FILE", f"'{token}'")
    monkeypatch.setenv("SLM_NAME", '"billing-backend"')
    monkeypatch.setenv("SLM_CACHE_FILE", str(tmp_path / "slm.cache"))
    monkeypatch.setenv("SLM_CACHE_KEY", f"'{key}'\n")
    async with SLMClient() as client:
        assert client.status is ClientStatus.LIVE
        fleet = server.running.services.fleet
        await eventually(lambda: any("billing-backend" in str(b) for b in fleet.backends()))
        await eventually((tmp_path / "slm.cache").exists)
    Fernet(key).decrypt(_token_in((tmp_path / "slm.cache").read_bytes()))


def _token_in(raw: bytes) -> bytes:
    import json

    envelope = json.loads(raw)
    return next(str(v).encode() for v in envelope.values() if str(v).startswith("gAAAA"))


async def test_arguments_win_over_the_environment(
    server: InLoopServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written in code is what is used."""
    monkeypatch.setenv("SLM_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SLM_TOKEN", "slm_wrong")
    async with SLMClient(server.url, server.backend_token) as client:
        assert client.status is ClientStatus.LIVE


def test_the_other_ways_to_make_a_client_read_it_too(
    server: InLoopServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BlockingSLMClient() and lifespan() need no address either."""
    with pytest.raises(ConfigurationError, match="SLM_URL"):
        BlockingSLMClient(token="slm_t")
    monkeypatch.setenv("SLM_URL", server.url)
    BlockingSLMClient(token="slm_t")
    lifespan(token="slm_t")


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("https://a,https://b", ("https://a", "https://b")),
        (" https://a , wss://b/ ,, https://a ", ("https://a", "https://b")),
        ('"https://a","https://b"', ("https://a", "https://b")),
        ('"https://a, https://b"', ("https://a", "https://b")),
    ],
)
def test_several_addresses_are_separated_by_commas(
    text: str, urls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the variable, in the argument, or as a list; each is tried once a turn."""
    assert usable_urls(text) == urls
    monkeypatch.setenv("SLM_URL", text)
    assert usable_urls(None) == urls
    assert usable_urls(list(urls)) == urls


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "https://a,",
        "https://a,http://slm.internal",
        "https://a,canary",
        "https://a;https://b/canary canary",
        '"https://canary',
        "https://\udce4canary",
        "https://a:0",
        ",".join(f"https://h{n}" for n in range(17)),
    ],
)
def test_an_address_that_is_none_is_refused_with_a_sentence(text: str) -> None:
    """The sentence says what is expected and does not repeat what may hold a secret."""
    if text == "https://a,":
        assert usable_urls(text) == ("https://a",)
        return
    with pytest.raises(ConfigurationError, match="slm_url") as caught:
        usable_urls(text)
    assert "canary" not in str(caught.value)
    assert caught.value.__context__ is None


def test_what_kubernetes_sets_for_a_service_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service named slm is pointed out, and sent nothing: nobody chose it."""
    monkeypatch.setenv("SLM_SERVICE_HOST", "10.96.0.12")
    monkeypatch.setenv("SLM_SERVICE_PORT", "8760")
    monkeypatch.setenv("SLM_PORT", "tcp://10.96.0.12:8760")
    with pytest.raises(ConfigurationError, match="SLM_URL=https://slm:8760"):
        options()
    monkeypatch.setenv("SLM_URL", "tcp://10.96.0.12:8760")
    with pytest.raises(ConfigurationError, match="Kubernetes sets for a Service"):
        options()
    monkeypatch.setenv("SLM_URL", "https://slm:8760")
    assert str(options().site) == "https://slm:8760"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLM_TOKEN", '"slm_canary', "SLM_TOKEN has a quote at one end only"),
        ("SLM_TOKEN", "slm_canary two", "SLM_TOKEN holds no token"),
        ("SLM_TOKEN", "slm_canary\u00e4", "SLM_TOKEN holds no token"),
        ("SLM_TOKEN_FILE", "/no/such/canary.token", "the token file .* cannot be read"),
        ("SLM_CA_FILE", "/no/such/canary.pem", "ca_file .* cannot be used"),
        ("SLM_CLIENT_CERT", "/no/such/canary.pem", "client_cert .* cannot be used"),
        ("SLM_CLIENT_KEY", "/no/such/canary.pem", "SLM_CLIENT_KEY is set, but not"),
        ("SLM_CACHE_KEY", "canary", "cache_key must be a Fernet key"),
        ("SLM_ALLOW_INSECURE", "canary", "SLM_ALLOW_INSECURE must be 1 or 0"),
        ("SLM_PROXY", "canary", "SLM_PROXY must be an http or https URL"),
        ("SLM_PROXY", "socks5://u:canary@p:1", "SOCKS is not supported"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(
    name: str, value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which variable it is and what is expected, at once; never what a secret is."""
    monkeypatch.setenv("SLM_URL", "https://slm.internal")
    monkeypatch.setenv("SLM_CACHE_FILE", str(tmp_path / "cache"))
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=said) as caught:
        options(token=None if "TOKEN" in name else "slm_t")
    if "file" not in said.lower() and "cert" not in said:
        assert "canary" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_token_file_of_a_windows_editor_is_read(tmp_path: Path, encoding: str) -> None:
    """A byte order mark, quotes, a line break or "Bearer" is no part of the token."""
    file = tmp_path / "token"
    for text in ("slm_token\r\n", '"slm_token"\n', "Bearer slm_token"):
        file.write_bytes(text.encode(encoding))
        made = options(slm_url="https://slm.internal", token=None, token_file=file)
        assert made.site.token.headers() == {"Authorization": "Bearer slm_token"}  # type: ignore[attr-defined]


def test_a_token_file_that_is_no_text_is_named_without_its_content(tmp_path: Path) -> None:
    """Neither the sentence nor the error's chain holds what is in the file."""
    file = tmp_path / "token"
    file.write_bytes(b"slm_canary\xff\xfe")
    with pytest.raises(ConfigurationError, match="it is not text") as caught:
        options(slm_url="https://slm.internal", token=None, token_file=file)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("route", ["/api", "/ws", "/api/agents/", "/readyz"])
def test_a_route_at_the_end_of_an_address_is_pointed_out(route: str) -> None:
    """Whoever copied a route along is told so, rather than getting a 404 from somewhere."""
    with pytest.raises(ConfigurationError, match="route of the API"):
        usable_urls(f"https://slm.example{route}")
    assert usable_urls("https://slm.example/slm-api") == ("https://slm.example/slm-api",)
