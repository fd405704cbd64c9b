"""`slm explain`: how a backend resolves an agent now, as reported by the backend itself.

Asks the server, which asks the backend; shows every step of the chain and never a key.
"""

from __future__ import annotations

from typing import Annotated, Final

import typer

from slm.cli import output
from slm.cli.agent_options import AgentId
from slm.cli.api_client import call, parsed
from slm.cli.output import Json, escape
from slm.cli.target import Target, at_a_server
from slm.protocol import ExplainedStep, Explanation

_MAX_NAMED: Final = 5


@at_a_server
def explain(
    target: Target,
    agent: AgentId,
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="BACKEND",
            help="A connected backend, as slm fleet names it, or how its name begins.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Ask a backend which configuration it uses for an agent, and why.

    [bold]Example[/]
      slm explain code-assistant --on billing
    """
    on = _whole_name(target, on)
    answer = call(target, "GET", "/api/explain", params={"agent_id": agent, "backend": on})
    if as_json:
        output.print_json(answer.data)
        return
    told = parsed(Explanation, answer)
    console = output.out()
    outcome = f"answered by [bold]{escape(told.answered_by or 'nothing')}[/]"
    if told.error is not None:
        outcome = f"[red]fails[/]: {escape(told.error)}"
    console.print(f"[bold]{escape(agent)}[/] on {escape(on)}: {outcome}", soft_wrap=True)
    console.print(
        f"[dim]the client is {escape(told.status)}, at revision {told.revision}[/]", soft_wrap=True
    )
    width = max((len(step.step) for step in told.steps), default=0)
    for step in told.steps:
        mark = "[green]→[/]" if step.answers else " "
        console.print(
            f"{mark} [bold]{escape(step.step):<{width}}[/]  {escape(step.said)}", soft_wrap=True
        )
        if step.llm_provider is not None:
            console.print(f"  {'':<{width}}  [dim]{escape(_config(step))}[/]", soft_wrap=True)


def _whole_name(target: Target, name: str) -> str:
    """Return the full name of the connected backend, given the full name or its beginning.

    The server accepts only the full name; otherwise its error lists the candidates.
    """
    backends = call(target, "GET", "/api/fleet").data["backends"]
    names = [each["backend"] for each in backends if each["state"] != "gone"]
    meant = [each for each in names if each.startswith(name)]
    if name in names or not meant:
        return name
    if len(meant) > 1:
        named = ", ".join(meant[:_MAX_NAMED])
        raise output.UsageError(f"{len(meant)} backends match: {escape(named)}")
    return str(meant[0])


def _config(step: ExplainedStep) -> str:
    """Return the step's config: model, endpoint, agent, age and key state."""
    told = f"{step.llm_provider}/{step.llm_model}"
    if step.llm_endpoint is not None:
        told += f" at {step.llm_endpoint}"
    if step.agent_id is not None:
        told += f" of agent {step.agent_id}"
    if step.revision is not None:
        told += f", revision {step.revision}, {step.age_seconds or 0:.0f} s old"
    if step.stale:
        told += ", stale"
    if step.key is not None:
        told += f", key {step.key}" if step.key.startswith("set ") else f", {step.key}"
    return told
