"""`slm ask`: one request through the LLM interface, exactly as a backend makes it.

The answer goes to stdout as it arrives; the configuration used, and why, to stderr.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
import time
from typing import Annotated, Any

import typer

from slm import LLMInterface, SLMClient
from slm.cli import output
from slm.cli.agent_options import sent, temperature_sent
from slm.cli.target import BACKEND_FILE, Target, at_a_server
from slm.client.config import ResolvedConfig, Step


@functools.partial(at_a_server, own_token=BACKEND_FILE)
def ask(
    target: Target,
    agent: Annotated[
        str, typer.Argument(metavar="AGENT", help="The agent's id.", show_default=False)
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The question; - or nothing reads standard input."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message.", show_default=False)
    ] = None,
    temperature: Annotated[
        str | None,
        typer.Option(
            "--temperature",
            metavar="NUMBER",
            help="For this request alone: 0 to 2, or none to send no temperature.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="For this request alone.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end.")
    ] = False,
) -> None:
    """Ask an agent's model a question, with the agent's current configuration.

    It does what a backend does: the config comes from the SLM (or the next step of the chain), the
    request goes straight to the provider. It also says which config answered, and why that one.
    It needs a token that may read keys (key:read), as backend.token does and admin.token does not.

    [bold]Example[/]
      slm ask code-assistant "What does functools.partial do?"
    """
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            output.note("reading the prompt from the terminal; end it with Ctrl-D")
        prompt = sys.stdin.read()
    if not (prompt or "").strip():
        raise output.UsageError("the prompt is empty")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    overrides = sent(max_tokens=max_tokens) | temperature_sent("temperature", temperature)
    asyncio.run(_ask(target, agent, messages, overrides, as_json=as_json))


async def _ask(
    target: Target,
    agent_id: str,
    messages: list[dict[str, Any]],
    overrides: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    # What the SDK would log for an operator is shown to the user below.
    logging.getLogger("slm").addHandler(logging.NullHandler())
    client = SLMClient(
        target.url,
        token=target.token.get_secret_value(),
        ca_file=target.ca_file,
        client_cert=target.client_cert,
        name="slm ask",
    )
    async with client, LLMInterface(client) as llm:
        config = await client.resolve(agent_id)
        if config.revision is None:
            reason = client.last_error or client.status.value
            output.warning(
                f"the SLM at {target.url} gave no config: {reason}; going on without it, as a "
                "backend does"
            )
        output.note(_why(config))
        started = time.monotonic()
        stream = llm.stream(agent_id, messages, **overrides)
        async for chunk in stream:
            if not as_json:
                sys.stdout.write(output.printable(chunk.text))
                sys.stdout.flush()
        elapsed = time.monotonic() - started
    result = stream.result
    if as_json:
        output.print_json(
            {
                "agent_id": agent_id,
                "text": result.text,
                "provider": result.provider,
                "model": result.model,
                "step": result.step,
                "revision": result.revision,
                "stale": config.stale,
                "finish_reason": result.finish_reason,
                "input_tokens": result.usage and result.usage.input_tokens,
                "output_tokens": result.usage and result.usage.output_tokens,
                "seconds": round(elapsed, 3),
            }
        )
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    told = [f"{elapsed:.2f} s", f"finished: {result.finish_reason}"]
    if result.usage is not None:
        told.append(f"{result.usage.input_tokens} + {result.usage.output_tokens} tokens")
    if result.revision != config.revision:
        told.append(f"made by revision {result.revision}, which came meanwhile")
    output.note(", ".join(told))


def _why(config: ResolvedConfig) -> str:
    """Return one line: the agent of the config, its content, and why it was used."""
    source = config.source_agent_id or ""
    reason = {
        Step.AGENT: "its own config",
        Step.DEFAULT: f"not there or inactive, so the default agent {source}",
        Step.ENVIRONMENT: "the SLM knows no answer, so AUTOBOT_LLM_* of the environment",
        Step.HARDCODED: "the SLM knows no answer and the environment is empty, so the built-in",
    }[config.step]
    at = "" if config.revision is None else f", revision {config.revision}"
    stale = f", stale for {config.age:.0f} s" if config.stale else ""
    return (
        f"{config.agent_id}: {config.llm_provider}/{config.llm_model} "
        f"({reason}; step {config.step.value}{at}{stale})"
    )
