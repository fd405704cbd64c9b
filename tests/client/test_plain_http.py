"""Plain http to another machine: refused, unless somebody decided on it."""

from __future__ import annotations

import logging

import pytest

from slm import ConfigurationError, SLMClient
from slm.client.transport import addresses
from slm.client.transport.addresses import is_insecure
from slm.server.fleet.tracker import Fleet
from tests.support.servers import InLoopServer, eventually


def test_it_is_refused_and_the_sentence_says_how_to_decide_otherwise() -> None:
    """The default protects the token; the way out is named."""
    with pytest.raises(ConfigurationError, match=r"allow_insecure=True or SLM_ALLOW_INSECURE=1"):
        SLMClient("http://slm.internal", "slm_t")


def test_it_is_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the argument or the variable; the argument wins."""
    SLMClient("http://slm.internal", "slm_t", allow_insecure=True)
    monkeypatch.setenv("SLM_ALLOW_INSECURE", "1")
    SLMClient("http://slm.internal", "slm_t")
    with pytest.raises(ConfigurationError, match="https"):
        SLMClient("http://slm.internal", "slm_t", allow_insecure=False)


def test_what_counts_as_another_machine() -> None:
    """TLS and loopback are safe; everything else can be read on the way."""
    assert is_insecure("http://slm.internal:8760")
    assert is_insecure("http://10.0.0.7")
    assert not is_insecure("https://slm.internal")
    assert not is_insecure("http://127.0.0.1:8760")
    assert not is_insecure("http://[::1]:8760")


async def test_it_is_logged_at_each_start_and_shown_in_the_fleet(
    server: InLoopServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has to read the deployment to find out which backends run without TLS."""
    # There is but one machine here: it plays the other one.
    monkeypatch.setattr(addresses, "is_loopback", lambda _: False)
    caplog.set_level(logging.WARNING, "slm.client")
    with pytest.raises(ConfigurationError):
        SLMClient(server.url, server.backend_token)
    client = SLMClient(server.url, server.backend_token, name="mesh", allow_insecure=True)
    fleet = server.running.services.fleet
    for start in (1, 2):
        async with client:
            said = [r.getMessage() for r in caplog.records if "plain http" in r.getMessage()]
            assert len(said) == start
            assert server.url in said[-1]
            await eventually(lambda: _plain(fleet) == ["mesh"])


def _plain(fleet: Fleet) -> list[str | None]:
    """Return who is shown as connected without TLS."""
    return list({b.client.name for b in fleet.backends() if b.plain_http})
