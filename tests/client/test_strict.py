"""A typo'd agent, a wrong token and no server: three different sentences, and no quiet answer."""

from __future__ import annotations

import time
from typing import Any

import pytest

from slm import (
    AgentUnknown,
    LLMError,
    LLMInterface,
    SLMClient,
    SLMUnavailable,
    Step,
    Timings,
)
from slm.client.resolution.unknown import MAX_SAID, UnknownAgents, nearest
from tests.support.faults.backends import TENTH
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually

QUICK = Timings(**TENTH)
NOBODY = "http://127.0.0.1:9"


def follow(server: InLoopServer, **options: Any) -> SLMClient:
    return SLMClient(server.url, server.backend_token, timings=QUICK, **options)


async def test_an_unknown_agent_is_said_once_with_the_nearest_name(
    server: InLoopServer, admin: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """The default agent still answers, and the log says for whom and what was meant."""
    created = await admin.create("code-assistant")
    async with follow(server) as client:
        await eventually(lambda: client.revision >= created.revision)
        for _ in range(3):
            config = await client.resolve("code-asistant")
            assert config.step is Step.DEFAULT
            assert config.passed_over is not None
            assert "did you mean 'code-assistant'?" in config.passed_over
            await client.resolve("something\x1b[2J else")
    said = [r.getMessage() for r in caplog.records if "has no agent" in r.getMessage()]
    assert len(said) == 2
    assert "'code-asistant'" in said[0]
    assert "did you mean 'code-assistant'?" in said[0]
    assert all(line.isprintable() for line in said)


async def test_a_strict_client_raises_instead(server: InLoopServer, admin: Api) -> None:
    """Neither the default agent nor the built-in values answer for a typo."""
    await admin.create("off", is_active=False)
    created = await admin.create("code-assistant")
    async with follow(server, strict=True) as client:
        await eventually(lambda: client.revision >= created.revision)
        assert (await client.resolve("code-assistant")).step is Step.AGENT
        assert (await client.get_default_agent_config())["llm_provider"] == "ollama"
        with pytest.raises(AgentUnknown, match="did you mean 'code-assistant'") as caught:
            await client.resolve("code_assistant")
        assert (caught.value.agent_id, caught.value.nearest) == ("code_assistant", "code-assistant")
        with pytest.raises(AgentUnknown, match="'off' is switched off"):
            await client.get_agent_config("off")
        told = await client.explain("code_assistant")
        assert told.answered_by is None
        assert told.error is not None
        assert "did you mean" in told.error


async def test_strict_where_the_slm_cannot_be_asked(
    server: InLoopServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server and a wrong token are told as such; what the environment says still answers."""
    quick: dict[str, Any] = {"timings": QUICK, "start_timeout": 0.2, "strict": True}
    async with SLMClient(NOBODY, "slm_t", **quick) as client:
        with pytest.raises(SLMUnavailable, match=r"'billing' cannot be resolved: .*127\.0\.0\.1:9"):
            await client.resolve("billing")
        monkeypatch.setenv("AUTOBOT_LLM_MODEL", "m")
        config = await client.resolve("billing")
        assert config.step is Step.ENVIRONMENT
        monkeypatch.delenv("AUTOBOT_LLM_MODEL")
    async with SLMClient(server.url, "slm_wrong", **quick) as client:
        with pytest.raises(
            SLMUnavailable, match=r"cannot be resolved: .*token is unknown, expired or revoked;"
        ):
            await client.resolve("billing")


async def test_what_failed_first_is_said_first(
    server: InLoopServer, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a fallback cannot be called is no news to somebody whose token is wrong."""
    await admin.create("code-assistant")

    async def said(client: SLMClient) -> str:
        async with client, LLMInterface(client) as llm:
            # Whatever becomes of a call, here it is refused before anything is sent.
            with pytest.raises(LLMError) as caught:
                await llm.chat("code-asistant", [{"role": "user", "content": "x"}])
        return str(caught.value)

    def refuse(_: object) -> str:
        return "is no place for a test"

    monkeypatch.setattr("slm.endpoints.EndpointPolicy.refused_address", lambda *_: refuse(_))
    quick: dict[str, Any] = {"timings": QUICK, "start_timeout": 0.2}
    wrong = await said(SLMClient(server.url, "slm_wrong", **quick))
    nobody = await said(SLMClient(NOBODY, "slm_t", **quick))
    typo = await said(follow(server))
    assert "token" in wrong.partition("AUTOBOT_LLM_")[0]
    assert "127.0.0.1:9" in nobody.partition("AUTOBOT_LLM_")[0]
    assert typo.startswith("the SLM has no agent 'code-asistant'")
    assert "so the default agent answers: [ollama/" in typo
    for sentence in (wrong, nobody):
        assert "no AUTOBOT_LLM_* is set, so the built-in values answer: [ollama/" in sentence


def test_a_flood_of_unknown_names_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Names may come from requests: neither memory nor log grows with them, nor does time."""
    unknown = UnknownAgents()
    names = [f"agent-{n}" for n in range(50)]
    for n in range(MAX_SAID + 500):
        unknown.near(f"stranger-{n}", names)
    unknown.near("x" * 100_000, names)
    assert len(unknown._near) == MAX_SAID
    assert len(caplog.records) == MAX_SAID + 1
    many = [f"billing-{n:06}" for n in range(100_000)]
    began = time.perf_counter()
    assert nearest("biling-000042", many) is not None
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("code-asistant", "code-assistant"),
        ("Code-Assistant", "code-assistant"),
        ("code_assistant", "code-assistant"),
        ("code-assistant ", "code-assistant"),
        ("biling", "billing"),
        ("zzz", None),
        ("", None),
    ],
)
def test_the_nearest_name(asked: str, near: str | None) -> None:
    """A slip of the finger is recognised; what is like nothing is left alone."""
    assert nearest(asked, ["billing", "code-assistant", "support"]) == near
