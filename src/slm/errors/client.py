"""What the client raises by itself: no usable answer from the SLM, or no agent or key to serve."""

from __future__ import annotations

from slm.errors.root import SLMError


class ProtocolError(SLMError):
    """A message that is not JSON or not of the contract's shape; never holds the message."""

    code = "protocol"


class UnclearAnswer(ProtocolError):
    """An answer to a question that is not of the contract's shape.

    Attributes:
        question: the id of the question, where the answer names one.
    """

    code = "unclear-answer"

    def __init__(self, message: str, question: str | None) -> None:
        super().__init__(message)
        self.question = question


class NotJSON(ProtocolError):
    """A message that is no JSON at all, which ends a stream with 1007 rather than an `error`."""

    code = "not-json"


class SLMUnavailable(SLMError):
    """The SLM did not answer, or not in a way that can be used; the cache goes on serving."""

    code = "slm-unavailable"


class TLSError(SLMUnavailable):
    """The SLM's certificate is expired, untrusted or another host's; nothing was sent."""

    code = "tls-error"


class AgentKeyUnavailable(SLMError):
    """The agent needs an API key that cannot be had now, and nothing whole is there to serve.

    Raised rather than going on with the default agent's config (docs/protocol.md section 6).

    Attributes:
        agent_id: the agent whose key is missing.
    """

    code = "agent-key-unavailable"

    def __init__(self, agent_id: str, reason: str) -> None:
        super().__init__(f"the API key of agent {agent_id!r} cannot be had: {reason}")
        self.agent_id = agent_id
        self.reason = reason


class AgentUnknown(SLMError):
    """A strict client was asked for an agent that the SLM does not have, or that is switched off.

    Attributes:
        agent_id: the agent that was asked for.
        nearest: the agent whose name is most like it, if there is one.
    """

    code = "agent-unknown"

    def __init__(self, agent_id: str, reason: str, nearest: str | None = None) -> None:
        super().__init__(reason)
        self.agent_id = agent_id
        self.nearest = nearest
