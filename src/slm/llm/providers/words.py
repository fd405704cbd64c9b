"""The text of a provider's error, whatever its form: an object, a list, text or HTML.

Knows no status and none of our errors.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_WORDS: Final = 2048
# Where providers put the reason, the most informative first.
_REASONS: Final = (
    *("message", "msg", "detail", "details", "error_message", "error_msg", "error_description"),
    *("reason", "raw", "title", "description", "error", "errors", "fault", "faultstring"),
    *("cause", "innererror", "status_msg", "base_resp"),
)
_INSTEAD: Final = (*_REASONS, "base_resp", "success")
_CODES: Final = (
    "code",
    "type",
    "status",
    "error_type",
    "error_code",
    "errorCode",
    "reason",
    "__type",
)
_TAG: Final = re.compile(r"(?is)<(script|style|head|title)\b.*?</\1\s*>|<[^>]*>")
_TITLE: Final = re.compile(r"(?is)<title[^>]*>(.*?)</title")


@dataclass(frozen=True, slots=True)
class Words:
    """The content of an error.

    Attributes:
        text: the reason, for people.
        codes: the values of `code`, `type` and `status`, in lower case.
        parameters: the request fields that it blames.
        wait_seconds: how long to wait before retrying, if the text says so.
    """

    text: str
    codes: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    wait_seconds: float | None = None


def error_in_answer(value: Any, members: frozenset[str]) -> bool:
    """Whether a response, or an event of a stream, is an error instead.

    Args:
        value: its JSON.
        members: fields that a response has and an error does not.
    """
    if isinstance(value, list):
        return any(error_in_answer(each, members) for each in value[:3])
    if not isinstance(value, dict):
        return False
    if calls_itself_error(value):
        return True
    return not members & value.keys() and any(value.get(name) for name in _INSTEAD)


def calls_itself_error(value: Any) -> bool:
    """Whether a value explicitly says that it is an error."""
    if isinstance(value, list):
        return any(calls_itself_error(each) for each in value[:3])
    if not isinstance(value, dict):
        return False
    if value.get("error") or value.get("type") == "error" or value.get("object") == "error":
        return True
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return isinstance(first, dict) and bool(first.get("error"))


def words_of(body: Any, *, dumped: bool = True) -> Words:
    """Return the content of an error, whatever its form: an object, a list, text or HTML.

    Args:
        body: its JSON, or its text.
        dumped: whether to quote JSON that gives no reason as it is.
    """
    if isinstance(body, str):
        parsed = _parsed(body)
        if parsed is None:
            return Words(_plain(body))
        body = parsed
    texts: list[str] = []
    codes: list[str] = []
    parameters: list[str] = []
    wait = None
    for place, each in _walk(body):
        if isinstance(each, Mapping):
            # AWS prefixes a namespace: com.amazon.coral.service#ThrottlingException.
            given = [str(each[name]) for name in _CODES if _is_code(each.get(name))]
            codes += [code.rpartition("#")[2].lower() for code in given]
            parameters += _parameters(each)
            wait = _delay(each.get("retryDelay")) if wait is None else wait
        elif isinstance(each, str) and place in _REASONS:
            text = _plain(each)
            if text and not any(text in other for other in texts):
                texts.append(text)
    text = "; ".join(texts)[:MAX_WORDS]
    if not text and dumped and body not in (None, {}, []):
        text = _plain(body if isinstance(body, str) else _dumped(body))
    return Words(text, tuple(codes[:20]), tuple(parameters[:20]), wait)


def _walk(body: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values that may explain the error, best first; visits only a few places."""
    pending: list[tuple[str, Any, int]] = [("message", body, 0)]
    seen = 0
    while pending and seen < 60:
        name, value, depth = pending.pop(0)
        seen += 1
        if isinstance(value, str) and value[:1] in ("{", "[") and depth < 5:
            # A gateway passes on the error of the provider behind it, as text.
            value = _parsed(value) or value
        yield name, value
        if depth >= 6:
            continue
        if isinstance(value, Mapping):
            below = [(key, value[key]) for key in _REASONS if key in value]
            below += [
                (key, value[key])
                for key in ("metadata", "body", "response", "choices")
                if key in value
            ]
            pending += [(key, each, depth + 1) for key, each in below]
        elif isinstance(value, list):
            pending += [(name, each, depth + 1) for each in value[:10]]


def _is_code(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and len(str(value)) < 80


def _parameters(error: Mapping[str, Any]) -> list[str]:
    named = [error.get("param"), error.get("parameter")]
    place = error.get("loc")
    if isinstance(place, list) and place:
        # FastAPI has ["body", "seed"], or ["body", "messages", 1, "assistant", "reasoning"].
        named.append(".".join(str(part) for part in place[place[0] == "body" :][:8]))
    return [each for each in named if isinstance(each, str) and len(each) < 80]


def _delay(text: Any) -> float | None:
    return number(text[:-1]) if isinstance(text, str) and text.endswith("s") else None


def _parsed(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list | str) else None


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)[:MAX_WORDS]
    except (ValueError, RecursionError, TypeError):
        return ""


def _plain(text: str) -> str:
    """Return the text without markup, since proxies and portals answer in HTML."""
    text = text[: 4 * MAX_WORDS].strip()
    if text[:1] == "<" or "<html" in text[:500].lower():
        title = _TITLE.search(text)
        body = html.unescape(_TAG.sub(" ", text))
        head = html.unescape(title[1]) if title else ""
        text = " ".join(f"{head} {body}".split())
    return text[:MAX_WORDS]


def number(text: str | None) -> float | None:
    """Return a number written as text, or None if it is not one."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(number) else number
