"""`slm agents`: its command group; the commands that only list and show agents are here.

Uses the REST API through `api_client`; everything that changes an agent is in `agent_writes`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import typer

from slm.cli import output
from slm.cli.agent_options import ProviderOption, sent
from slm.cli.api_client import Api, call, parsed
from slm.cli.commands import agent_writes as writes
from slm.cli.commands import fleet, history
from slm.cli.output import Json, escape
from slm.cli.target import Target, at_a_server
from slm.endpoints import effective_endpoint
from slm.schemas import Agent, AgentList

app = typer.Typer(
    help="List, show, create, change and delete agents.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
_HISTORY: Final = "Its history"
_KEYS: Final = "Its API key"


@app.command("list")
@at_a_server
def list_agents(
    target: Target,
    search: Annotated[
        str | None, typer.Option("--search", help="A part of id, name or description.")
    ] = None,
    provider: ProviderOption = None,
    active: Annotated[
        bool | None, typer.Option("--active/--inactive", help="Only those.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the agents.

    [bold]Example[/]
      slm agents list --provider openai --json | jq -r '.agents[].agent_id'
    """
    wanted = None if active is None else str(active).lower()
    params = sent(search=search, provider=provider, is_active=wanted)
    answer = call(target, "GET", "/api/agents", params=params)
    if as_json:
        output.print_json(answer.data)
        return
    listed = parsed(AgentList, answer)
    output.table(
        ["AGENT", "PROVIDER", "MODEL", "ENDPOINT", "TEMP", "MAX", "KEY", "", "REV"],
        [_row(agent) for agent in listed.agents],
        right=["TEMP", "MAX", "REV"],
    )
    agents = "agent" if len(listed.agents) == 1 else "agents"
    output.note(f"{len(listed.agents)} {agents}, revision {listed.revision}, {target.url}")


@app.command()
@at_a_server
def show(
    target: Target,
    agent: Annotated[
        str | None, typer.Argument(metavar="AGENT", help="The agent's id.", show_default=False)
    ] = None,
    default: Annotated[
        bool, typer.Option("--default", help="Whichever agent is the default now.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show one agent with all its fields; its API key is never shown, only whether it has one."""
    if (agent is None) != default:
        raise output.UsageError("name an agent, or say --default")
    found = asyncio.run(_show(target, agent))
    if as_json:
        output.print_json(found.model_dump(mode="json"))
        return
    values = {"agent": f"[bold]{escape(found.agent_id)}[/]", "state": _state(found)}
    values |= {
        label: output.shown(getattr(found, field))
        for field, label in history.FIELDS.items()
        if not field.startswith("is_")
    }
    if found.llm_endpoint is None:
        own = effective_endpoint(found.llm_provider, None)
        values["endpoint"] = f"{output.shown(own)} [dim](the provider's own)[/]"
    values["timeout"] += " s"
    values["api key"] = writes.key_state(found)
    values["revision"] = str(found.revision)
    values["created"] = f"{found.created_at:%Y-%m-%d %H:%M:%S} UTC"
    values["updated"] = f"{found.updated_at:%Y-%m-%d %H:%M:%S} UTC"
    output.pairs(values)


app.command()(writes.create)
app.command("set")(writes.set_agent)
app.command()(writes.delete)
app.command("history", rich_help_panel=_HISTORY)(history.history)
app.command("diff", rich_help_panel=_HISTORY)(history.diff)
app.command("rollback", rich_help_panel=_HISTORY)(writes.rollback)
app.command("key-status", rich_help_panel=_KEYS)(fleet.key_status)


async def _show(target: Target, agent_id: str | None) -> Agent:
    async with Api(target) as api:
        if agent_id is not None:
            return await api.agent(agent_id)
        return parsed(Agent, await api.call("GET", "/api/agents/default"))


def _row(agent: Agent) -> list[str]:
    return [
        f"[bold]{escape(agent.agent_id)}[/]",
        escape(agent.llm_provider),
        escape(agent.llm_model),
        "[dim]own[/]" if agent.llm_endpoint is None else escape(agent.llm_endpoint),
        "–" if agent.llm_temperature is None else f"{agent.llm_temperature:g}",
        output.shown(agent.llm_max_tokens),
        "yes" if agent.has_api_key else "–",
        _state(agent, short=True),
        str(agent.revision),
    ]


def _state(agent: Agent, *, short: bool = False) -> str:
    if agent.is_default:
        return "[green]default[/]"
    if not agent.is_active:
        return "[yellow]inactive[/]"
    return "" if short else "active"
