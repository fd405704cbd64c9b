"""A SQLite file of N agents for a server to start on, made by the mission's own SQL.

The server adopts it as it would anyone's; that is the fastest way in, and no back door.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from cryptography.fernet import Fernet

from benchmarks.peers.readers import VALUE

_TABLE = """
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
    is_default BOOLEAN DEFAULT 0,
    is_active BOOLEAN DEFAULT 1,
    created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
    updated_at DATETIME DEFAULT CURRENT_TIMESTAMP
)
"""
_INSERT = """
INSERT INTO agents (agent_id, name, llm_provider, llm_endpoint, llm_model, llm_api_key_encrypted,
                    llm_timeout, llm_temperature, llm_max_tokens, is_default)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


def agent_id(number: int) -> str:
    """Return the id of the N-th agent; the first is the default agent."""
    return "default" if number == 0 else f"agent-{number:05d}"


def make_database(folder: Path, count: int, *, keys: bool = False) -> str:
    """Write `slm.db` with `count` agents into `folder`; return the encryption key to start with."""
    folder.mkdir(parents=True, exist_ok=True)
    encryption_key = Fernet.generate_key()
    fernet = Fernet(encryption_key)
    rows = [
        (
            agent_id(number),
            f"Agent {number}",
            VALUE["llm_provider"],
            VALUE["llm_endpoint"],
            VALUE["llm_model"],
            fernet.encrypt(b"sk-bench-%048d" % number).decode() if keys else None,
            VALUE["llm_timeout"],
            VALUE["llm_temperature"],
            VALUE["llm_max_tokens"],
            number == 0,
        )
        for number in range(count)
    ]
    database = sqlite3.connect(folder / "slm.db")
    with database:
        database.execute(_TABLE)
        database.execute("CREATE INDEX idx_agents_agent_id ON agents(agent_id)")
        database.execute("CREATE INDEX idx_agents_is_default ON agents(is_default)")
        database.executemany(_INSERT, rows)
    database.close()
    return encryption_key.decode()
