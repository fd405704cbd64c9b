"""How SLM reads values that people write into variables and small files; one rule for all.

Shells, editors, `.env` files and orchestrators each add something around a value: blanks, a line
break, a pair of quotes, a byte order mark. Knows no variable by name.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Mapping
from typing import Final

from slm.errors import ConfigurationError

# Editors and browsers add these; no terminal shows them.
_UNSEEN: Final = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"
_AROUND: Final = f"[\\s\x00{_UNSEEN}]+"
_BLANKS: Final = re.compile(rf"\A{_AROUND}|{_AROUND}\Z")
_QUOTES: Final = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019"}
# The longer mark first: that of UTF-32 starts with that of UTF-16.
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SERVICE_LINK: Final = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)
# What the kubelet also sets for each Service: its address, ports, and each port's parts.
_SERVICE_NAME: Final = re.compile(
    r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?)"
)
_FLAGS: Final = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def tidied(text: str) -> str:
    """Return the value without surrounding blanks, invisible characters or quotes.

    A pair of quotes is removed only if it encloses the whole value: in a command such as
    `"sh" -c "x"`, both ends are quotes but do not form a pair.
    """
    while True:
        text = _BLANKS.sub("", text)
        closing = _QUOTES.get(text[:1])
        inner = text[1:-1]
        if len(text) < 2 or closing is None or text[-1] != closing:
            return text
        if text[0] in inner or closing in inner:
            return text
        text = inner


def listed(text: str) -> list[str]:
    """Return the values of a comma-separated list, each tidied, without empty ones."""
    parts = (tidied(part) for part in tidied(text).split(","))
    return [part for part in parts if part]


def decoded(content: bytes) -> str:
    """Return a file's text, tidied; an initial byte order mark determines the encoding.

    Raises:
        UnicodeDecodeError: it is not text; the error contains the content.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return tidied(content.removeprefix(mark).decode(encoding))
    return tidied(content.decode())


def variable(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return a variable's value, tidied; None if it is unset or empty.

    Args:
        name: its name.
        environ: the environment; by default that of the process.
    """
    value = (os.environ if environ is None else environ).get(name)
    return (value and tidied(value)) or None


def flag(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Return whether a variable that may be 1 or 0 is set to 1.

    Raises:
        ConfigurationError: it is neither; the message does not repeat it.
    """
    value = variable(name, environ)
    if value is None:
        return False
    if (told := _FLAGS.get(value.lower())) is None:
        raise ConfigurationError(f"{name} must be 1 or 0")
    return told


def is_service_link(text: str) -> bool:
    """Return whether Kubernetes set this value for a Service, such as `tcp://10.0.0.7:80`.

    For a Service named `slm`, each pod in the namespace gets SLM_PORT=tcp://… automatically.
    """
    return _SERVICE_LINK.match(tidied(text)) is not None


def service_variables(prefix: str, environ: Mapping[str, str]) -> list[str]:
    """Return the sorted names of the variables that Kubernetes set for Services.

    Args:
        prefix: the start of their names, such as `SLM_`.
        environ: the environment.
    """
    return sorted(
        name
        for name, value in environ.items()
        if name.startswith(prefix)
        and (is_service_link(value) or _SERVICE_NAME.fullmatch(name.removeprefix(prefix)))
    )
