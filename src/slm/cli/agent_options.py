"""The command-line options that describe an agent, and how their values are parsed.

Knows no server. An API key comes from a file, standard input or a hidden prompt, never from an
argument, which every user on the machine could read in the process list.
"""

from __future__ import annotations

import enum
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from slm.cli.output import UsageError, note
from slm.cli.target import Target
from slm.common.environment import decoded, tidied
from slm.common.files import NotTrusted, read_given
from slm.errors import ConfigurationError

Provider = Literal["ollama", "openai", "anthropic"]

_NUMBERS: Final = frozenset(
    [
        *("temperature", "top_p", "top_k", "min_p", "seed", "n", "max_tokens", "num_ctx"),
        *("max_completion_tokens", "frequency_penalty", "presence_penalty", "repeat_penalty"),
        *("num_predict", "top_logprobs"),
    ]
)
"""Options that are numbers for every provider that has them."""

_SHADOWED: Final = {
    "temperature": "--temperature",
    "max_tokens": "--max-tokens",
    "max_completion_tokens": "--max-tokens",
    "num_predict": "--max-tokens",
}


class Clearable(enum.StrEnum):
    """What can be cleared, by its name on the command line."""

    DESCRIPTION = "description"
    ENDPOINT = "endpoint"
    TEMPERATURE = "temperature"
    MAX_TOKENS = "max-tokens"
    API_KEY = "api-key"


AgentId = Annotated[
    str, typer.Argument(metavar="AGENT", help="The agent's id.", show_default=False)
]
Name = Annotated[str | None, typer.Option("--name", help="A display name.", show_default=False)]
Description = Annotated[
    str | None, typer.Option("--description", help="A description.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="The model's name at the provider.", show_default=False),
]
ProviderOption = Annotated[
    Provider | None,
    typer.Option(
        "--provider",
        help="The provider, or whose protocol the endpoint speaks.",
        show_default=False,
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="The base URL; by default the provider's own.",
        show_default=False,
    ),
]
Temperature = Annotated[
    str | None,
    typer.Option(
        "--temperature",
        metavar="NUMBER",
        help="0 to 2, or none to send no temperature.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", metavar="N", help="The most tokens to generate.", show_default=False
    ),
]
Timeout = Annotated[
    int | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="Time limit of a call; of a stream, until its first token and between tokens.",
        show_default=False,
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=JSON",
        help="One of the provider's own options, such as top_p=0.9; NAME= removes it. Repeatable.",
        show_default=False,
    ),
]
Active = Annotated[
    bool | None,
    typer.Option(
        "--active/--inactive",
        help="Callers of an inactive agent get the default agent.",
        show_default=False,
    ),
]
Default = Annotated[bool, typer.Option("--default", help="Make it the default agent.")]
Comment = Annotated[
    str | None,
    typer.Option(
        "--comment", metavar="TEXT", help="The reason, for the history.", show_default=False
    ),
]
IfMatch = Annotated[
    int | None,
    typer.Option(
        "--if-match",
        metavar="REVISION",
        help="Only if the agent is still at this revision; else fail.",
        show_default=False,
    ),
]
KeyPrompt = Annotated[
    bool,
    typer.Option(
        "--api-key", help="Prompt for the API key, without echo.", rich_help_panel="API key"
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="Read the API key from a file.",
        rich_help_panel="API key",
        show_default=False,
    ),
]
KeyStdin = Annotated[
    bool,
    typer.Option(
        "--api-key-stdin",
        help="Read the API key from standard input, such as a password manager's.",
        rich_help_panel="API key",
    ),
]


def sent(**fields: Any) -> dict[str, Any]:
    """Return the given fields; fields left out of a write stay unchanged."""
    return {name: value for name, value in fields.items() if value is not None}


def temperature_sent(field: str, text: str | None) -> dict[str, float | None]:
    """Return the temperature as given: a number, null for `none`, or nothing if not given."""
    if text is None:
        return {}
    if text.strip().lower() == "none":
        return {field: None}
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError("--temperature is a number from 0 to 2, or none")
    return {field: number}


def merged(options: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply each NAME=JSON to the options; other text is a string, and NAME= removes one."""
    result = dict(options)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise UsageError("--option takes NAME=JSON, such as top_p=0.9")
        if not text:
            result.pop(name, None)
            continue
        try:
            result[name] = json.loads(text)
        except ValueError:
            if name in _NUMBERS:
                raise UsageError(f"--option {name} must be a number") from None
            result[name] = text
    return result


def note_shadowed(options: Mapping[str, Any]) -> None:
    """Print which of the provider's options take precedence over a field of the agent."""
    for name in _SHADOWED.keys() & options.keys():
        note(f"the option {name} takes precedence over {_SHADOWED[name]} in every request")


def read_key(target: Target, *, prompt: bool, file: Path | None, stdin: bool) -> str | None:
    """Return the API key from where the user said it is, or None.

    Raises:
        ConfigurationError: it cannot be read, or would be sent unencrypted.
    """
    if prompt + stdin + (file is not None) > 1:
        raise UsageError("--api-key, --api-key-file and --api-key-stdin exclude each other")
    if not (prompt or stdin or file is not None):
        return None
    if not target.is_private:
        raise ConfigurationError(
            f"an API key is not sent to {target.url} without TLS; use https:// or a tunnel, or set"
            " SLM_ALLOW_INSECURE=1 where something else encrypts, such as a mesh"
        )
    if file is not None:
        try:
            key = decoded(read_given(file))
        except NotTrusted as error:
            raise ConfigurationError(f"the API key file cannot be used: {error}") from None
        except (OSError, UnicodeDecodeError):
            raise ConfigurationError(f"the API key file {file} cannot be read") from None
    elif stdin:
        try:
            key = decoded(sys.stdin.buffer.read())
        except UnicodeDecodeError:
            raise ConfigurationError("the API key on standard input is not text") from None
    elif not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask at; use --api-key-stdin")
    else:
        key = tidied(str(typer.prompt("API key", hide_input=True, err=True)))
    if not key:
        raise ConfigurationError("the API key is empty; to remove it: --clear api-key")
    return key
