"""The child process with the real model, as the demo uses it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

from slm.cli.demo import local_model
from slm.cli.demo.local_model import LocalModel
from slm.errors import StartupError

pytestmark = pytest.mark.real_llm


@pytest.fixture(autouse=True)
def _installed() -> None:
    reason = local_model.missing()
    if reason is not None:
        pytest.skip(reason)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_it_answers_on_both_protocols_and_ends_when_told() -> None:
    """One child speaks OpenAI's and Anthropic's protocols, and stop() ends it."""
    body = {
        "model": "any",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "Say hello"}],
    }
    with LocalModel() as model:
        openai = post(f"{model.openai_url}/chat/completions", body)
        anthropic = post(f"{model.anthropic_url}/v1/messages", body)
        process = model._process
        assert process is not None
    assert openai["choices"][0]["message"]["content"]
    assert anthropic["content"][0]["text"]
    assert process.poll() == 0


def test_the_child_ends_when_its_parent_is_gone() -> None:
    """A child whose standard input closes ends by itself, and prints nothing but its address."""
    child = subprocess.Popen(
        [sys.executable, "-m", "slm.cli.demo.local_model"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = child.communicate("", timeout=60)
    assert child.returncode == 0
    assert list(json.loads(out)) == ["url"]
    assert err == ""


def test_a_child_that_is_too_slow_is_ended() -> None:
    """A model that does not load in time is an error that says so, and leaves no process."""
    model = LocalModel(start_timeout_seconds=0.01)
    with pytest.raises(StartupError, match="did not start"):
        model.start()
    assert model._process is None
