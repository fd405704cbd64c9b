"""Explains a resolution: every step of the chain, its result, and why it was skipped.

Reads what is known and requests nothing. Shows where a key came from, never the key
(docs/protocol.md section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.entry import KnownAgent
from slm.client.config import ResolvedConfig, Step
from slm.client.resolution.environment import PREFIX, from_environment, hardcoded
from slm.client.resolution.unknown import nearest
from slm.client.status import ClientStatus
from slm.errors import SLMError
from slm.protocol import ExplainedStep, Explanation, storable

_CAME: Final = {
    "snapshot": "with the snapshot of all agents",
    "fetch": "by a request of its own",
    "file": "from the snapshot file",
}


def explained(
    cache: AgentConfigCache,
    agent_id: str,
    outcome: ResolvedConfig | Exception,
    status: ClientStatus,
    last_error: str | None,
) -> Explanation:
    """Return how an agent is resolved.

    Args:
        cache: what is known.
        agent_id: the agent that is resolved.
        outcome: what the chain returned or raised.
        status: how the client is connected.
        last_error: what failed last.
    """
    answer, error = None, None
    if isinstance(outcome, ResolvedConfig):
        answer = outcome
    else:
        error = str(outcome) if isinstance(outcome, SLMError) else type(outcome).__name__
    epoch = cache.position.epoch
    return Explanation(
        agent_id=storable(agent_id),
        answered_by=None if answer is None else answer.step.value,
        error=error and storable(error),
        status=status.value,
        revision=cache.position.revision,
        epoch=epoch and storable(epoch),
        last_error=last_error and storable(last_error),
        steps=explain_steps(cache, agent_id, answer, last_error or f"it is {status.value}"),
    )


def explain_steps(
    cache: AgentConfigCache, agent_id: str, answer: ResolvedConfig | None, unreachable: str
) -> list[ExplainedStep]:
    """Return the result of each of the four steps; raises nothing, whatever is in the cache.

    Args:
        cache: what is known.
        agent_id: the agent that is resolved.
        answer: what the chain returned; None if it raised.
        unreachable: why the SLM cannot be asked, if it cannot.
    """
    answered = answer.step if answer is not None else None
    steps = [
        _told(Step.AGENT, lambda: _own_step(cache, agent_id, unreachable)),
        _told(Step.DEFAULT, lambda: _default_step(cache, agent_id, unreachable)),
        _told(Step.ENVIRONMENT, lambda: _environment_step(agent_id)),
        _told(Step.HARDCODED, lambda: _hardcoded_step(agent_id)),
    ]
    return [
        step.model_copy(update={"answers": answered is not None and step.step == answered.value})
        for step in steps
    ]


def _told(step: Step, tell: Callable[[], ExplainedStep]) -> ExplainedStep:
    """Return a step's explanation; if it fails, the other steps are still explained."""
    try:
        return tell()
    except Exception as error:
        what = type(error).__name__
    return ExplainedStep(step=step.value, said=f"this step cannot be explained ({what})")


def _own_step(cache: AgentConfigCache, agent_id: str, unreachable: str) -> ExplainedStep:
    known = cache.find(agent_id)
    if known is None:
        said = _unknown("no agent of this name", cache, unreachable)
        near = nearest(agent_id, cache.agents)
        return _step(Step.AGENT, said if near is None else f"{said}; did you mean {near!r}?")
    return _known_step(Step.AGENT, cache, known)


def _default_step(cache: AgentConfigCache, agent_id: str, unreachable: str) -> ExplainedStep:
    default_id = cache.default_id
    known = cache.find(default_id) if default_id is not None else None
    if known is None:
        return _step(Step.DEFAULT, _unknown("no default agent", cache, unreachable))
    if default_id == agent_id:
        return _step(Step.DEFAULT, "it is the default agent itself")
    return _known_step(Step.DEFAULT, cache, known)


def _environment_step(agent_id: str) -> ExplainedStep:
    found = from_environment(agent_id)
    said = "; ".join(found.warnings)
    if found.config is None:
        return _step(Step.ENVIRONMENT, said or f"no {PREFIX}* variable is set")
    key = f"from {PREFIX}API_KEY" if found.config.llm_api_key is not None else "no key"
    return _step(Step.ENVIRONMENT, said or f"{PREFIX}* variables are set", found.config, key=key)


def _hardcoded_step(agent_id: str) -> ExplainedStep:
    return _step(Step.HARDCODED, "the last resort", hardcoded(agent_id), key="no key")


def _unknown(what: str, cache: AgentConfigCache, unreachable: str) -> str:
    if cache.liveness.live:
        return f"the SLM has {what} that this token may see"
    return f"nothing is known of it, and the SLM cannot be asked: {unreachable}"


def _known_step(step: Step, cache: AgentConfigCache, known: KnownAgent) -> ExplainedStep:
    newest = known.newest
    if not known.is_active:
        return _step(step, "it is switched off", newest)
    if known.key_error is not None:
        return _step(step, f"its key cannot be had: {known.key_error}", newest, key="none held")
    held = known.config
    if held is None and known.unjudged:
        return _step(step, "a validator has not answered yet, and there is no earlier one", newest)
    if held is None:
        return _step(step, "its key has not come from the SLM yet", newest, key="none held")
    if known.unjudged:
        said = f"revision {known.revision} waits for a validator, this one is used meanwhile"
    elif known.pending is not None:
        said = f"revision {known.revision} waits for its key, this one is used meanwhile"
    elif known.refused_config is not None:
        said = f"revision {known.revision} is refused ({known.refused}), the last good one is used"
    elif known.refused is not None:
        said = f"it will fail ({known.refused}), and there is no earlier one to use"
    elif cache.liveness.expired(held.age):
        said = "it is too old to be used"
    elif held.stale:
        said = "the last that is known; the SLM may have a newer one"
    else:
        said = "the SLM's present config"
    return _step(step, said, held, key=_key_of(held, known))


def _key_of(held: ResolvedConfig, known: KnownAgent) -> str:
    if held.llm_api_key is None:
        return "no key"
    came = _CAME.get(known.key_from, "from the SLM")
    return f"set at revision {held.api_key_revision}, came {came}"


def _step(
    step: Step, said: str, config: ResolvedConfig | None = None, *, key: str | None = None
) -> ExplainedStep:
    said = storable(said)
    if config is None:
        return ExplainedStep(step=step.value, said=said)
    return ExplainedStep(
        step=step.value,
        said=said,
        agent_id=config.source_agent_id and storable(config.source_agent_id),
        llm_provider=storable(config.llm_provider),
        # A query may contain secrets.
        llm_endpoint=config.llm_endpoint and storable(config.llm_endpoint.partition("?")[0]),
        llm_model=storable(config.llm_model),
        revision=config.revision,
        age_seconds=round(config.age, 3),
        stale=config.stale,
        key=key,
    )
