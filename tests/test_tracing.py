"""OpenTelemetry: one trace from the PUT to a backend's apply, and spans of LLM calls."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from slm import LLMInterface, SLMClient, protocol
from slm.common import tracing
from slm.errors import LLMError
from slm.llm import ChatResult
from tests.support.llm.providers import DIALECTS, Dialect, RecordingServer, answering
from tests.support.raw import Api
from tests.support.servers import InLoopServer, ServerProcess, eventually

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""The `traceparent` of W3C's own example, as an operator's tool would send it."""
GIVEN_TRACE, GIVEN_SPAN = (int(part, 16) for part in GIVEN.split("-")[1:3])

PROMPT = "a question that no span may hold"

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


def _begun(spans: InMemorySpanExporter) -> set[str]:
    """The first word of each finished span's name."""
    return {span.name.partition(" ")[0] for span in spans.get_finished_spans()}


def _trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    trace_id: int = span.context.trace_id
    return trace_id


def _parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


async def test_one_trace_from_the_put_to_the_apply(
    admin: Api, server: InLoopServer, spans: InMemorySpanExporter
) -> None:
    """The operator's trace goes on through commit, feed and push into each backend's apply."""
    await admin.create("alpha")
    async with SLMClient(server.url, server.backend_token) as client:
        answer = await admin.put("alpha", {"traceparent": GIVEN}, llm_model="m2")
        assert answer.status == 200

        await eventually(lambda: {"PUT", "slm.apply", "slm.push"} <= _begun(spans))
        assert (await client.resolve("alpha")).llm_model == "m2"
    # Everything of the create was before, in a trace of its own.
    [put] = _named(spans, "PUT /api/agents/{agent_id}")
    assert (_trace_of(put), _parent_of(put)) == (GIVEN_TRACE, GIVEN_SPAN)
    assert put.kind is trace.SpanKind.SERVER
    assert put.context is not None
    for name in ("slm.commit", "slm.feed", "slm.push", "slm.apply"):
        [span] = [span for span in _named(spans, name) if _trace_of(span) == GIVEN_TRACE]
        assert _parent_of(span) == put.context.span_id, name
    [push] = [span for span in _named(spans, "slm.push") if _trace_of(span) == GIVEN_TRACE]
    assert dict(push.attributes or {}) == {"slm.revision": 3, "slm.subscribers": 1}
    [apply] = _named(spans, "slm.apply")
    assert dict(apply.attributes or {}) == {"slm.agent_id": "alpha", "slm.revision": 3}


@contextlib.asynccontextmanager
async def _collector(exported: list[Span]) -> AsyncIterator[str]:
    """Run what an OpenTelemetry collector is to an exporter: OTLP over HTTP."""

    async def take(request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest.FromString(await request.read())
        exported.extend(
            span
            for resource in message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        )
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def test_one_trace_goes_through_two_processes(
    tmp_path: Path, session: aiohttp.ClientSession, spans: InMemorySpanExporter
) -> None:
    """A server of its own exports to a collector; the backend's apply is a child of its PUT."""
    exported: list[Span] = []
    async with _collector(exported) as endpoint:
        traced = {
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        async with (
            ServerProcess(tmp_path / "data", env=traced) as server,
            SLMClient(server.url, server.backend_token) as client,
        ):
            async with session.put(
                f"{server.url}/api/agents/default",
                json={"llm_model": "m2"},
                headers={"Authorization": f"Bearer {server.admin_token}", "traceparent": GIVEN},
            ) as answer:
                assert answer.status == 200
                revision = int(answer.headers["SLM-Revision"])
            await eventually(lambda: client.revision >= revision)
            names = {"PUT /api/agents/{agent_id}", "slm.commit", "slm.feed", "slm.push"}
            await eventually(lambda: names <= {span.name for span in exported})
    ours = {
        span.name: span for span in exported if span.trace_id == GIVEN_TRACE.to_bytes(16, "big")
    }
    put = ours["PUT /api/agents/{agent_id}"]
    assert put.parent_span_id == GIVEN_SPAN.to_bytes(8, "big")
    for name in ("slm.commit", "slm.feed", "slm.push"):
        assert ours[name].parent_span_id == put.span_id, name
    [apply] = _named(spans, "slm.apply")
    assert (_trace_of(apply), _parent_of(apply)) == (
        GIVEN_TRACE,
        int.from_bytes(put.span_id, "big"),
    )


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


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("dialect", DIALECTS, ids=repr)
async def test_a_call_that_succeeds_is_a_span_with_what_it_took(
    admin: Api,
    server: InLoopServer,
    spans: InMemorySpanExporter,
    dialect: Dialect,
    streamed: bool,
) -> None:
    """Model, finish reason, tokens, agent and revision, whole or streamed; no prompt, no key."""
    async with RecordingServer(answering(dialect, "Greetings")).running() as provider:
        created = await admin.create(
            "alpha",
            llm_provider=dialect.provider,
            llm_model="model-1",
            llm_api_key="sk-canary-of-a-span",
            llm_endpoint=dialect.endpoint(provider.url),
            llm_temperature=0.25,
            llm_max_tokens=99,
        )
        assert created.status == 201
        async with (
            SLMClient(server.url, server.backend_token) as client,
            LLMInterface(client) as llm,
        ):
            spans.clear()
            with trace.get_tracer("an application").start_as_current_span("handle") as handle:
                result = await _ask(llm, streamed)
    assert result.text == "Greetings"
    [span] = _named(spans, "chat model-1")
    assert span.kind is trace.SpanKind.CLIENT
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": dialect.provider,
        "gen_ai.request.model": "model-1",
        "gen_ai.request.temperature": 0.25,
        "gen_ai.request.max_tokens": 99,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.agent.id": "alpha",
        "slm.agent_id": "alpha",
        "slm.revision": created.revision,
        "slm.step": "agent",
    }
    assert span.status.status_code is trace.StatusCode.UNSET
    assert _parent_of(span) == handle.get_span_context().span_id
    for finished in spans.get_finished_spans():
        for secret in ("sk-canary-of-a-span", PROMPT, result.text):
            assert secret not in finished.to_json()


async def _ask(llm: LLMInterface, streamed: bool) -> ChatResult:
    messages = [{"role": "user", "content": PROMPT}]
    if not streamed:
        return await llm.chat("alpha", messages)
    stream = llm.stream("alpha", messages)
    async for _ in stream:
        pass
    return stream.result


async def test_a_stream_that_is_left_early_ends_its_span(
    admin: Api, server: InLoopServer, spans: InMemorySpanExporter
) -> None:
    """Whoever stops reading a stream leaves a span that ended, without a failure or a finish."""
    dialect = DIALECTS[0]
    async with RecordingServer(answering(dialect)).running() as provider:
        await admin.create(
            "alpha",
            llm_provider=dialect.provider,
            llm_model="model-1",
            llm_api_key="sk-canary-of-a-span",
            llm_endpoint=dialect.endpoint(provider.url),
        )
        async with (
            SLMClient(server.url, server.backend_token) as client,
            LLMInterface(client) as llm,
            llm.stream("alpha", [{"role": "user", "content": PROMPT}]) as stream,
        ):
            async for _ in stream:
                break
    [span] = _named(spans, "chat model-1")
    told = dict(span.attributes or {})
    assert (told["slm.agent_id"], told["slm.revision"]) == ("alpha", 2)
    assert told.keys() & {"error.type", "gen_ai.response.finish_reasons"} == set()
    assert span.status.status_code is trace.StatusCode.UNSET


def test_without_a_trace_there_is_nothing_to_carry() -> None:
    """Outside a span there is no context, and joining none makes no span."""
    assert tracing.traceparent() is None
    with tracing.joined("slm.apply", None) as span:
        assert span is None
