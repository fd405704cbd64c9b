"""The span of one LLM call: OpenTelemetry's GenAI names, plus agent and revision.

Knows no provider. Contains no prompt, no answer and no key.
"""

from __future__ import annotations

from typing import Any

from slm.common import tracing
from slm.errors import LLMError
from slm.llm.call import Call
from slm.llm.results import ChatResult


def begin(call: Call) -> Any:
    """Return the started span of a call, or None without tracing.

    Names: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
    """
    if not tracing.enabled():
        return None
    config = call.config
    attributes: dict[str, str | int | float | bool | tuple[str, ...]] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": config.llm_provider,
        "gen_ai.request.model": call.model,
        "gen_ai.agent.id": config.agent_id,
        "slm.agent_id": config.agent_id,
        "slm.step": config.step.value,
    }
    if config.revision is not None:
        attributes["slm.revision"] = config.revision
    if call.request.temperature is not None:
        attributes["gen_ai.request.temperature"] = call.request.temperature
    if call.request.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = call.request.max_tokens
    return tracing.begin(f"chat {call.model}", attributes)


def end(span: Any, outcome: ChatResult | BaseException | None) -> None:
    """End the span with the call's outcome; None if the caller left before the end."""
    if span is None:
        return
    if isinstance(outcome, BaseException):
        code = outcome.code if isinstance(outcome, LLMError) else type(outcome).__name__
        tracing.failed(span, code)
    elif outcome is not None:
        span.set_attribute("gen_ai.response.finish_reasons", (outcome.finish_reason,))
        if outcome.adjusted:
            span.set_attribute("slm.adjusted", outcome.adjusted)
        if outcome.usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", outcome.usage.input_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", outcome.usage.output_tokens)
    tracing.end(span)
