"""docs/llm.md: its examples run, one after the other, against a stub of a provider."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import trustme

from slm import LLMInterface
from slm.testing import FakeSLMClient
from tests.documents.blocks import blocks
from tests.support.llm.stub import DONE, Answer, Request, chunk, stub, whole

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


def answered(request: Request) -> Answer:
    """Stream a greeting; ask for a tool once, then answer."""
    if request.streamed:
        return chunk({"content": "Hel"}) + chunk({"content": "lo"}, "stop") + DONE
    if any(message["role"] == "tool" for message in request.body["messages"]):
        return whole("It is in stock.")
    call = {"name": "look_up", "arguments": json.dumps({"item": "chair"})}
    return whole("", tool_calls=[{"id": "call-1", "type": "function", "function": call}])


async def test_the_examples_of_the_page_run(tmp_path: Path, capsys: Any) -> None:
    """A stream, a conversation with a tool, and an interface with settings of its own."""
    ca_file = tmp_path / "corp.pem"
    trustme.CA().cert_pem.write_to_path(str(ca_file))
    asked: list[tuple[str, dict[str, Any]]] = []

    async def run_tool(name: str, arguments: dict[str, Any]) -> str:
        asked.append((name, arguments))
        return "12 left"

    streamed, tool, settings = blocks("docs/llm.md", "python")
    async with stub(answered) as provider:
        fields = {
            "llm_provider": "openai",
            "llm_model": "m",
            "llm_endpoint": f"{provider.origin}/v1",
        }
        client = FakeSLMClient({"support": fields})
        async with LLMInterface(client) as llm:
            known: dict[str, Any] = {
                "client": client,
                "llm": llm,
                "messages": [{"role": "user", "content": "Is there a chair?"}],
                "tools": TOOLS,
                "run_tool": run_tool,
            }
            for example in (streamed, tool):
                body = f"async def example():\n{textwrap.indent(example.text, '    ')}"
                exec(compile(body, example.page, "exec"), known)  # the page's own code
                await known["example"]()
            assert capsys.readouterr().out == "Hello"
            assert asked == [("look_up", {"item": "chair"})]
            roles = [message["role"] for message in known["messages"]]
            assert roles == ["user", "assistant", "assistant", "tool"]
            exec(settings.text.replace("/etc/ssl/corp.pem", str(ca_file)), known)
            assert isinstance(known["llm"], LLMInterface)
            await known["llm"].close()
