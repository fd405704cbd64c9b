"""Selects the real language model for the demo: an Ollama on this machine, or the local model.

Both support OpenAI's and Anthropic's protocols, so the demo can switch between them. Knows nothing
about agents.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import aiohttp

from slm.cli.demo.local_model import MODEL_NAME, LocalModel, missing

OLLAMA_URL: Final = "http://127.0.0.1:11434"
_PROBE_SECONDS: Final = 2.0


@dataclass(frozen=True)
class RealModel:
    """A language model that answers.

    Attributes:
        what: a description for people.
        name: the `llm_model` to request.
        openai_url: its `llm_endpoint` for provider `openai`.
        anthropic_url: its `llm_endpoint` for provider `anthropic`.
    """

    what: str
    name: str
    openai_url: str
    anthropic_url: str


@contextlib.asynccontextmanager
async def real_model() -> AsyncIterator[RealModel]:
    """Find a model or start one, for the duration of the block.

    Raises:
        StartupError: no Ollama is running, and the local model is not installed.
    """
    found = await find_ollama()
    if found is not None:
        yield found
        return
    local = LocalModel()
    try:
        await asyncio.to_thread(local.start)
        yield RealModel(
            f"{MODEL_NAME} on llama.cpp, a child process",
            MODEL_NAME,
            local.openai_url,
            local.anthropic_url,
        )
    finally:
        # Not in a thread: Ctrl-C cancels what is awaited here, and the child must end.
        local.stop()


async def is_at_hand() -> bool:
    """Return whether `real_model` would find one, without starting it."""
    return missing() is None or await find_ollama() is not None


async def find_ollama() -> RealModel | None:
    """Return the smallest model of an Ollama that also supports Anthropic's protocol, or None."""
    timeout = aiohttp.ClientTimeout(total=_PROBE_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as http:
            async with http.get(f"{OLLAMA_URL}/api/tags") as answer:
                models = (await answer.json())["models"] if answer.status == 200 else []
            # An older Ollama has no /v1/messages; a newer one rejects this body as incomplete.
            async with http.post(f"{OLLAMA_URL}/v1/messages", json={}) as answer:
                speaks_anthropic = answer.status not in (404, 405)
        talking = [m for m in models if "embed" not in m["name"]]
        if not talking or not speaks_anthropic:
            return None
        name = str(min(talking, key=lambda m: m["size"])["name"])
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError):
        return None
    return RealModel(f"{name} on Ollama", name, f"{OLLAMA_URL}/v1", OLLAMA_URL)
