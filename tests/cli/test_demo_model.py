"""Which model the demo takes: an Ollama that can do what the demo shows, else the local one."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from slm.cli.demo import model as demo_model
from slm.cli.demo.model import find_ollama

MODELS: list[dict[str, Any]] = [
    {"name": "llama3:70b", "size": 40_000_000_000},
    {"name": "nomic-embed-text", "size": 1_000},
    {"name": "qwen2:0.5b", "size": 400_000_000},
]


async def found(
    monkeypatch: pytest.MonkeyPatch, tags: web.Response, messages_status: int
) -> demo_model.RealModel | None:
    """Ask for an Ollama where one answers so."""

    async def answer_tags(_: web.Request) -> web.Response:
        return tags

    async def answer_messages(_: web.Request) -> web.Response:
        return web.json_response({"error": "model is required"}, status=messages_status)

    app = web.Application()
    app.router.add_get("/api/tags", answer_tags)
    app.router.add_post("/v1/messages", answer_messages)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        monkeypatch.setattr(demo_model, "OLLAMA_URL", url)
        model = await find_ollama()
    finally:
        await runner.cleanup()
    if model is not None:
        assert (model.openai_url, model.anthropic_url) == (f"{url}/v1", url)
    return model


async def test_an_ollama_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its models the smallest that can talk, over both of its protocols."""
    model = await found(monkeypatch, web.json_response({"models": MODELS}), 400)
    assert model is not None
    assert (model.name, model.what) == ("qwen2:0.5b", "qwen2:0.5b on Ollama")


@pytest.mark.parametrize(
    ("tags", "messages_status"),
    [
        ({"models": MODELS}, 404),
        ({"models": MODELS[1:2]}, 400),
        ({"models": []}, 400),
        ({"models": None}, 400),
        ({"models": [{"name": "no size"}]}, 400),
        ([], 400),
        ("<html>something else</html>", 400),
    ],
    ids=["one protocol", "embeddings", "no model", "null", "no size", "a list", "no json"],
)
async def test_an_ollama_that_is_of_no_use_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tags: Any, messages_status: int
) -> None:
    """Without a model, with one protocol alone or with no Ollama at all: the local model."""
    answer = web.Response(text=tags) if isinstance(tags, str) else web.json_response(tags)
    assert await found(monkeypatch, answer, messages_status) is None


async def test_nobody_at_ollamas_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is no Ollama."""
    monkeypatch.setattr(demo_model, "OLLAMA_URL", "http://127.0.0.1:9")
    assert await find_ollama() is None
