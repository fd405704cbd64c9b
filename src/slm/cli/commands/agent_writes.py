"""`slm agents create|set|delete|rollback`: all commands that change an agent and can `--wait`.

The options are defined in `agent_options`; `wait` asks who has applied the change.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any, Final

import typer

from slm.cli import output
from slm.cli import wait as receipts
from slm.cli.agent_options import (
    Active,
    AgentId,
    Clearable,
    Comment,
    Default,
    Description,
    Endpoint,
    IfMatch,
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
    note_shadowed,
    read_key,
    sent,
    temperature_sent,
)
from slm.cli.api_client import Api, ApiAnswer, agent_path, call, parsed
from slm.cli.commands import history
from slm.cli.output import Json, escape
from slm.cli.target import Target, at_a_server
from slm.cli.wait import Wait, WaitLimit
from slm.errors import PreconditionFailed, SLMUnavailable
from slm.schemas import Agent

_RETRIES_ON_CONFLICT: Final = 5


@at_a_server
def create(
    target: Target,
    agent: AgentId,
    provider: Annotated[
        Provider,
        typer.Option(
            "--provider",
            help="The provider, or whose protocol the endpoint speaks.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option("--model", help="The model's name at the provider.", show_default=False),
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
) -> None:
    """Create an agent. Options that are left out take their defaults.

    [bold]Example[/]
      slm agents create classifier --provider openai --model gpt-6-luna --api-key
    """
    body = sent(
        name=name or agent,
        comment=comment,
        description=description,
        llm_provider=provider,
        llm_endpoint=endpoint,
        llm_model=model,
        llm_max_tokens=max_tokens,
        llm_timeout=timeout,
        llm_options=merged({}, option) if option else None,
        is_active=active,
        is_default=default or None,
        llm_api_key=read_key(target, prompt=api_key, file=api_key_file, stdin=api_key_stdin),
    )
    body |= {"agent_id": agent} | temperature_sent("llm_temperature", temperature)
    answer = call(target, "POST", "/api/agents", body=body)
    note_shadowed(body.get("llm_options", {}))
    revision = _revision_of(answer)
    if not as_json:
        said = f"[bold]{escape(agent)}[/] created at revision {revision}"
        # A token without the scope config:read gets no more than this.
        if "llm_model" in answer.data:
            made = parsed(Agent, answer)
            said += f": {escape(made.llm_provider)}/{escape(made.llm_model)}, {key_state(made)}"
        output.out().print(said)
    receipts.finish(target, revision, wait, wait_limit, answer.data if as_json else None)


@at_a_server
def set_agent(
    target: Target,
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
            help="Clear a field: description, endpoint, temperature, max-tokens or api-key."
            " Repeatable.",
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
) -> None:
    """Change an agent. Fields that are not named keep their values.

    A stored API key is bound to the provider and its address: changing either without giving a
    key clears it, and the command says so.

    [bold]Examples[/]
      slm agents set code-assistant --model gpt-6.1-sol --temperature 0.2
      slm agents set code-assistant --model gpt-6.1-sol --comment "cheaper" --wait
      slm agents set code-assistant --provider anthropic --model claude-sonnet-5-5 --api-key
      slm agents set code-assistant --option top_p=0.9 --clear max-tokens
    """
    body = sent(
        name=name,
        description=description,
        llm_provider=provider,
        llm_endpoint=endpoint,
        llm_model=model,
        llm_max_tokens=max_tokens,
        llm_timeout=timeout,
        is_active=active,
        is_default=default or None,
    )
    body |= temperature_sent("llm_temperature", temperature)
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
    given = merged({}, option or [])  # report errors before sending any request
    if not body and not option:
        raise output.UsageError("nothing to set; name at least one field")
    body |= sent(comment=comment)
    old, answer = asyncio.run(_update(target, agent, body, option, if_match))
    note_shadowed(given)
    new = parsed(Agent, answer)
    changed = _changes(old, new)
    if not as_json and changed:
        output.out().print(
            f"[bold]{escape(agent)}[/] is at revision [bold]{new.revision}[/] (was {old.revision})"
        )
        output.pairs(
            {f"  {history.label(field)}": history.arrow(*both) for field, both in changed.items()}
        )
    elif not as_json:
        output.out().print(
            f"[bold]{escape(agent)}[/] was so already; it stays at revision {new.revision}"
        )
    told = answer.data | {"changed": changed, "api_key_cleared": _warned_of_cleared_key(answer)}
    receipts.finish(target, new.revision, wait, wait_limit, told if as_json else None)


@at_a_server
def delete(
    target: Target,
    agent: AgentId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    if_match: IfMatch = None,
    comment: Comment = None,
    wait: Wait = False,
    wait_limit: WaitLimit = None,
    as_json: Json = False,
) -> None:
    """Delete an agent; from then on its callers get the default agent."""
    if not yes:
        if not sys.stdin.isatty():
            raise output.UsageError("there is no terminal to ask at; add --yes to delete")
        typer.confirm(f"Delete {agent}?", abort=True, err=True)
    params = sent(comment=comment)
    answer = call(target, "DELETE", agent_path(agent), params=params, if_match=if_match)
    if not as_json:
        output.out().print(f"[bold]{escape(agent)}[/] deleted at revision {answer.revision}")
    told = {"agent_id": agent, "deleted": True, "revision": answer.revision}
    receipts.finish(target, answer.revision, wait, wait_limit, told if as_json else None)


@at_a_server
def rollback(
    target: Target,
    agent: AgentId,
    to: Annotated[
        int | None,
        typer.Option(
            "--to",
            metavar="REVISION",
            help="As it was then; without it, before its last change.",
            show_default=False,
        ),
    ] = None,
    comment: Comment = None,
    if_match: IfMatch = None,
    wait: Wait = False,
    wait_limit: WaitLimit = None,
    as_json: Json = False,
) -> None:
    """Restore an earlier revision of an agent as a new change, without its API key.

    [bold]Example[/]
      slm agents rollback code-assistant --to 41 --wait
    """
    path, body = f"{agent_path(agent)}/rollback", sent(to=to, comment=comment)
    answer = call(target, "POST", path, body=body, if_match=if_match)
    revision = _revision_of(answer)
    if not as_json:
        output.out().print(
            f"[bold]{escape(agent)}[/] is as it was at revision {answer.data['restored_revision']},"
            f" by revision [bold]{revision}[/]"
        )
    _warned_of_cleared_key(answer)
    receipts.finish(target, revision, wait, wait_limit, answer.data if as_json else None)


def key_state(agent: Agent) -> str:
    """Return whether the agent has an API key and since when, as rich markup."""
    if not agent.has_api_key:
        return "no API key"
    return f"has an API key [dim](set at revision {agent.api_key_revision})[/]"


def _revision_of(answer: ApiAnswer) -> int:
    """Return the revision of the written agent."""
    revision = answer.data.get("revision")
    if not isinstance(revision, int):
        raise SLMUnavailable("the server's answer is not of the shape that was expected")
    return revision


def _warned_of_cleared_key(answer: ApiAnswer) -> bool:
    """Warn if a write cleared the stored key, and return whether it did."""
    cleared = bool(answer.data.get("api_key_cleared"))
    if cleared:
        output.warning(
            "the stored API key was cleared: a key is bound to its provider and address, and never"
            f" brought back; give one: slm agents set {answer.data['agent_id']} --api-key"
        )
    return cleared


async def _update(
    target: Target,
    agent_id: str,
    body: dict[str, Any],
    option: list[str] | None,
    if_match: int | None,
) -> tuple[Agent, ApiAnswer]:
    """Change the agent; return its previous state and the response.

    Always uses If-Match, so that "old → new" shows what this command did and options are merged
    into the current ones. If someone else was faster and the user gave no revision, tries once
    more.
    """
    async with Api(target) as api:
        for attempt in range(_RETRIES_ON_CONFLICT):
            old, version = await api.agent_and_version(agent_id)
            asked = dict(body)
            if option:
                asked["llm_options"] = merged(old.llm_options, option)
            expected = version if if_match is None else if_match
            try:
                return old, await api.call(
                    "PUT", agent_path(agent_id), body=asked, if_match=expected
                )
            except PreconditionFailed:
                if if_match is not None or attempt == _RETRIES_ON_CONFLICT - 1:
                    raise
    raise AssertionError("unreachable")


def _changes(old: Agent, new: Agent) -> dict[str, list[Any]]:
    """Return the differences as `{"llm_model": [old, new]}`; for the key, what happened to it."""
    if old.revision == new.revision:
        return {}
    changed = history.differences(old, new)
    if changed.pop("api_key_revision", None):
        was = "set" if old.has_api_key else None
        became = ("replaced" if old.has_api_key else "set") if new.has_api_key else "cleared"
        changed["llm_api_key"] = [was, became]
    return changed
