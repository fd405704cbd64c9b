"""A client of a few lines that knows nothing of the SDK: docs/protocol.md alone is enough."""

import json
from pathlib import Path

import aiohttp
import pytest

from slm import SLMClient
from tests.support.servers import running_server


async def test_the_three_changes_arrive_in_order(tmp_path: Path) -> None:
    """Subscribe, create, change, delete: three frames with the contract's fields, in order."""
    async with running_server(tmp_path) as server, aiohttp.ClientSession() as http:
        admin = {"Authorization": f"Bearer {server.admin_token}"}
        agents = f"{server.url}/api/agents"
        async with http.ws_connect(
            f"{server.url}/ws", headers={"Authorization": f"Bearer {server.backend_token}"}
        ) as ws:
            await ws.send_str('{"subscribe": "agent_config"}')
            subscribed = json.loads(await ws.receive_str())
            assert subscribed["type"] == "subscribed"
            assert subscribed["channel"] == "agent_config"

            body = {
                "agent_id": "code-assistant",
                "name": "Code assistant",
                "llm_provider": "openai",
                "llm_model": "gpt-6.1-sol",
                "llm_api_key": "sk-canary-raw",
            }
            created = await http.post(agents, json=body, headers=admin)
            assert created.status == 201
            changed = await http.put(
                f"{agents}/code-assistant", json={"llm_model": "gpt-6.1-terra"}, headers=admin
            )
            deleted = await http.delete(f"{agents}/code-assistant", headers=admin)
            assert deleted.status == 204
            frames = [json.loads(await ws.receive_str()) for _ in range(3)]

        assert [frame["type"] for frame in frames] == [
            "agent_created",
            "agent_config_changed",
            "agent_deleted",
        ]
        first = subscribed["revision"] + 1
        assert [frame["revision"] for frame in frames] == [first, first + 1, first + 2]
        assert [int(answer.headers["SLM-Revision"]) for answer in (created, changed, deleted)] == [
            first,
            first + 1,
            first + 2,
        ]
        assert frames[1]["config"] == {
            "llm_provider": "openai",
            "llm_endpoint": None,
            "llm_model": "gpt-6.1-terra",
            "llm_timeout": 30,
            "llm_temperature": None,
            "llm_max_tokens": None,
            "llm_options": {},
            "is_default": False,
            "is_active": True,
            "has_api_key": True,
            "api_key_revision": first,
        }
        assert frames[2].keys() == {"type", "agent_id", "revision", "change_id"}
        assert "sk-canary-raw" not in json.dumps(frames)


async def test_the_url_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SLMClient(slm_url)` works when SLM_TOKEN is set."""
    async with running_server(tmp_path) as server:
        monkeypatch.setenv("SLM_TOKEN", server.backend_token)
        async with SLMClient(server.url) as client:
            config = await client.get_default_agent_config()
    assert config["llm_model"] == "mistral:7b-instruct"
    assert config["llm_provider"] == "ollama"
