"""The tutorial and the guides, played from an empty directory as their reader would."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from tests.documents.blocks import blocks
from tests.documents.replay import Replay
from tests.end_to_end.test_adoption import MISSION_TABLE

pytestmark = [pytest.mark.documents, pytest.mark.timeout(180)]


def free_ports(count: int) -> list[str]:
    """Return ports of this machine that nobody has."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def test_the_tutorial_works_from_an_empty_directory(tmp_path: Path) -> None:
    """Each file is saved and each command typed, and prints what the page shows."""
    ports = dict(zip(("8760", "9000", "8000"), free_ports(3), strict=True))
    with Replay(tmp_path, {"SLM_PORT": ports["8760"]}, ports) as replay:
        replay.play(blocks("docs/tutorial/fastapi.md", "python", "console"))


def test_the_synchronous_backends_work(tmp_path: Path) -> None:
    """Flask and Celery serve with the tutorial's agent; a folder stands in for Redis."""
    ports = dict(zip(("8760", "9000", "8000"), free_ports(3), strict=True))
    queue, results = tmp_path / "data_in", tmp_path / "results"
    queue.mkdir()
    results.mkdir()
    (tmp_path / "data_out").symlink_to(queue)
    instead = {
        "redis://localhost:6379/0": "filesystem://",
        "redis://localhost:6379/1": f"file://{results}",
    }
    with Replay(tmp_path, {"SLM_PORT": ports["8760"]}, instead | ports) as replay:
        replay.play(blocks("docs/tutorial/fastapi.md", "python", "console")[:5])
        replay.play(blocks("docs/how-to/synchronous-backend.md", "python", "console"))


def test_a_backend_is_migrated_as_the_guide_says(tmp_path: Path) -> None:
    """The agents are made with today's values, and a strict client finds each of them."""
    ports = {"8760": free_ports(1)[0]}
    (tmp_path / "openai.key").write_text("sk-migrated-canary\n")
    with Replay(tmp_path, {"SLM_PORT": ports["8760"]}, ports) as replay:
        replay.play(blocks("docs/tutorial/fastapi.md", "console")[:1])
        replay.play(blocks("docs/how-to/migrate.md", "python", "console"))


def test_a_table_is_adopted_as_the_guide_says(tmp_path: Path) -> None:
    """A table that another program made is served, key included, from a copy of its file."""
    ports = {"8760": free_ports(1)[0]}
    key = Fernet.generate_key()
    (tmp_path / "fernet.key").write_bytes(key)
    rows = [
        ("classifier", "openai", "gpt-6.1-sol", Fernet(key).encrypt(b"sk-adopted").decode(), 1),
        ("summariser", "ollama", "mistral:7b-instruct", None, 0),
    ]
    with contextlib.closing(sqlite3.connect(tmp_path / "agents.db")) as database:
        database.executescript(MISSION_TABLE)
        for agent_id, provider, model, token, is_default in rows:
            database.execute(
                "INSERT INTO agents (agent_id, name, llm_provider, llm_model,"
                " llm_api_key_encrypted, is_default) VALUES (?,?,?,?,?,?)",
                (agent_id, agent_id.title(), provider, model, token, is_default),
            )
        database.commit()
    with Replay(tmp_path, {"SLM_PORT": ports["8760"]}, ports) as replay:
        replay.play(blocks("docs/how-to/adopt-a-table.md", "python", "console"))
