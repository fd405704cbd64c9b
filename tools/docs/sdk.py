"""The page of the SDK's public names, from their signatures and docstrings."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import slm
import slm.llm
import slm.testing
from slm.errors import SLMError

GROUPS: Final[Mapping[str, tuple[Any, tuple[str, ...]]]] = {
    "client": (
        slm,
        (
            *("SLMClient", "BlockingSLMClient", "lifespan", "ResolvedConfig", "Step"),
            *("ClientStatus", "Timings", "AgentConfigCache", "SecretText"),
        ),
    ),
    "llm": (
        slm.llm,
        (
            *("LLMInterface", "LLMStream", "ChatResult", "ToolCall", "Usage", "StreamChunk"),
            *("ToolCallDelta", "Overrides", "RetrySettings", "TransportSettings"),
        ),
    ),
    "testing": (slm.testing, ("FakeSLMClient",)),
}
"""The names of each part of the page, and the module that has them; errors are a part by itself."""

SHOWN: Final[Mapping[str, tuple[str, ...]]] = {
    "AgentConfigCache": ("get", "set", "update", "remove"),
    "BlockingSLMClient": (),
    "ResolvedConfig": ("age", "stale", "as_dict"),
}
"""Of these classes only some members: the others are not for users, or say nothing new."""

NOT_MADE_BY_USERS: Final = ("SecretText", "Overrides", "LLMStream")
"""Their signature would tell nobody anything."""

_SECTION: Final = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example|Examples):$")
_PROTOCOL: Final = re.compile(r"docs/protocol\.md(?: section)?(?: \d+)?")
_ITEM: Final = re.compile(r"^(\*{0,2}\w+): (.*)$")


def parts() -> dict[str, str]:
    """Return the text of each part of the page."""
    described = {
        group: "\n\n".join(_name(getattr(module, name)) for name in names)
        for group, (module, names) in GROUPS.items()
    }
    return described | {"errors": _errors()}


def errors() -> list[type[SLMError]]:
    """Return the public errors, each after the one that it is a kind of."""
    public = [getattr(slm, name) for name in slm.__all__]
    kinds = [each for each in public if isinstance(each, type) and issubclass(each, SLMError)]
    return sorted(kinds, key=lambda each: [base.__name__ for base in reversed(each.__mro__)])


def _errors() -> str:
    rows = [
        f"| `{each.__name__}` | `{each.code}` | `{each.__base__.__name__}` |"
        f" {_summary(each).removesuffix('.')} |"
        for each in errors()
        if each.__base__ is not None
    ]
    head = ["| error | `code` | is a | raised when |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _summary(obj: Any) -> str:
    return (inspect.getdoc(obj) or "").partition("\n\n")[0].replace("\n", " ")


def _name(obj: Any) -> str:
    title = f"### {obj.__name__}"
    if isinstance(obj, enum.EnumType):
        members: Any = obj.__members__
        values = ", ".join(f"`{member}`" for member in members.values())
        return "\n\n".join([title, *_docstring(obj), f"Its values are {values}."])
    if not isinstance(obj, type):
        return "\n\n".join([title, _code(_signature(obj)), *_docstring(obj)])
    shown = [title]
    if obj.__name__ not in NOT_MADE_BY_USERS:
        shown.append(_code(_signature(obj)))
    shown += _docstring(obj)
    of_users = dict(_members(obj))
    for name, member in of_users.items():
        if name.removesuffix("_now") in of_users and name.endswith("_now"):
            continue  # shown with the coroutine that it is another form of
        forms = [
            _member(each, of_users[each]) for each in (name, f"{name}_now") if each in of_users
        ]
        shown += [f"#### {obj.__name__}.{name}", _code("\n".join(forms)), *_docstring(member)]
    return "\n\n".join(shown)


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield what a class itself defines for its users: its methods and properties."""
    wanted = SHOWN.get(cls.__name__)
    for each in cls.__mro__[:-1]:
        if each.__module__.partition(".")[0] != "slm" or (each is not cls and _is_public(each)):
            continue
        for name, member in vars(each).items():
            inherited = each is cls and _same_as_base(cls, name)
            if name.startswith("_") or inherited or (wanted is not None and name not in wanted):
                continue
            if inspect.isfunction(member) or isinstance(member, property):
                yield name, member


def _is_public(cls: type) -> bool:
    return any(cls.__name__ in names for _, names in GROUPS.values())


def _same_as_base(cls: type, name: str) -> bool:
    """Say whether a public base has this method, too: the base's part of the page describes it."""
    return any(_is_public(base) and hasattr(base, name) for base in cls.__mro__[1:])


def _member(name: str, member: Any) -> str:
    if isinstance(member, property):
        annotation = inspect.signature(member.fget).return_annotation  # type: ignore[arg-type]
        return f"{name}: {annotation}"
    return _signature(member)


def _signature(obj: Any) -> str:
    """Return the code that shows how something is called, on one line where it fits."""
    signature = inspect.signature(obj)
    shown: list[str] = []
    keyword_only = False
    for param in signature.parameters.values():
        if param.name == "self" or param.name.startswith("_"):
            continue
        if param.kind is param.VAR_POSITIONAL:
            keyword_only = True
        elif param.kind is param.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        shown.append(_parameter(param))
    ends = f" -> {signature.return_annotation}" if not isinstance(obj, type) else ""
    name = f"{'async ' if inspect.iscoroutinefunction(obj) else ''}{obj.__name__}"
    line = f"{name}({', '.join(shown)}){ends}"
    if len(line) <= 88:
        return line
    return "\n".join([f"{name}(", *(f"    {each}," for each in shown), f"){ends}"])


def _parameter(param: inspect.Parameter) -> str:
    text = str(param).partition(":")[0].partition("=")[0].strip()  # with its stars
    if param.annotation is not param.empty:
        text += f": {param.annotation}"
    if param.default is param.empty:
        return text
    value = repr(param.default)
    return f"{text} = {'...' if '<' in value else value}"


def _code(text: str) -> str:
    return f"<!-- fragment -->\n```python\n{text}\n```"


def _docstring(obj: Any) -> list[str]:
    """Return a docstring of Google's form as paragraphs of Markdown."""
    made: list[str] = []
    section = ""
    for block in re.split(r"\n\n+", inspect.getdoc(obj) or ""):
        head, _, rest = block.partition("\n")
        if (found := _SECTION.match(head)) is not None:
            section = found[1]
            block = inspect.cleandoc(rest)
        elif not block.startswith(" "):
            section = ""
        made.append(_block(section, inspect.cleandoc(block)))
    return made


def _block(section: str, text: str) -> str:
    if section.startswith("Example"):
        return f"<!-- fragment -->\n```pycon\n{text}\n```"
    if section in ("Args", "Attributes", "Raises"):
        items: list[str] = []
        for line in text.splitlines():
            found = _ITEM.match(line)
            if found is not None:
                items.append(f"- `{found[1]}`: {_linked(found[2])}")
            else:
                items[-1] += f" {line.strip()}"
        title = [] if section == "Args" else ["Raises:" if section == "Raises" else "Attributes:"]
        return "\n".join([*title, *([""] if title else []), *items])
    if section:
        return f"{section} {' '.join(text.split())}"
    return _linked(" ".join(text.split()))


def _linked(text: str) -> str:
    return _PROTOCOL.sub("[protocol](../protocol.md)", text)
