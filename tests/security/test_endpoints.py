"""Where a key may be sent: what is refused at save, in the strict mode, and at the last moment."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm import SLMClient
from slm.endpoints import EndpointPolicy, parse_allowed
from slm.errors import ConfigurationError, LLMError
from slm.llm import LLMInterface, TransportSettings
from tests.support.http import Caller, admin, agent
from tests.support.recorder import recording_provider
from tests.support.servers import InLoopServer, running_server

ALWAYS_REFUSED = [
    "file:///etc/passwd",
    "gopher://example.com/",
    "https://user:secret@example.com/v1",
    "https://example.com/v1#fragment",
    "http://169.254.169.254/latest/meta-data",
    "http://[fd00:ec2::254]/",
    "http://2852039166/",
    "http://0xA9FEA9FE/",
    "http://169.254.169.254.:80/",
    "http://[::ffff:169.254.169.254]/",
    "http://[fe80::1]/",
    "http://metadata.google.internal/",
    "http://0.0.0.0/",
]
STRICTLY_REFUSED = [
    "http://localhost:11434",
    "http://ollama.localhost",
    "http://127.0.0.1:11434",
    "http://127.1/",
    "http://[::1]:8000",
    "http://10.0.0.7:8000",
    "http://192.168.1.4",
    "http://172.16.0.1",
    "http://100.64.0.1",
    "http://[fd12::1]",
    "http://[::ffff:10.0.0.7]",
]


async def test_what_is_never_an_endpoint(ask: Caller) -> None:
    """Files, user names, metadata and link-local addresses in any spelling: 422, without echo."""
    for url in ALWAYS_REFUSED:
        created = await ask("POST", "/api/agents", agent("a", llm_endpoint=url))
        changed = await ask("PUT", "/api/agents/default", {"llm_endpoint": url})
        for answer in (created, changed):
            assert (answer.status, answer.code) == (422, "invalid-request"), url
            assert answer.body["errors"][0]["loc"] == ["body", "llm_endpoint"]
            assert url not in str(answer.body)


async def test_loopback_and_private_ranges_are_allowed_unless_strict(ask: Caller) -> None:
    """That is where an Ollama server lives."""
    for number, url in enumerate(STRICTLY_REFUSED):
        made = await ask("POST", "/api/agents", agent(f"a{number}", llm_endpoint=url))
        assert made.status == 201, url


async def test_the_strict_mode_and_its_exceptions(tmp_path: Path) -> None:
    """With SLM_ENDPOINTS=strict only public addresses are saved, and what is allowed by name."""
    settings = {
        "endpoints": "strict",
        "endpoint_allow": "ollama.internal, 10.9.0.0/16,localhost",
    }
    async with running_server(tmp_path / "data", **settings) as server, admin(server) as ask:
        for url in STRICTLY_REFUSED:
            if url == "http://localhost:11434":
                continue
            refused = await ask("POST", "/api/agents", agent("a", llm_endpoint=url))
            assert (refused.status, refused.code) == (422, "invalid-request"), url
            assert refused.body["errors"][0]["type"] == "endpoint_refused"
        allowed = ["https://api.example.com/v1", "http://ollama.internal", "http://10.9.3.4", None]
        for number, endpoint in enumerate(allowed):
            made = await ask("POST", "/api/agents", agent(f"a{number}", llm_endpoint=endpoint))
            assert made.status == 201, endpoint
        moved = await ask("PUT", "/api/agents/a0", {"llm_endpoint": "http://10.8.0.1"})
        assert moved.status == 422
        # localhost is allowed here, so Ollama's own endpoint is, too.
        own = await ask("PUT", "/api/agents/a0", {"llm_provider": "ollama", "llm_endpoint": None})
        assert own.status == 200


async def test_an_agent_that_stands_on_a_refused_endpoint_can_still_be_changed(
    server: InLoopServer, ask: Caller
) -> None:
    """Only what is sent is checked; but a new provider brings its own endpoint with it."""
    await ask("POST", "/api/agents", agent("old", llm_endpoint="http://10.0.0.7"))
    await server.stop()
    await server.start(endpoints="strict")
    async with admin(server) as again:
        assert (await again("PUT", "/api/agents/old", {"llm_model": "n"})).status == 200
        to_ollama = {"llm_provider": "ollama", "llm_endpoint": None}
        assert (await again("PUT", "/api/agents/old", to_ollama)).status == 422


@given(address=st.ip_addresses())
def test_strict_lets_only_public_addresses_through(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    """Whatever strict mode lets through is a public address, and no mode lets metadata through."""
    strict = EndpointPolicy(strict=True)
    if strict.refused_address(address) is None:
        assert address.is_global
    everything = EndpointPolicy(True, parse_allowed("0.0.0.0/0,::/0"))
    assert everything.refused_address(ipaddress.ip_address("169.254.169.254"))
    assert everything.refused_address(ipaddress.ip_address("fd00:ec2::254"))
    assert EndpointPolicy(True, ("somewhere",)).refused_address(
        ipaddress.ip_address("169.254.169.254"), "somewhere"
    )


async def test_the_address_is_judged_again_where_the_name_leads(
    ask: Caller, server: InLoopServer
) -> None:
    """A name that leads to loopback is refused by a strict backend, and nothing is sent there."""
    async with recording_provider() as provider:
        endpoint = provider.openai_url.replace("127.0.0.1", "localhost")
        body = agent("a", llm_endpoint=endpoint, llm_api_key="sk-never-sent")
        assert (await ask("POST", "/api/agents", body)).status == 201
        async with SLMClient(server.url, token=server.backend_token) as client:
            strict = TransportSettings(endpoints=EndpointPolicy(strict=True))
            async with LLMInterface(client, transport=strict) as llm:
                with pytest.raises(LLMError, match="public"):
                    await llm.chat("a", [{"role": "user", "content": "x"}])
            assert provider.seen == []
            allowed = TransportSettings(endpoints=EndpointPolicy(True, ("localhost",)))
            async with LLMInterface(client, transport=allowed) as llm:
                await llm.chat("a", [{"role": "user", "content": "x"}])
            assert provider.keys() == {"sk-never-sent"}


def test_the_backend_reads_the_same_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLM_ENDPOINTS and SLM_ENDPOINT_ALLOW mean on a backend what they mean on the server."""
    monkeypatch.setenv("SLM_ENDPOINTS", "strict")
    monkeypatch.setenv("SLM_ENDPOINT_ALLOW", "Ollama.Internal.,10.0.0.0/8")
    policy = TransportSettings().endpoints
    assert policy == EndpointPolicy(True, ("ollama.internal", "10.0.0.0/8"))
    monkeypatch.setenv("SLM_ENDPOINTS", "loose")
    with pytest.raises(ConfigurationError, match="SLM_ENDPOINTS"):
        TransportSettings()
