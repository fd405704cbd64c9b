"""OpenTelemetry: one trace from the PUT to a backend's apply, and spans of LLM calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from slm import LLMInterface, SLMClient, protocol, tracing
from slm.errors import LLMError
from tests.server.raw import Api
from tests.servers import InLoopServer, eventually

_EXPORTER = InMemorySpanExporter()


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """What was traced; a process has one provider for good."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(_EXPORTER))
        trace.set_tracer_provider(provider)
    _EXPORTER.clear()
    yield _EXPORTER
    _EXPORTER.clear()


def _named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


async def test_one_trace_from_the_put_to_the_apply(
    admin: Api, server: InLoopServer, spans: InMemorySpanExporter
) -> None:
    """The operator's trace goes on through commit, feed and push into each backend's apply."""
    await admin.create("alpha")
    async with SLMClient(server.url, server.backend_token) as client:
        given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        answer = await admin.put("alpha", {"traceparent": given}, llm_model="m2")
        assert answer.status == 200

        async def applied() -> bool:
            return bool(_named(spans, "slm.apply")) and bool(_named(spans, "slm.push"))

        await eventually(applied)
        assert (await client.resolve("alpha")).llm_model == "m2"
    trace_id = int(given.split("-")[1], 16)
    for name in ("slm.commit", "slm.feed", "slm.push", "slm.apply"):
        [span] = _named(spans, name)[-1:]
        assert span.context is not None
        assert span.context.trace_id == trace_id, name
    [apply] = _named(spans, "slm.apply")
    assert dict(apply.attributes or {}) == {"slm.agent_id": "alpha", "slm.revision": 3}


def test_an_untraced_change_names_no_trace() -> None:
    """Where nothing is traced the frame is what it always was."""
    plain = protocol.AgentDeleted(agent_id="alpha", revision=3)
    assert "traceparent" not in protocol.encode(plain)
    traced = plain.model_copy(update={"traceparent": "00-ab-cd-01"})
    assert protocol.parse_server_message(protocol.encode(traced)) == traced


async def test_an_llm_call_is_a_span_with_the_agent_and_the_revision(
    admin: Api, server: InLoopServer, spans: InMemorySpanExporter
) -> None:
    """GenAI attribute names, the agent, the revision and how it failed; never the key."""
    await admin.create(
        "alpha",
        llm_provider="openai",
        llm_model="gpt-x",
        llm_api_key="sk-canary-of-a-span",
        llm_endpoint="http://127.0.0.1:9/v1",
        llm_timeout=1,
    )
    async with SLMClient(server.url, server.backend_token) as client:
        llm = LLMInterface(client)
        with pytest.raises(LLMError):
            await llm.chat("alpha", [{"role": "user", "content": "hi"}], max_tokens=7)
        await llm.close()
    [span] = _named(spans, "chat gpt-x")
    told = dict(span.attributes or {})
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "openai"
    assert told["gen_ai.request.max_tokens"] == 7
    assert (told["slm.agent_id"], told["slm.revision"], told["slm.step"]) == ("alpha", 2, "agent")
    assert "error.type" in told
    assert not span.status.is_ok
    for finished in spans.get_finished_spans():
        assert "sk-canary-of-a-span" not in finished.to_json()


def test_without_a_trace_there_is_nothing_to_carry() -> None:
    """Outside a span there is no context, and joining none makes no span."""
    assert tracing.traceparent() is None
    with tracing.joined("slm.apply", None) as span:
        assert span is None
