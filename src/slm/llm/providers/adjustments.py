"""Parameters that a model refuses, learnt once: omitted, or sent under another name.

Knows no provider and no transport, and does not depend on host names.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from slm.llm.providers.failures import Refused

_log = logging.getLogger("slm.llm")

MAX_MODELS: Final = 1024
"""How many pairs of origin and model are remembered; the oldest is dropped first."""

_SAMPLING: Final = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "frequency_penalty"),
    *("presence_penalty", "repetition_penalty", "repeat_penalty", "logit_bias"),
)
# None of these changes what the response may be used for. Parameters that do, such as tools,
# response_format, stop or a provider's own safety settings, are never omitted.
DROPPABLE: Final = frozenset(
    [
        *_SAMPLING,
        *("stream_options", "parallel_tool_calls", "logprobs", "top_logprobs", "reasoning_effort"),
        *("reasoning_format", "include_reasoning", "verbosity", "service_tier", "store", "user"),
        *("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
        *("prediction", "think", "thinking_budget", "enable_thinking", "chat_template_kwargs"),
    ]
)
REASONING: Final = "reasoning of earlier turns"
"""Not a parameter, but something that some servers refuse in messages; see `Adjustments.learn`."""

_REFUSAL: Final = re.compile(
    r"unsupport|not (currently )?support|n't support|deprecat|not permitted|not allowed|forbidden"
    r"|extra[ _](inputs|fields|forbidden)|additional propert|un(known|recogni[sz]ed|expected)"
    r"|cannot (both )?(be|find)|not (available|accepted|compatible|implemented)"
    r"|only (the default|one of|\d|supports?|if)|may only|must be (unset|omitted)|no longer"
    r"|does not (accept|take|have|exist|allow)|doesn't (accept|take|allow)"
    r"|invalid (param|arg|field)"
    r"|use ['\"`]?\w+['\"`]? instead|(is|be) removed|is incompatible"
)
_TOGETHER: Final = re.compile(r"\bboth\b|together|only one|at the same time|alongside")
FORMER_DEFAULT_TEMPERATURE: Final = 0.7
"""The default before a temperature could be null, so it may not be anyone's choice."""


class Adjustments:
    """What each model at each origin refuses, for one provider; bounded, and per process.

    Args:
        renamed: this protocol's parameters with another name, and that name.
    """

    def __init__(self, renamed: Mapping[str, str] | None = None) -> None:
        self._renamed = renamed or {}
        self._known: OrderedDict[tuple[str, str], dict[str, str | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def applied(self, place: str, model: str, body: dict[str, Any]) -> tuple[str, ...]:
        """Omit or rename what is known to be refused in `body`, and return what was changed.

        Args:
            place: the origin.
            model: the model requested there.
            body: the request's body; modified.
        """
        known = self._known.get((place, model))
        if not known:
            return ()
        done = []
        for name, other in known.items():
            if name not in body:
                continue
            value = body.pop(name)
            if other is None:
                done.append(f"{name} dropped")
            else:
                body.setdefault(other, value)
                done.append(f"{name} sent as {other}")
        return tuple(done)

    def refuses(self, place: str, model: str, name: str) -> bool:
        """Whether this is known to be refused there."""
        return name in self._known.get((place, model), ())

    def learn(
        self,
        place: str,
        model: str,
        body: Mapping[str, Any],
        error: Refused,
        *,
        earlier: Iterable[str] = (),
    ) -> bool:
        """Remember what an error names as unsupported, if the request can do without it.

        Args:
            place: the origin.
            model: the model requested there.
            body: what was sent.
            error: the resulting error.
            earlier: the provider-specific fields in earlier turns.

        Returns:
            Whether the request is worth sending again.
        """
        if error.status not in (400, 422):
            return False
        known = self._known.get((place, model), {})
        # Already known if another call learnt it while this one was in progress.
        news = {
            name: other
            for name, other in self._refused(body, error, earlier)
            if other is None or other not in known
        }
        if not news:
            return False
        self._known[place, model] = known | news
        self._known.move_to_end((place, model))
        if len(self._known) > MAX_MODELS:
            self._known.popitem(last=False)
        for name, other in news.items():
            if name in known:
                continue
            what = "is left out from now on" if other is None else f"is sent as {other} from now on"
            _log.warning("%r at %s refuses %s: it %s", model[:128], place, name, what)
        return True

    def _refused(
        self, body: Mapping[str, Any], error: Refused, earlier: Iterable[str]
    ) -> Iterable[tuple[str, str | None]]:
        """Yield what the error refuses, with the name to send it by instead, if any."""
        text = error.words.text.lower()
        codes = " ".join(error.words.codes).replace("_", " ")
        if not _REFUSAL.search(f"{text} {codes}"):
            return
        named = [
            name
            for name in body
            if (name in DROPPABLE or name in self._renamed)
            and _names(name, text, error.words.parameters)
        ]
        if {"temperature", "top_p"} <= set(named) and _TOGETHER.search(text):
            # Of two mutually exclusive ones, keep the one that someone chose.
            chosen = body["temperature"] != FORMER_DEFAULT_TEMPERATURE
            named.remove("temperature" if chosen else "top_p")
        for name in named:
            if name in DROPPABLE:
                yield name, None
            elif self._renamed[name] not in body:
                yield name, self._renamed[name]
        said = f"{text} {' '.join(error.words.parameters)}"
        # `messages.1.reasoning_content` is not a parameter, but it is what is wrong.
        if not named and any(re.search(rf"\b{re.escape(name)}\b", said) for name in earlier):
            yield REASONING, None


def _names(name: str, text: str, parameters: tuple[str, ...]) -> bool:
    if name in parameters:
        return True
    # A word like `user` or `seed` occurs in many sentences; in quotes, it is the parameter.
    if name == "temperature" or "_" in name:
        return re.search(rf"(?<![\w.-]){name}(?![\w-])", text) is not None
    return re.search(rf"['\"`]{name}['\"`]", text) is not None
