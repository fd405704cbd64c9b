"""The page of the command line, from the command tree of `slm` itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import typer

from slm.cli.app import app

SERVER_PANEL: Final = "Which server"
"""The panel of the options that most commands share; the page explains them once."""

_INDENTED: Final = re.compile(r"^(?: {2}.*\n?)+", re.MULTILINE)


def parts() -> dict[str, str]:
    """Return the page's parts: what commands there are, the shared options, and each command."""
    found = dict(commands())
    shared = {
        param.opts[0]: param
        for command in found.values()
        for param in command.params
        if getattr(param, "rich_help_panel", None) == SERVER_PANEL
    }
    return {
        "list": _list(found),
        "server-options": _table(list(shared.values())),
        "commands": "\n\n".join(_command(path, command, shared) for path, command in found.items()),
    }


def commands() -> Iterator[tuple[str, Any]]:
    """Yield each command by what is typed for it, in the order of `slm --help`."""
    yield from _below("slm", typer.main.get_command(app))


def options(command: Any) -> list[str]:
    """Return every spelling of every option of a command."""
    return [
        spelling
        for param in command.params
        if param.param_type_name == "option" and not param.hidden
        for spelling in (*param.opts, *param.secondary_opts)
    ]


def _below(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from _below(f"{path} {name}", inner)


def _list(found: dict[str, Any]) -> str:
    rows = [
        f"| [`{path}`](#{path.replace(' ', '-')}) | {_prose(command.help).partition(chr(10))[0]} |"
        for path, command in found.items()
    ]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def _command(path: str, command: Any, shared: dict[str, Any]) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    named = [
        param for param in command.params if param.param_type_name == "option" and not param.hidden
    ]
    usage = " ".join([path, "[OPTIONS]", *(_argument(param) for param in arguments)])
    lines = [f"## {path}", f"`{usage}`", _help(command.help)]
    server = [param for param in named if param.opts[0] in shared and _panel(param) == SERVER_PANEL]
    all_of_them = len(server) == len(shared)
    own = [param for param in named if not (all_of_them and param in server)]
    if arguments or own:
        lines.append(_table([*arguments, *own]))
    if all_of_them:
        lines.append("And the [options that name the server](#which-server-and-as-whom).")
    return "\n\n".join(lines)


def _panel(param: Any) -> str | None:
    return getattr(param, "rich_help_panel", None)


def _argument(param: Any) -> str:
    name = (param.metavar or param.name.upper()).strip("[].") + ("..." if param.nargs == -1 else "")
    return name if param.required else f"[{name}]"


def _table(params: list[Any]) -> str:
    rows = [f"| {_spelling(param)} | {_text(param)} |" for param in params]
    return "\n".join(["| option | what it does |", "|---|---|", *rows])


def _spelling(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{_argument(param)}`".replace("|", "\\|")
    value = "" if getattr(param, "is_flag", False) else f" {_value(param)}"
    return ", ".join(f"`{each}{value}`" for each in (*param.opts, *param.secondary_opts))


def _value(param: Any) -> str:
    if param.metavar:
        return str(param.metavar)
    choices = getattr(param.type_descriptor.annotation, "__args__", None)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "{" + ",".join(choices) + "}"
    return str(param.name).upper()


def _text(param: Any) -> str:
    """Return an option's help, with its variable and its default at the end."""
    text, _, bracket = (param.help or "").replace("\\[", "[").partition("[env var: ")
    notes = [f"Variable: {_names(bracket.rstrip(']'))}."] if bracket else []
    if param.envvar and not bracket:
        notes.append(f"Variable: `{param.envvar}`.")
    if param.default not in (None, False, (), []) and "default:" not in bracket:
        notes.append(f"Default: `{param.default}`.")
    return " ".join([_escaped(_plain(text.strip())), *notes])


def _names(text: str) -> str:
    return re.sub(r"SLM_[A-Z_]+", r"`\g<0>`", text).replace("; default:", ". Default:")


def _plain(text: str) -> str:
    return re.sub(r"\[bold\](.*?)\[/\]", r"\1", text)


def _escaped(text: str) -> str:
    return re.sub(r"([*<|])", r"\\\1", text)


def _prose(text: str) -> str:
    """Return a help text's paragraphs without its examples, each on one line."""
    text = _INDENTED.sub("", text)
    text = re.sub(r"^\[bold\]Examples?\[/\]\s*$", "", text, flags=re.MULTILINE)
    paragraphs = [" ".join(each.split()) for each in re.split(r"\n\s*\n", text.strip())]
    bold = [re.sub(r"\[bold\](.*?)\[/\]", r"**\1**", _escaped(each)) for each in paragraphs]
    return "\n\n".join(bold)


def _help(text: str) -> str:
    """Return a help text as Markdown; its indented lines are examples."""
    examples = [line[2:] for found in _INDENTED.findall(text) for line in found.splitlines()]
    if not examples:
        return _prose(text)
    return "\n".join([_prose(text), "", "<!-- fragment -->", "```sh", *examples, "```"])
