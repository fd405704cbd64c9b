"""The command tree of `slm`, and the only place that turns errors into a line and an exit code.

Knows every command group and nothing about what they do.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated, Final

import typer
from typer.exceptions import TyperException

from slm.cli import output
from slm.cli.commands import (
    agents,
    ask,
    audit,
    certs,
    db,
    explain,
    fleet,
    history,
    keys,
    serve,
    tokens,
    watch,
)
from slm.cli.demo import tour as demo
from slm.errors import SLMError

EXIT_FAILURE: Final = 1
EXIT_INTERRUPTED: Final = 130

_SERVER: Final = "The server"
_AGENTS: Final = "The agents, through a running server"
_SECURITY: Final = "Tokens, encryption keys and the audit, through a running server"
_EPILOG: Final = """
[bold]A first try[/]

  slm demo                                   a tour with a real language model, under a minute
  slm serve                                  a server, its data in ./slm-data
  slm agents list                            in another terminal, in the same directory
  slm agents set default --temperature 0.2   change one
  slm watch                                  changes as they happen

[bold]Which server:[/] --url, SLM_URL, or the one whose data directory (./slm-data) is here.
[bold]Which token:[/] --token-file, SLM_TOKEN, SLM_TOKEN_FILE, or that directory's admin.token.

[bold]Exit codes:[/] 0 success; 1 failure, explained on stderr; 2 invalid usage; 130 Ctrl-C.
"""

app = typer.Typer(
    name="slm",
    help="Live LLM configuration: change an agent's model once, its next request uses it.",
    epilog=_EPILOG.strip(),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve", rich_help_panel=_SERVER)(serve.serve)
app.add_typer(db.app, name="db", rich_help_panel=_SERVER)
app.add_typer(certs.app, name="certs", rich_help_panel=_SERVER)
app.command("demo", rich_help_panel=_SERVER)(demo.demo)
app.add_typer(agents.app, name="agents", rich_help_panel=_AGENTS)
app.command("ask", rich_help_panel=_AGENTS)(ask.ask)
app.command("fleet", rich_help_panel=_AGENTS)(fleet.fleet)
app.command("explain", rich_help_panel=_AGENTS)(explain.explain)
app.command("changes", rich_help_panel=_AGENTS)(history.changes)
app.command("watch", rich_help_panel=_AGENTS)(watch.watch)
app.add_typer(tokens.app, name="tokens", rich_help_panel=_SECURITY)
app.add_typer(keys.app, name="keys", rich_help_panel=_SECURITY)
app.add_typer(audit.app, name="audit", rich_help_panel=_SECURITY)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"slm {version('autobot-slm')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Live LLM configuration: change an agent's model once, its next request uses it."""


def run() -> int:
    """Run the command that sys.argv names and return the process's exit code."""
    output.take_any_text()
    try:
        # Set the name, because `python -m slm` would show a different one in usage lines.
        code = app(prog_name="slm", standalone_mode=False)
    except TyperException as problem:
        if problem.format_message():  # without a message, the help was shown instead
            output.error(_usage(problem))
        return problem.exit_code
    except typer.Abort:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SLMError as problem:
        output.error(str(problem))
        return EXIT_FAILURE
    except Exception as problem:
        if os.environ.get("SLM_TRACEBACK"):
            raise
        # Not its text: a library's exception may contain the values it was given.
        output.error(f"unexpected {type(problem).__name__}; SLM_TRACEBACK=1 shows where it is from")
        return EXIT_FAILURE
    return int(code or 0)


def _usage(problem: TyperException) -> str:
    """Return the sentence for a usage error, and where to find help.

    An unexpected argument is not repeated: it may be an API key in the wrong place.
    """
    text = problem.format_message()
    if text.startswith("Got unexpected extra argument"):
        text = "one argument too many; it is not shown, for it may be a secret"
    context = getattr(problem, "ctx", None)
    where = f" (see: {context.command_path} --help)" if context is not None else ""
    return f"{text.replace('Value error, ', '').rstrip('.')}{where}"
