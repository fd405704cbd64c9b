"""A temperature that nobody chose is sent to nobody, from the database to the provider."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from slm import LLMInterface, SLMClient
from tests.end_to_end.test_live_change import HELLO, Operator
from tests.support.recorder import recording_provider
from tests.support.servers import ServerProcess, eventually


async def test_what_nobody_chose_is_not_sent(tmp_path: Path) -> None:
    """None at first, then the number that is set, none again; rollback, history and file agree."""
    file = tmp_path / "last-known-good.json"
    async with (
        ServerProcess(tmp_path / "data") as server,
        recording_provider() as provider,
        aiohttp.ClientSession() as http,
    ):
        operator = Operator(http, server)
        place = {"llm_provider": "openai", "llm_endpoint": provider.openai_url, "llm_model": "m"}
        told = [await operator.create("a", **place)]
        async with (
            SLMClient(server.url, token=server.backend_token, cache_file=file) as client,
            LLMInterface(client) as llm,
        ):
            for temperature in (None, 0.5, None):
                if len(told) > 1 or temperature is not None:
                    told.append(await operator.set("a", llm_temperature=temperature))
                await eventually(lambda: client.revision >= told[-1])
                assert (await client.resolve("a")).llm_temperature == temperature
                await llm.chat("a", HELLO)
                assert provider.seen[-1].body.get("temperature") == temperature
                assert ("temperature" in provider.seen[-1].body) == (temperature is not None)
            for to, temperature in ((told[1], 0.5), (told[0], None)):
                told.append(await operator.send("POST", "/a/rollback", {"to": to}))
                await eventually(lambda: client.revision >= told[-1])
                assert (await client.resolve("a")).llm_temperature == temperature
        admin = {"Authorization": f"Bearer {server.admin_token}"}
        async with http.get(f"{server.url}/api/agents/a/history", headers=admin) as answer:
            changes = (await answer.json())["changes"]
        temperatures = [change["agent"]["llm_temperature"] for change in changes]
        assert temperatures == [None, 0.5, None, 0.5, None]
    async with SLMClient(server.url, token="slm_x", cache_file=file, start_timeout=0.2) as client:
        config = await client.resolve("a")
        assert (config.stale, config.llm_model, config.llm_temperature) == (True, "m", None)
