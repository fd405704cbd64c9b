"""`slm watch`: prints every change of an agent's configuration as it is pushed, one per line.

Uses the WebSocket of docs/protocol.md section 4 and resumes with `since` when the connection
breaks, so nothing is missed. Frames carry no keys, so none can be shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated, Any, Final

import aiohttp
import typer

from slm.cli import output
from slm.cli.api_client import Api, parsed, unreachable
from slm.cli.output import escape
from slm.cli.target import Target, at_a_server
from slm.errors import ProtocolError, SLMUnavailable
from slm.protocol import (
    Ack,
    AgentChanged,
    AgentDeleted,
    ClientInfo,
    Heartbeat,
    Resync,
    ServerMessage,
    Subscribe,
    Subscribed,
    encode,
    parse_server_message,
)
from slm.schemas import AgentConfig, AgentList

_RETRY_SECONDS: Final = 1.0
_SILENT_HEARTBEATS: Final = 2
_KINDS: Final = {
    "agent_config_changed": "changed",
    "agent_created": "[green]created[/]",
    "agent_deleted": "[red]deleted[/]",
}


@at_a_server
def watch(
    target: Target,
    agent: Annotated[
        list[str] | None,
        typer.Argument(metavar="AGENT...", help="Only these agents.", show_default=False),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count", metavar="N", min=1, help="End after N changes.", show_default=False
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, for a script.")
    ] = False,
) -> None:
    """Show changes as they happen, with old and new values, until Ctrl-C.

    A broken connection resumes where it ended, so no change is missed.

    [bold]Example[/]
      slm watch --json | jq -r 'select(.type == "agent_deleted") | .agent_id'
    """
    with contextlib.suppress(_Enough):
        asyncio.run(_Watcher(target, set(agent or ()), count, as_json=as_json).run())


class _Enough(Exception):
    """The requested number of changes was shown."""


class _Watcher:
    """What is known about the agents, so that a change can be shown as old → new."""

    def __init__(self, target: Target, only: set[str], count: int | None, *, as_json: bool) -> None:
        self._target = target
        self._only = only
        self._left = count
        self._as_json = as_json
        self._known: dict[str, AgentConfig] = {}
        self._revision = 0
        self._acked = -1
        self._epoch = ""
        self._client = ClientInfo(
            name="slm watch",
            instance=secrets.token_hex(3),
            version=version("autobot-slm"),
            host=socket.gethostname()[:255],
            pid=os.getpid(),
        )

    async def run(self) -> None:
        """Watch forever; only the first connection may fail.

        Raises:
            SLMError: there is no server, or it rejects us.
        """
        async with Api(self._target) as api:
            await self._load(api)
            output.note(f"watching {self._target.url} from revision {self._revision}; Ctrl-C ends")
            while True:
                try:
                    await self._stream(api)
                    reason = "the server closed the connection"
                except SLMUnavailable as error:
                    reason = str(error)
                output.note(f"{reason}; trying again from revision {self._revision}")
                await asyncio.sleep(_RETRY_SECONDS)

    async def _load(self, api: Api) -> None:
        listed = parsed(AgentList, await api.call("GET", "/api/agents"))
        self._known = {agent.agent_id: agent for agent in listed.agents}
        self._revision, self._epoch = listed.revision, listed.epoch

    async def _stream(self, api: Api) -> None:
        """Follow one connection until it ends.

        Raises:
            SLMUnavailable: it broke or went silent.
        """
        try:
            async with api.session.ws_connect(f"{self._target.url}/ws", heartbeat=20) as ws:
                await ws.send_str(
                    encode(
                        Subscribe(
                            subscribe="agent_config",
                            since=self._revision,
                            epoch=self._epoch,
                            client=self._client,
                        )
                    )
                )
                silence: float | None = 10.0
                while True:
                    frame = await ws.receive(timeout=silence)
                    if frame.type is not aiohttp.WSMsgType.TEXT:
                        return
                    message = parse_server_message(frame.data)
                    if isinstance(message, Subscribed):
                        silence = message.heartbeat * _SILENT_HEARTBEATS
                        self._acked = -1
                    await self._take(api, message)
                    # So that no one mistakes a watcher for a hanging backend.
                    if self._acked != self._revision:
                        self._acked = self._revision
                        await ws.send_str(encode(Ack(ack=self._revision)))
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                # The REST API explains why; a revoked token ends the watch.
                await api.call("GET", "/api/agents", params={"limit": 1})
            raise SLMUnavailable(f"the stream was refused with HTTP {error.status}") from None
        except ProtocolError as error:
            raise SLMUnavailable(str(error)) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unreachable(self._target, error) from None

    async def _take(self, api: Api, message: ServerMessage | None) -> None:
        if isinstance(message, AgentChanged | AgentDeleted):
            if message.revision <= self._revision:
                return
            self._show(message)
            self._revision = message.revision
        elif isinstance(message, Heartbeat):
            # The heartbeat for a change that this token may not see.
            self._revision = max(self._revision, message.revision)
        elif isinstance(message, Resync):
            output.note(
                f"some changes up to revision {message.revision} cannot be shown one by one "
                f"({message.reason})"
            )
            await self._load(api)

    def _show(self, message: AgentChanged | AgentDeleted) -> None:
        agent_id = message.agent_id
        new = message.config if isinstance(message, AgentChanged) else None
        old = self._known.pop(agent_id, None)
        if new is not None:
            self._known[agent_id] = new
        if self._only and agent_id not in self._only:
            return
        changed = _differences(old, new)
        if self._as_json:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            frame = message.model_dump(mode="json")
            output.print_json({"time": now} | frame | {"changed": changed}, lines=True)
        else:
            output.out().print(_line(message, new, changed), soft_wrap=True)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise _Enough


def _differences(old: AgentConfig | None, new: AgentConfig | None) -> dict[str, list[Any]]:
    """Return the differences as `{"llm_model": [old, new]}`; empty if there is no pair."""
    if old is None or new is None:
        return {}
    return {
        field: [getattr(old, field), getattr(new, field)]
        for field in AgentConfig.model_fields
        if getattr(old, field) != getattr(new, field)
    }


def _line(
    message: AgentChanged | AgentDeleted, new: AgentConfig | None, changed: dict[str, list[Any]]
) -> str:
    now = datetime.now().strftime("%H:%M:%S")
    start = (
        f"[dim]{now}[/]  {message.revision:>5}  {_KINDS[message.type]}  "
        f"[bold]{escape(message.agent_id)}[/]"
    )
    if new is None:
        return start
    if message.type == "agent_created":
        return f"{start}  {escape(new.llm_provider)}/{escape(new.llm_model)}"
    told = []
    for field, (was, now_is) in changed.items():
        label = field.removeprefix("llm_").removeprefix("is_").replace("_", " ")
        if field == "api_key_revision":
            told.append("API key cleared" if now_is is None else "API key set")
        elif field != "has_api_key":
            told.append(f"{label} {output.shown(was)} → [bold]{output.shown(now_is)}[/]")
    return f"{start}  {', '.join(told) or '[dim]name or description[/]'}"
