"""docs/sdk.md: each of its examples runs as it stands, against a real server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from tests.documents.blocks import blocks
from tests.support.raw import Api
from tests.support.servers import InLoopServer

EXAMPLES = [block.text for block in blocks("docs/sdk.md", "python")]
PRINTED = [
    "openai m-billing agent 2\n",
    "m-billing False\n",
    "m-billing m-billing\n",
    "m-billing\n",
    "the SLM has no agent 'biling' that this token may see (did you mean 'billing'?) billing\n",
    "",
]


pytestmark = pytest.mark.documents


def test_the_page_has_the_examples_that_are_run() -> None:
    """An example that is added is run, too."""
    assert len(EXAMPLES) == len(PRINTED)


@pytest.mark.parametrize("number", range(len(PRINTED)))
async def test_an_example_of_the_sdks_page_runs(
    server: InLoopServer, admin: Api, number: int
) -> None:
    """With nothing but SLM_URL and SLM_TOKEN_FILE set, each prints what it should."""
    await admin.create("billing", llm_provider="openai", llm_model="m-billing")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLM_", "AUTOBOT_LLM_"))}
    token = str(server.data_dir / "backend.token")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        EXAMPLES[number],
        env=clean | {"SLM_URL": server.url, "SLM_TOKEN_FILE": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out.decode()) == (0, PRINTED[number]), err.decode()
