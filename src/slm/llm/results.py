"""What LLMInterface returns: the result with the config that produced it, and the overrides.

Knows no provider and no transport.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from slm.client.config import ResolvedConfig, Step
from slm.endpoints import origin
from slm.llm.providers.base import PARTS, Completion, ToolCall, Usage


class Overrides(TypedDict, total=False):
    """What one call may set differently from the agent's config.

    Precedence for each value: the override, then `llm_options`, then the agent's own column.

    Attributes:
        model: another model of the same provider.
        temperature: 0 to 2; None sends none, for models that refuse one.
        max_tokens: the most tokens to generate; None leaves it to the provider.
        timeout: seconds for a whole call; for a stream, until the first token and between tokens.
        tools: tools in OpenAI's form, `{"type": "function", "function": {…}}`, for every provider.
        tool_choice: `auto`, `none`, `required`, or
            `{"type": "function", "function": {"name": …}}`.
        response_format: `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": …}`.
        options: further parameters of the provider, added to the agent's `llm_options`; they take
            precedence.
    """

    model: str
    temperature: float | None
    max_tokens: int | None
    timeout: float
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any] | None
    response_format: Mapping[str, Any] | None
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatResult:
    """A complete answer, and the configuration that produced it.

    Attributes:
        text: the model's answer.
        tool_calls: the tool calls that the model asks for.
        usage: the tokens used; None if the provider did not say.
        finish_reason: `stop`, `length`, `tool_calls`, `content_filter`, or the provider's own word.
        provider: `ollama`, `openai` or `anthropic`.
        model: the model that was asked for.
        agent_id: the agent the call was made for.
        source_agent_id: the agent whose configuration it was: `agent_id`, or the default agent;
            None if the environment or the hardcoded values were used.
        step: which step of the chain answered (docs/protocol.md section 5).
        revision: the revision of the configuration; None if it was not from the SLM.
        stale: whether the SLM may have had a newer configuration when the call started.
        reasoning: what the model thought, if the provider shows it.
        adjusted: the parameters that the model refused, and that were left out or renamed, such as
            `temperature dropped`.
        parts: what the provider needs back with the next request; part of `message`.
    """

    text: str
    tool_calls: tuple[ToolCall, ...]
    usage: Usage | None
    finish_reason: str
    provider: str
    model: str
    agent_id: str
    source_agent_id: str | None
    step: Step
    revision: int | None
    stale: bool
    reasoning: str = ""
    adjusted: tuple[str, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's turn, ready to append before the results of its tool calls.

        It is plain JSON. Data that only its provider understands, such as reasoning signatures, is
        in `provider_parts`, which is only sent back to the origin it came from.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments_json},
                }
                for call in self.tool_calls
            ]
        if self.parts:
            message[PARTS] = copy.deepcopy(dict(self.parts))
        return message

    def as_message(self) -> dict[str, Any]:
        """Return `message`."""
        return self.message


def result_of(
    completion: Completion, config: ResolvedConfig, model: str, stale: bool
) -> ChatResult:
    """Combine the completion with the config that produced it."""
    return ChatResult(
        text=completion.text,
        tool_calls=completion.tool_calls,
        usage=completion.usage,
        finish_reason=completion.finish_reason,
        provider=config.llm_provider,
        model=model,
        agent_id=config.agent_id,
        source_agent_id=config.source_agent_id,
        step=config.step,
        revision=config.revision,
        stale=stale,
        reasoning=completion.reasoning,
        adjusted=completion.adjusted,
        parts=_marked(completion.parts, config),
    )


def _marked(parts: Mapping[str, Any], config: ResolvedConfig) -> Mapping[str, Any]:
    """Return the parts, marked with their origin."""
    if not parts:
        return {}
    place = origin(config.llm_provider, config.llm_endpoint)
    return {"provider": config.llm_provider, "origin": place, "parts": dict(parts)}
