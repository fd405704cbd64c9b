"""`slm agents`: list, show, create, set and delete agents through a running server.

Knows the REST API by `http`, what can be said by `agent_options`, how it is shown by `output`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any, Final

import typer

from slm.cli import fleet, history, output, receipts
from slm.cli.agent_options import (
    Active,
    AgentId,
    Clearable,
    Comment,
    Default,
    Description,
    Endpoint,
    IfMatch,
    Json,
    KeyFile,
    KeyPrompt,
    KeyStdin,
    MaxTokens,
    Model,
    Name,
    Options,
    Provider,
    ProviderOption,
    Temperature,
    Timeout,
    merged,
    read_key,
    sent,
)
from slm.cli.connection import DEFAULT_DATA_DIR, CaFile, DataDir, Target, TokenFile, Url, find
from slm.cli.http import Answer, Api, agent_path, parsed
from slm.cli.output import escape
from slm.cli.receipts import Wait, WaitLimit
from slm.endpoints import effective_endpoint
from slm.errors import PreconditionFailed
from slm.schemas import Agent, AgentList

app = typer.Typer(
    help="The agents: list, show, create, set, delete.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
_HISTORY: Final = "Its history"
_KEYS: Final = "Its API key"

_FIELDS: Final = history.FIELDS | {"llm_api_key": "api key"}
"""What a write can change, and how a person calls it."""

_RETRIES_ON_CONFLICT: Final = 5


@app.command("list")
def list_agents(
    search: Annotated[
        str | None, typer.Option("--search", help="A part of id, name or description.")
    ] = None,
    provider: ProviderOption = None,
    active: Annotated[
        bool | None, typer.Option("--active/--inactive", help="Only those.", show_default=False)
    ] = None,
    as_json: Json = False,
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """List the agents.

    [bold]Example[/]
      slm agents list --provider openai --json | jq -r '.agents[].agent_id'
    """
    target = find(url, token_file, ca_file, data)
    params: dict[str, str | int] = {}
    if search is not None:
        params["search"] = search
    if provider is not None:
        params["provider"] = provider
    if active is not None:
        params["is_active"] = "true" if active else "false"
    answer = asyncio.run(_call(target, "GET", "/api/agents", params=params))
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
def show(
    agent: Annotated[
        str | None, typer.Argument(metavar="AGENT", help="The agent's id.", show_default=False)
    ] = None,
    default: Annotated[
        bool, typer.Option("--default", help="Whichever agent is the default now.")
    ] = False,
    as_json: Json = False,
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show one agent with all its fields; its API key is never shown, only whether it has one."""
    if (agent is None) != default:
        raise output.UsageError("name an agent, or say --default")
    target = find(url, token_file, ca_file, data)
    found = asyncio.run(_show(target, agent))
    if as_json:
        output.print_json(found.model_dump(mode="json"))
        return
    values = {"agent": f"[bold]{escape(found.agent_id)}[/]", "state": _state(found)}
    values |= {
        label: output.shown(getattr(found, field))
        for field, label in _FIELDS.items()
        if not field.startswith("is_") and field != "llm_api_key"
    }
    if found.llm_endpoint is None:
        own = effective_endpoint(found.llm_provider, None)
        values["endpoint"] = f"{output.shown(own)} [dim](the provider's own)[/]"
    values["timeout"] += " s"
    values["api key"] = _key_state(found)
    values["revision"] = str(found.revision)
    values["created"] = f"{found.created_at:%Y-%m-%d %H:%M:%S} UTC"
    values["updated"] = f"{found.updated_at:%Y-%m-%d %H:%M:%S} UTC"
    output.pairs(values)


@app.command()
def create(
    agent: AgentId,
    provider: Annotated[
        Provider, typer.Option("--provider", help="Whose protocol to speak.", show_default=False)
    ],
    model: Annotated[
        str,
        typer.Option("--model", help="The model, as the provider calls it.", show_default=False),
    ],
    name: Name = None,
    description: Description = None,
    endpoint: Endpoint = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    timeout: Timeout = None,
    option: Options = None,
    default: Default = False,
    active: Active = None,
    api_key: KeyPrompt = False,
    api_key_file: KeyFile = None,
    api_key_stdin: KeyStdin = False,
    comment: Comment = None,
    wait: Wait = False,
    wait_limit: WaitLimit = None,
    as_json: Json = False,
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Create an agent. What is not given takes its default: 0.7, 30 s, the provider's endpoint.

    [bold]Example[/]
      slm agents create classifier --provider openai --model gpt-4o-mini --api-key
    """
    seconds = receipts.limit_of(wait, wait_limit)
    target = find(url, token_file, ca_file, data)
    body = sent(
        name=name or agent,
        comment=comment,
        description=description,
        llm_provider=provider,
        llm_endpoint=endpoint,
        llm_model=model,
        llm_temperature=temperature,
        llm_max_tokens=max_tokens,
        llm_timeout=timeout,
        llm_options=merged({}, option) if option else None,
        is_active=active,
        is_default=default or None,
        llm_api_key=read_key(target, prompt=api_key, file=api_key_file, stdin=api_key_stdin),
    )
    answer = asyncio.run(_call(target, "POST", "/api/agents", body={"agent_id": agent} | body))
    made = parsed(Agent, answer)
    receipt = _receipt(target, made.revision, seconds)
    if as_json:
        output.print_json(answer.data | receipt)
    else:
        output.out().print(
            f"[bold]{escape(made.agent_id)}[/] created at revision {made.revision}: "
            f"{escape(made.llm_provider)}/{escape(made.llm_model)}, {_key_state(made)}"
        )
    _end(receipt, as_json)


@app.command("set")
def set_agent(
    agent: AgentId,
    name: Name = None,
    description: Description = None,
    provider: ProviderOption = None,
    model: Model = None,
    endpoint: Endpoint = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    timeout: Timeout = None,
    option: Options = None,
    clear: Annotated[
        list[Clearable] | None,
        typer.Option(
            "--clear",
            metavar="FIELD",
            help="Set to nothing: description, endpoint, max-tokens or api-key. Repeatable.",
            show_default=False,
        ),
    ] = None,
    default: Default = False,
    active: Active = None,
    api_key: KeyPrompt = False,
    api_key_file: KeyFile = None,
    api_key_stdin: KeyStdin = False,
    if_match: IfMatch = None,
    comment: Comment = None,
    wait: Wait = False,
    wait_limit: WaitLimit = None,
    as_json: Json = False,
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Change an agent; what is not named stays. Every backend's next request uses it.

    A stored API key is bound to the provider and its address: changing either without giving a
    key clears it, and the command says so.

    [bold]Examples[/]
      slm agents set code-assistant --model gpt-4o --temperature 0.2
      slm agents set code-assistant --model gpt-4o --comment "cheaper" --wait
      slm agents set code-assistant --provider anthropic --model claude-sonnet-4-5 --api-key
      slm agents set code-assistant --option top_p=0.9 --clear max-tokens
    """
    seconds = receipts.limit_of(wait, wait_limit)
    target = find(url, token_file, ca_file, data)
    body = sent(
        name=name,
        description=description,
        llm_provider=provider,
        llm_endpoint=endpoint,
        llm_model=model,
        llm_temperature=temperature,
        llm_max_tokens=max_tokens,
        llm_timeout=timeout,
        is_active=active,
        is_default=default or None,
    )
    for cleared in clear or []:
        field = cleared.replace("-", "_")
        field = field if cleared is Clearable.DESCRIPTION else f"llm_{field}"
        if field in body:
            raise output.UsageError(f"--clear {cleared} contradicts --{cleared}")
        body[field] = None
    key = read_key(target, prompt=api_key, file=api_key_file, stdin=api_key_stdin)
    if key is not None:
        if "llm_api_key" in body:
            raise output.UsageError("--clear api-key contradicts giving one")
        body["llm_api_key"] = key
    merged({}, option or [])  # what is wrong with them is said before anything is asked
    if not body and not option:
        raise output.UsageError("nothing to set; name at least one field")
    body |= sent(comment=comment)
    old, answer = asyncio.run(_update(target, agent, body, option, if_match))
    new = parsed(Agent, answer)
    changed = _changes(old, new)
    key_cleared = bool(answer.data.get("api_key_cleared"))
    receipt = _receipt(target, new.revision, seconds)
    if as_json:
        told = answer.data | {"changed": changed, "api_key_cleared": key_cleared}
        output.print_json(told | receipt)
    elif not changed:
        output.out().print(
            f"[bold]{escape(agent)}[/] was so already; it stays at revision {new.revision}"
        )
    else:
        output.out().print(
            f"[bold]{escape(agent)}[/] is at revision [bold]{new.revision}[/] (was {old.revision})"
        )
        output.pairs(
            {f"  {_FIELDS[field]}": history.arrow(*both) for field, both in changed.items()}
        )
    if key_cleared:
        output.warning(
            "the stored API key was cleared, since it was bound to the old provider and address; "
            f"give the new one's: slm agents set {agent} --api-key"
        )
    _end(receipt, as_json)


@app.command()
def delete(
    agent: AgentId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    if_match: IfMatch = None,
    comment: Comment = None,
    wait: Wait = False,
    wait_limit: WaitLimit = None,
    as_json: Json = False,
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Delete an agent; from then on its callers get the default agent."""
    seconds = receipts.limit_of(wait, wait_limit)
    target = find(url, token_file, ca_file, data)
    if not yes:
        if not sys.stdin.isatty():
            raise output.UsageError("there is no terminal to ask at; add --yes to delete")
        typer.confirm(f"Delete {agent}?", abort=True, err=True)
    answer = asyncio.run(
        _call(target, "DELETE", agent_path(agent), params=sent(comment=comment), if_match=if_match)
    )
    receipt = _receipt(target, answer.revision, seconds)
    if as_json:
        told = {"agent_id": agent, "deleted": True, "revision": answer.revision}
        output.print_json(told | receipt)
    else:
        output.out().print(f"[bold]{escape(agent)}[/] deleted at revision {answer.revision}")
    _end(receipt, as_json)


app.command("history", rich_help_panel=_HISTORY)(history.history)
app.command("diff", rich_help_panel=_HISTORY)(history.diff)
app.command("rollback", rich_help_panel=_HISTORY)(history.rollback)
app.command("key-status", rich_help_panel=_KEYS)(fleet.key_status)


def _receipt(target: Target, revision: int, seconds: float | None) -> dict[str, Any]:
    """Return `{"receipt": …}`, or nothing where nobody asked to wait."""
    if seconds is None:
        return {}
    return {"receipt": receipts.receipt_of(target, revision, seconds)}


def _end(told: dict[str, Any], as_json: bool) -> None:
    """Show the receipt where there is one; a backend without the change is a failure."""
    if not told:
        return
    if not as_json:
        receipts.show(told["receipt"])
    if not receipts.is_whole(told["receipt"]):
        raise typer.Exit(1)


async def _call(target: Target, method: str, path: str, **how: Any) -> Answer:
    async with Api(target) as api:
        return await api.call(method, path, **how)


async def _show(target: Target, agent_id: str | None) -> Agent:
    async with Api(target) as api:
        if agent_id is not None:
            return await api.agent(agent_id)
        return parsed(Agent, await api.call("GET", "/api/agents/default"))


async def _update(
    target: Target,
    agent_id: str,
    body: dict[str, Any],
    option: list[str] | None,
    if_match: int | None,
) -> tuple[Agent, Answer]:
    """Change the agent and return it as it was, and the answer.

    Always with If-Match, so that "old → new" tells what this command did and options merge into
    what is there. Where somebody else was quicker and the user named no revision: once more.
    """
    async with Api(target) as api:
        for attempt in range(_RETRIES_ON_CONFLICT):
            old = await api.agent(agent_id)
            asked = dict(body)
            if option:
                asked["llm_options"] = merged(old.llm_options, option)
            expected = old.revision if if_match is None else if_match
            try:
                return old, await api.call(
                    "PUT", agent_path(agent_id), body=asked, if_match=expected
                )
            except PreconditionFailed:
                if if_match is not None or attempt == _RETRIES_ON_CONFLICT - 1:
                    raise
    raise AssertionError("unreachable")


def _changes(old: Agent, new: Agent) -> dict[str, list[Any]]:
    """Return what differs, as `{"llm_model": [old, new]}`; of the key, what became of it."""
    if old.revision == new.revision:
        return {}
    changed = {
        field: [getattr(old, field), getattr(new, field)]
        for field in _FIELDS
        if field != "llm_api_key" and getattr(old, field) != getattr(new, field)
    }
    if old.api_key_revision != new.api_key_revision:
        was = "set" if old.has_api_key else None
        became = ("replaced" if old.has_api_key else "set") if new.has_api_key else "cleared"
        changed["llm_api_key"] = [was, became]
    return changed


def _row(agent: Agent) -> list[str]:
    return [
        f"[bold]{escape(agent.agent_id)}[/]",
        escape(agent.llm_provider),
        escape(agent.llm_model),
        "[dim]own[/]" if agent.llm_endpoint is None else escape(agent.llm_endpoint),
        f"{agent.llm_temperature:g}",
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


def _key_state(agent: Agent) -> str:
    if not agent.has_api_key:
        return "no API key"
    return f"has an API key [dim](set at revision {agent.api_key_revision})[/]"
