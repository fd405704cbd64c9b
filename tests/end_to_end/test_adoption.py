"""A SQLite file that somebody else made is taken over by `slm serve` with every row kept."""

import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from cryptography.fernet import Fernet
from yarl import URL

from slm import SLMClient
from tests.support.servers import ServerProcess

MISSION_TABLE = """
CREATE TABLE agents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    agent_id VARCHAR(64) UNIQUE NOT NULL,
    name VARCHAR(128) NOT NULL,
    description TEXT,
    llm_provider VARCHAR(32) NOT NULL,
    llm_endpoint VARCHAR(256),
    llm_model VARCHAR(64) NOT NULL,
    llm_api_key_encrypted TEXT,
    llm_timeout INTEGER DEFAULT 30,
    llm_temperature FLOAT DEFAULT 0.7,
    llm_max_tokens INTEGER,
    is_default BOOLEAN DEFAULT FALSE,
    is_active BOOLEAN DEFAULT TRUE,
    created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
    updated_at DATETIME DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_agents_agent_id ON agents (agent_id);
CREATE INDEX idx_agents_is_default ON agents (is_default);
"""


def make_foreign_database(path: Path, key: bytes) -> dict[str, str]:
    """Make 26 rows as a stranger might have, and return the plain keys by agent_id."""
    fernet = Fernet(key)
    keys: dict[str, str] = {}
    with sqlite3.connect(path) as database:
        database.executescript(MISSION_TABLE)
        for n in range(26):
            agent_id = "Legacy-Classifier" if n == 7 else f"agent-{n:02}"
            token = None
            if n % 3 == 0:
                keys[agent_id] = f"sk-canary-{n:02}"
                token = fernet.encrypt(keys[agent_id].encode()).decode()
            database.execute(
                "INSERT INTO agents (agent_id, name, description, llm_provider, llm_endpoint,"
                " llm_model, llm_api_key_encrypted, llm_timeout, llm_temperature, is_default,"
                " is_active) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                (
                    agent_id,
                    f"Agent {n}",
                    None if n % 2 else "made elsewhere",
                    "openai" if token else "ollama",
                    "https://llm.example.com/v1" if n == 3 else None,
                    "gpt-6.1-sol" if token else "mistral:7b-instruct",
                    token,
                    None if n == 10 else 45,
                    None if n == 11 else 0.3,
                    1 if n in (4, 9) else (None if n == 12 else 0),
                    None if n == 13 else 1,
                ),
            )
        database.execute("DELETE FROM agents WHERE agent_id = 'agent-25'")
        database.execute(
            "INSERT INTO agents (agent_id, name, llm_provider, llm_model) VALUES (?,?,?,?)",
            ("agent-26", "Agent 26", "ollama", "mistral:7b-instruct"),
        )
    database.close()
    return keys


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir(mode=0o700)
    return path


def _dump(path: Path) -> list[str]:
    database = sqlite3.connect(path)
    try:
        return list(database.iterdump())
    finally:
        database.close()


async def _agents(server: ServerProcess) -> dict[str, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {server.admin_token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.get(f"{server.url}/api/agents") as answer,
    ):
        assert answer.status == 200
        listing = await answer.json()
    assert listing["total"] == len(listing["agents"])
    return {agent["agent_id"]: agent for agent in listing["agents"]}


async def test_every_row_is_kept_and_every_key_works(data_dir: Path) -> None:
    """26 rows with keys, NULLs, two defaults and a capital letter are served with their keys."""
    key = Fernet.generate_key()
    keys = make_foreign_database(data_dir / "slm.db", key)
    async with ServerProcess(data_dir, env={"SLM_ENCRYPTION_KEYS": key.decode()}) as server:
        agents = await _agents(server)
        assert len(agents) == 26
        assert [a["agent_id"] for a in agents.values() if a["is_default"]] == ["agent-04"]
        assert agents["agent-10"]["llm_timeout"] == 30
        assert agents["agent-11"]["llm_temperature"] is None, "a NULL of before stays one"
        assert agents["agent-12"]["is_default"] is False
        assert agents["agent-13"]["is_active"] is True
        assert agents["agent-26"]["id"] == 27
        assert len({agent["revision"] for agent in agents.values()}) == 26
        assert {name for name, agent in agents.items() if agent["has_api_key"]} == set(keys)

        async with SLMClient(server.url, token=server.backend_token) as client:
            for agent_id, plain in keys.items():
                config = await client.get_agent_config(agent_id)
                assert config["llm_api_key"] == plain
            assert (await client.get_agent_config("Legacy-Classifier"))["llm_timeout"] == 45

        headers = {"Authorization": f"Bearer {server.admin_token}"}
        async with aiohttp.ClientSession(headers=headers) as http:
            changed = await http.put(
                f"{server.url}/api/agents/Legacy-Classifier", json={"llm_temperature": 0.1}
            )
            assert changed.status == 200
            body = {
                "agent_id": "agent-new",
                "name": "New",
                "llm_provider": "ollama",
                "llm_model": "m",
            }
            created = await (await http.post(f"{server.url}/api/agents", json=body)).json()
            assert created["id"] == 28, "an id is never given twice"
            again = await http.post(f"{server.url}/api/agents", json=body)
            assert again.status == 409
        assert not any(plain in server.log for plain in keys.values())
        assert await server.terminate() == 0

    with sqlite3.connect(data_dir / "slm.db") as database:
        (sql,) = database.execute(
            "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'agents'"
        ).fetchone()
        tokens = dict(
            database.execute(
                "SELECT agent_id, llm_api_key_encrypted FROM agents"
                " WHERE llm_api_key_encrypted IS NOT NULL"
            )
        )
    database.close()
    assert "AUTOINCREMENT" in sql
    assert "UNIQUE" in sql
    for agent_id, plain in keys.items():
        bound = Fernet(key).decrypt(tokens[agent_id].encode()).decode()
        assert bound != plain, "the key is bound to its place"
        assert agent_id in bound


async def test_without_the_encryption_key_it_refuses(data_dir: Path) -> None:
    """Keys in the file and no encryption key given: one sentence, no traceback, nothing changed."""
    make_foreign_database(data_dir / "slm.db", Fernet.generate_key())
    before = _dump(data_dir / "slm.db")
    server = ServerProcess(data_dir)
    with pytest.raises(AssertionError, match="SLM_ENCRYPTION_KEYS"):
        await server.start()
    assert server.process.returncode not in (0, None)
    assert "Traceback" not in server.log
    assert _dump(data_dir / "slm.db") == before


async def test_a_second_start_changes_nothing(data_dir: Path) -> None:
    """Adoption happens once: started again, the server has the same revisions and tokens."""
    key = Fernet.generate_key()
    make_foreign_database(data_dir / "slm.db", key)
    server = ServerProcess(data_dir, env={"SLM_ENCRYPTION_KEYS": key.decode()})
    async with server:
        first, token = await _agents(server), server.admin_token
        assert await server.terminate() == 0
        await server.start()
        assert await _agents(server) == first
        assert server.admin_token == token


async def test_an_id_with_a_slash_is_that_agent_and_no_path(data_dir: Path) -> None:
    """Whatever an adopted id looks like, its path means that agent: `a%2Fllm` is not a's key."""
    key = Fernet.generate_key()
    agent_ids = ["a", "a/llm", "a/b", "a%2Fb", "a/", "..", "A b?c#d", "default/llm", "é/%"]
    with sqlite3.connect(data_dir / "slm.db") as database:
        database.executescript(MISSION_TABLE)
        for agent_id in agent_ids:
            database.execute(
                "INSERT INTO agents (agent_id, name, llm_provider, llm_model,"
                " llm_api_key_encrypted) VALUES (?, 'n', 'openai', 'm', ?)",
                (agent_id, Fernet(key).encrypt(f"sk-{agent_id}".encode()).decode()),
            )
    database.close()
    async with ServerProcess(data_dir, env={"SLM_ENCRYPTION_KEYS": key.decode()}) as server:
        headers = {"Authorization": f"Bearer {server.admin_token}"}
        reader = {"Authorization": f"Bearer {server.backend_token}"}
        async with aiohttp.ClientSession(headers=headers) as http:

            async def call(method: str, agent_id: str, rest: str = "", **options: Any) -> Any:
                path = f"{server.url}/api/agents/{quote(agent_id, safe='')}{rest}"
                async with http.request(method, URL(path, encoded=True), **options) as answer:
                    assert answer.status < 300, (method, agent_id, rest, await answer.text())
                    return await answer.json() if answer.status != 204 else None

            for agent_id in agent_ids:
                assert (await call("GET", agent_id))["agent_id"] == agent_id
                assert (await call("GET", agent_id, "?min_revision=1"))["agent_id"] == agent_id
                keyed = await call("GET", agent_id, "/llm", headers=reader)
                assert (keyed["agent_id"], keyed["llm_api_key"]) == (agent_id, f"sk-{agent_id}")
                changed = await call("PUT", agent_id, json={"llm_model": f"m-{agent_id}"})
                assert (changed["agent_id"], changed["llm_model"]) == (agent_id, f"m-{agent_id}")
                assert len((await call("GET", agent_id, "/history"))["changes"]) == 2
            for agent_id in agent_ids:
                await call("DELETE", agent_id)
            assert list(await _agents(server)) == ["default"]
