"""`slm keys`: the encryption keys, and the steps of rotating to another one.

Each step is a request that can be repeated; nothing is lost if one is interrupted. An encryption
key is never sent: the server creates it where it is stored, or it is created and shown here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from cryptography.fernet import Fernet

from slm.cli import output
from slm.cli.api_client import Api, call
from slm.cli.output import Json
from slm.cli.target import Target, at_a_server
from slm.errors import KeysNotReady

app = typer.Typer(
    help="List, add, rotate and prune encryption keys.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_PAGE = 200
_TIMEOUT_SECONDS = 120.0
_ADD_TO = {
    "environment": "append it to SLM_ENCRYPTION_KEYS of every server (after a comma), and restart"
    " them one by one",
    "command": "add it to what SLM_ENCRYPTION_KEY_COMMAND prints; the rotation makes every server"
    " run the command again",
}


@app.command("list")
@at_a_server
def list_keys(
    target: Target,
    as_json: Json = False,
) -> None:
    """Show the keys by their fingerprints, how many rows need each, and which server has which."""
    status = _call(target, "GET", "/api/admin/keys")
    if as_json:
        output.print_json(status)
        return
    _show(status)


@app.command()
@at_a_server
def add(
    target: Target,
    as_json: Json = False,
) -> None:
    """Add a key that the servers can decrypt with, and that encrypts nothing yet.

    With the keys in the data directory the server makes it there. With SLM_ENCRYPTION_KEYS or a
    command it is made here and printed, for you to put where they are. Then: slm keys rotate.
    """
    source = _call(target, "GET", "/api/admin/keys")["source"]
    if source == "file":
        made = _call(target, "POST", "/api/admin/keys")
        if as_json:
            output.print_json(made | {"source": source})
            return
        output.say(f"Added the key {made['fingerprint']} to the server's encryption.key.")
        output.note("It encrypts nothing yet; go on to it with: slm keys rotate")
        return
    key = Fernet.generate_key().decode()
    if as_json:
        output.print_json({"source": source, "key": key})
        return
    output.note(f"A new key is below: {_ADD_TO[source]}. Then: slm keys rotate")
    output.say(key)


@app.command()
@at_a_server
def rotate(
    target: Target,
    fingerprint: Annotated[
        str | None,
        typer.Argument(help="The key to switch to; the newest by default.", show_default=False),
    ] = None,
    wait: Annotated[
        float, typer.Option(help="How many seconds to wait until every server has the key.", min=0)
    ] = 20,
    as_json: Json = False,
) -> None:
    """Switch to another encryption key and re-encrypt every stored API key with it.

    It is refused while a live server does not have the key. The servers keep serving, and no
    revision changes. If it is interrupted, run it again.
    """
    with output.steps("re-encrypting") as on_step:
        done = asyncio.run(_rotate(target, fingerprint, wait, on_step))
    if as_json:
        output.print_json(done)
        return
    output.say(
        f"The active key is {done['fingerprint']}; {done['changed']} "
        f"{'row was' if done['changed'] == 1 else 'rows were'} re-encrypted."
    )
    _show(done["status"])
    if any(not k["is_active"] and k["retired_at"] is None for k in done["status"]["keys"]):
        output.note("Drop the old one with: slm keys prune")


@app.command()
@at_a_server
def prune(
    target: Target,
    as_json: Json = False,
) -> None:
    """Drop every key but the active one; refused while a row needs one of them.

    A backup from before the rotation still needs the old key: keep it as long as you keep those.
    """
    pruned = _call(target, "POST", "/api/admin/keys/prune")["fingerprints"]
    source = _call(target, "GET", "/api/admin/keys")["source"]
    if as_json:
        output.print_json({"fingerprints": pruned, "source": source})
        return
    if not pruned:
        output.say("There is only the active key.")
        return
    output.say(f"Pruned {', '.join(pruned)}.")
    if source != "file":
        output.note("Take it out of where the keys are kept, on every server.")


async def _rotate(
    target: Target, fingerprint: str | None, wait: float, on_step: Callable[[int, int], None]
) -> dict[str, Any]:
    async with Api(target, timeout_seconds=_TIMEOUT_SECONDS) as api:
        body = {} if fingerprint is None else {"fingerprint": fingerprint}
        name = await _activate(api, body, wait)
        before = (await api.call("GET", "/api/admin/keys")).data
        rows = sum(key["rows"] for key in before["keys"])
        last_id: int | None = 0
        changed = 0
        pages = 0
        while last_id is not None:
            step = await api.call(
                "POST",
                "/api/admin/keys/reencrypt",
                params={"after_id": last_id, "limit": _PAGE},
            )
            last_id, changed = step.data["last_id"], changed + step.data["changed"]
            pages += 1
            on_step(rows if last_id is None else min(rows, pages * _PAGE), rows)
        after = (await api.call("GET", "/api/admin/keys")).data
        return {"fingerprint": name, "changed": changed, "status": after}


async def _activate(api: Api, body: dict[str, str], wait: float) -> str:
    """Repeat until every server has the key; they look for it within seconds of being asked."""
    deadline = time.monotonic() + wait
    while True:
        try:
            answer = await api.call("POST", "/api/admin/keys/rotate", body=body)
        except KeysNotReady:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(1)
        else:
            name: str = answer.data["fingerprint"]
            return name


def _call(target: Target, method: str, path: str) -> dict[str, Any]:
    return call(target, method, path, timeout_seconds=_TIMEOUT_SECONDS).data


def _show(status: dict[str, Any]) -> None:
    live = [replica for replica in status["replicas"] if replica["live"]]
    output.table(
        ("KEY", "STATE", "ROWS", "SERVERS"),
        [
            (
                key["fingerprint"],
                _state(key),
                str(key["rows"]),
                f"{sum(key['fingerprint'] in r['fingerprints'] for r in live)} of {len(live)}",
            )
            for key in status["keys"]
        ],
        right=("ROWS",),
    )
    if status["unreadable"]:
        output.warning(f"{status['unreadable']} stored API keys cannot be read with any of them")


def _state(key: dict[str, Any]) -> str:
    if key["is_active"]:
        return "active"
    return "pruned" if key["retired_at"] is not None else "decrypts"
