"""docs/reference/variables.md has every environment variable that is read, and no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from slm import LLMInterface, SLMClient
from slm.client.resolution.environment import PREFIX
from slm.server.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "variables.md").read_text()
ROWS = re.findall(r"^\| `([A-Z_]+)` \| (.*?) ?\|", PAGE, re.MULTILINE)
KUBERNETES = {"SLM_SERVICE_HOST", "SLM_SERVICE_PORT"}
"""Set by Kubernetes for a Service named `slm`, to be told apart from what a person set."""


def test_every_variable_of_the_server_is_in_the_page() -> None:
    """The tables under "The server" are those of its settings, each of them once."""
    _, _, server = PAGE.partition("\n## The server\n")
    told = re.findall(r"^\| `(\w+)` \|", server, re.MULTILINE)
    assert sorted(told) == sorted(f"SLM_{name.upper()}" for name in Settings.model_fields)


def test_every_variable_of_the_client_is_in_the_page() -> None:
    """What the code reads by name, and is no setting of the server, is in the first table."""
    sources = [
        path.read_text()
        for path in (ROOT / "src").rglob("*.py")
        if "server" not in path.relative_to(ROOT / "src").parts
    ]
    read = {name for text in sources for name in re.findall(r'"(SLM_[A-Z_]+)"', text)}
    client, _, _ = PAGE.partition("\n## The server\n")
    told = set(re.findall(r"^\| `(SLM_\w+)` \|", client, re.MULTILINE))
    server = {f"SLM_{name.upper()}" for name in Settings.model_fields}
    assert read - told <= server | KUBERNETES
    assert told <= read


def test_the_arguments_of_the_client_are_those_of_the_code() -> None:
    """An argument in the first table is one of SLMClient."""
    client, _, _ = PAGE.partition("### The environment step")
    named = set(re.findall(r"^\| `SLM_\w+` \| `(\w+)` \|", client, re.MULTILINE))
    assert len(named) >= 9
    assert named <= inspect.signature(SLMClient).parameters.keys()
    assert "transport" in inspect.signature(LLMInterface).parameters


def test_the_environment_step_is_in_the_page() -> None:
    """Each AUTOBOT_LLM_ variable that the chain's third step reads has its row."""
    from slm.client.resolution import environment

    told = {name for name, _ in ROWS if name.startswith(PREFIX)}
    assert told == {PREFIX + name for name in environment._NAMES}
