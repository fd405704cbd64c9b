"""Errors of the client itself: no usable response from the SLM, or no agent or key."""

from __future__ import annotations

from slm.errors.root import SLMError


class ProtocolError(SLMError):
    """A message is not JSON or violates the protocol; never includes the message."""

    code = "protocol"


class UnclearAnswer(ProtocolError):
    """An answer to a question violates the protocol.

    Attributes:
        question: the id of the question, if the answer names one.
    """

    code = "unclear-answer"

    def __init__(self, message: str, question: str | None) -> None:
        super().__init__(message)
        self.question = question


class NotJSON(ProtocolError):
    """A message is not JSON at all, which ends a stream with 1007 rather than an `error`."""

    code = "not-json"


class SLMUnavailable(SLMError):
    """The SLM did not answer, or not in a usable way; the cache is still served."""

    code = "slm-unavailable"


class TLSError(SLMUnavailable):
    """The SLM's certificate is expired, untrusted or for another host; nothing was sent."""

    code = "tls-error"


class AgentKeyUnavailable(SLMError):
    """The agent needs an API key that is unavailable now, and there is no complete config to use.

    Raised instead of using the default agent's config (docs/protocol.md section 6).

    Attributes:
        agent_id: the agent with the missing key.
    """

    code = "agent-key-unavailable"

    def __init__(self, agent_id: str, reason: str) -> None:
        super().__init__(f"the API key of agent {agent_id!r} cannot be had: {reason}")
        self.agent_id = agent_id
        self.reason = reason


class AgentUnknown(SLMError):
    """A strict client was asked for an agent that does not exist on the SLM or is switched off.

    Attributes:
        agent_id: the requested agent.
        nearest: the agent with the most similar name, if there is one.
    """

    code = "agent-unknown"

    def __init__(self, agent_id: str, reason: str, nearest: str | None = None) -> None:
        super().__init__(reason)
        self.agent_id = agent_id
        self.nearest = nearest
