"""What a model refuses, learnt once: a parameter left out, or sent under its other name.

Knows no provider and no transport; host names decide nothing here.
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
"""How many pairs of origin and model are remembered; the oldest goes first."""

_SAMPLING: Final = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "frequency_penalty"),
    *("presence_penalty", "repetition_penalty", "repeat_penalty", "logit_bias"),
)
# None of these changes what the answer may be used for. What does, such as tools, response_format,
# stop or a provider's own safety settings, is never left out.
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
"""Not a parameter, but what some servers refuse in messages; see `Adjustments.learn`."""

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
"""What agents had before a temperature could be null; nobody need have chosen it."""


class Adjustments:
    """What each model at each origin refuses, for one provider; bounded, and of this process.

    Args:
        renamed: which parameters of this protocol have another name, and which.
    """

    def __init__(self, renamed: Mapping[str, str] | None = None) -> None:
        self._renamed = renamed or {}
        self._known: OrderedDict[tuple[str, str], dict[str, str | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def applied(self, place: str, model: str, body: dict[str, Any]) -> tuple[str, ...]:
        """Leave out or rename in `body` what is known to be refused, and say what.

        Args:
            place: the origin.
            model: what is asked there.
            body: the request's; changed.
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
            model: what was asked there.
            body: what was sent.
            error: what came back.
            earlier: the members that earlier turns held of their provider's own.

        Returns:
            Whether the request is worth sending again.
        """
        if error.status not in (400, 422):
            return False
        known = self._known.get((place, model), {})
        # Known already where another call learnt it while this one was under way.
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
        """Yield what the error refuses, and the name to send it by instead, if there is one."""
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
            # Of two that exclude each other the one that somebody chose is kept.
            chosen = body["temperature"] != FORMER_DEFAULT_TEMPERATURE
            named.remove("temperature" if chosen else "top_p")
        for name in named:
            if name in DROPPABLE:
                yield name, None
            elif self._renamed[name] not in body:
                yield name, self._renamed[name]
        said = f"{text} {' '.join(error.words.parameters)}"
        # `messages.1.reasoning_content` is no parameter, but what is wrong all the same.
        if not named and any(re.search(rf"\b{re.escape(name)}\b", said) for name in earlier):
            yield REASONING, None


def _names(name: str, text: str, parameters: tuple[str, ...]) -> bool:
    if name in parameters:
        return True
    # A word such as `user` or `seed` stands in many sentences; in quotes it is the parameter.
    if name == "temperature" or "_" in name:
        return re.search(rf"(?<![\w.-]){name}(?![\w-])", text) is not None
    return re.search(rf"['\"`]{name}['\"`]", text) is not None
