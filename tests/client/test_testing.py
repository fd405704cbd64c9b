"""slm.testing: the fake client behaves as the real one, without a network."""

from __future__ import annotations

import asyncio
import inspect
import socket
from typing import Any

import pytest

from slm import AgentUnknown, ClientStatus, ConfigurationError, LLMInterface, SLMClient, Step
from slm.client.config import ResolvedConfig
from slm.testing import FakeSLMClient

BILLING: dict[str, dict[str, Any]] = {
    "billing": {
        "llm_provider": "openai",
        "llm_model": "gpt-4.1",
        "llm_api_key": "sk-canary",
        "llm_options": {"stop": ["x"]},
    }
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the fake does, it opens no connection."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_public_method_of_the_client_works_without_an_slm() -> None:
    """Whatever is inherited looks for no SLM; a method that is added must be tried here."""
    client = FakeSLMClient(BILLING)
    config = client.resolve_now("billing")
    arguments: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("connect", "connect_now", "close", "close_now"), ()),
        **dict.fromkeys(("get_default_agent_config", "get_default_agent_config_now"), ()),
        **dict.fromkeys(("resolve", "resolve_now", "peek", "explain", "explain_now"), ("billing",)),
        **dict.fromkeys(("get_agent_config", "get_agent_config_now"), ("billing",)),
        **dict.fromkeys(("on_change", "register_validator"), (lambda *_: None,)),
        "in_use": (config,),
    }
    for name in (name for name in dir(SLMClient) if not name.startswith("_")):
        member = getattr(client, name)
        if callable(member):
            outcome = member(*arguments[name])
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
    with client as entered:
        assert entered is client


async def test_it_answers_as_the_real_one() -> None:
    """By the chain, as a frozen value or a dict with the key, which prints as ***."""
    client = FakeSLMClient(BILLING)
    async with client:
        config = await client.resolve("billing")
        assert (config.step, config.llm_model, config.stale) == (Step.AGENT, "gpt-4.1", False)
        fields = await client.get_agent_config("billing")
        assert fields["llm_api_key"] == "sk-canary"
        assert "canary" not in repr(fields)
        assert client.peek("billing") is config
        assert (await client.resolve("unknown")).step is Step.DEFAULT
        assert (await client.get_default_agent_config())["llm_provider"] == "ollama"
        assert client.resolve_now("billing") is config
        assert (await client.explain("billing")).answered_by == "agent"
    assert client.status is ClientStatus.CLOSED


def test_a_change_is_in_force_when_it_returns() -> None:
    """Callbacks have been called by then; deletes, defaults and inactive agents work as well."""
    client = FakeSLMClient(BILLING)
    heard: list[tuple[str, str | None]] = []

    def plain(agent_id: str, config: ResolvedConfig | None) -> None:
        heard.append((agent_id, None if config is None else config.llm_model))

    async def coroutine(agent_id: str, config: ResolvedConfig | None) -> None:
        await asyncio.sleep(0)
        heard.append((agent_id, "coroutine"))

    stop = client.on_change(plain)
    client.on_change(coroutine)
    revision = client.set_agent("billing", llm_model="gpt-5")
    assert client.revision == revision
    config = client.resolve_now("billing")
    assert (config.llm_model, config.revision) == ("gpt-5", revision)
    assert config.llm_api_key is not None  # what is not named stays
    stop()
    client.delete_agent("billing")
    assert heard == [("billing", "gpt-5"), ("billing", "coroutine"), ("billing", "coroutine")]
    assert client.resolve_now("billing").step is Step.DEFAULT
    client.set_agent("house", llm_model="h", is_default=True)
    assert client.resolve_now("billing").source_agent_id == "house"
    client.set_agent("billing", is_active=False)
    assert client.resolve_now("billing").step is Step.DEFAULT


def test_an_outage_can_be_played() -> None:
    """What is known is served; what is not comes from the chain's last steps."""
    client = FakeSLMClient(BILLING)
    client.disconnect("the SLM is away")
    assert (client.status, client.last_error) == (ClientStatus.DISCONNECTED, "the SLM is away")
    assert client.peek("billing") is None
    assert client.resolve_now("billing").llm_model == "gpt-4.1"
    client.reconnect()
    assert client.peek("billing") is not None


def test_a_validator_keeps_the_last_good_config() -> None:
    """As with a real client: refused changes are not used."""
    client = FakeSLMClient(BILLING)
    client.register_validator(lambda c: "no" if c.llm_model == "bad" else None)
    client.set_agent("billing", llm_model="bad")
    assert client.resolve_now("billing").llm_model == "gpt-4.1"


def test_it_can_be_strict() -> None:
    """A typo in the code under test fails its test."""
    client = FakeSLMClient(BILLING, strict=True)
    with pytest.raises(AgentUnknown, match="did you mean 'billing'"):
        client.resolve_now("biling")


@pytest.mark.parametrize(
    "fields", [{"model": "x"}, {"llm_timeout": "canary"}, {"revision": 3}, {"llm_model": None}]
)
def test_a_field_that_is_none_is_a_mistake_of_the_test(fields: dict[str, Any]) -> None:
    """Said at once, by the field's name alone."""
    with pytest.raises(ConfigurationError) as caught:
        FakeSLMClient().set_agent("a", **fields)
    assert next(iter(fields)) in str(caught.value)
    assert "canary" not in str(caught.value)


async def test_an_llm_interface_takes_it() -> None:
    """Where a client is expected, this is one."""
    client = FakeSLMClient(BILLING)
    async with client, LLMInterface(client) as llm:
        assert isinstance(client, SLMClient)
        assert llm is not None
