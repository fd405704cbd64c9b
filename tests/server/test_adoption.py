"""Adoption: a SQLite file made by the mission's own SQL is taken over in place."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from slm.errors import KeyUndecryptable, StartupError
from slm.server.agents.schemas import AgentUpdate
from slm.server.security.audit import Who
from slm.server.settings import Settings
from tests.support.store import KEY, OTHER_KEY, Store, new_agent

MISSION = """
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
);
"""
INDICES = """
CREATE INDEX idx_agents_agent_id ON agents(agent_id);
CREATE INDEX idx_agents_is_default ON agents(is_default);
"""
OLD = Fernet(OTHER_KEY)
NEW = Fernet(KEY)


def make(folder: Path, rows: Sequence[dict[str, Any]] = (), *, script: str = MISSION) -> Path:
    """Write a database as the mission has it, with these rows."""
    path = folder / "slm.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(script)
        for number, row in enumerate(rows):
            full = {
                "agent_id": f"agent-{number}",
                "name": "Agent",
                "llm_provider": "openai",
                "llm_model": "gpt-6.1-sol",
            } | row
            marks = ", ".join("?" * len(full))
            connection.execute(
                f"INSERT INTO agents ({', '.join(full)}) VALUES ({marks})", list(full.values())
            )
    return path


def look(path: Path, statement: str) -> list[Any]:
    """Read a database with nothing of ours."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


@contextlib.asynccontextmanager
async def adopted(folder: Path, *keys: str) -> AsyncIterator[Store]:
    """Start on the folder's database with these encryption keys."""
    given = SecretStr(",".join(keys)) if keys else None
    store = await Store.open(Settings(data_dir=folder, encryption_keys=given))
    try:
        yield store
    finally:
        await store.close()


async def keys_of(store: Store) -> dict[str, str | None]:
    """Return each agent's key, or how it is not to be had."""
    return {
        config.agent_id: config.key_error
        or (config.llm_api_key and config.llm_api_key.get_secret_value())  # type: ignore[misc]
        for config in (await store.reads.snapshot()).agents
    }


@pytest.mark.parametrize("script", [MISSION, MISSION + INDICES])
async def test_every_row_is_kept_and_gets_a_revision(tmp_path: Path, script: str) -> None:
    """Rows keep their values and numbers; each gets a revision and an agent_created change."""
    rows = [
        {"agent_id": f"a{n}", "llm_timeout": n + 1, "description": f"d{n}", "id": 10 * n + 5}
        for n in range(26)
    ]
    path = make(tmp_path, rows, script=script)
    before = look(path, "SELECT * FROM agents WHERE id != 0 ORDER BY id")
    async with adopted(tmp_path) as store:
        await store.check_laws()
        agents = await store.agents()
        assert [agents[f"a{n}"].revision for n in range(26)] == list(range(1, 27))
        assert agents["default"].revision == 27
        assert {change.type for change in await store.changes()} == {"agent_created"}
        assert agents["a3"].llm_timeout == 4
    columns = ", ".join(name for _, name, *_ in look(path, "PRAGMA table_info(agents)")[:15])
    after = look(path, f"SELECT {columns} FROM agents WHERE agent_id != 'default' ORDER BY id")
    assert after == before


async def test_the_table_is_not_rebuilt(tmp_path: Path) -> None:
    """UNIQUE, AUTOINCREMENT and defaults are the mission's own; our columns are added behind."""
    path = make(tmp_path, [{"agent_id": "a", "id": 41}, {"agent_id": "gone", "id": 99}])
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM agents WHERE id = 99")
    async with adopted(tmp_path) as store:
        created = await store.registry.create(new_agent("b"), who=Who("tester"))
        assert created.agent is not None
        # 100 is the seeded default; 99 was used once and never is again.
        assert created.agent.id == 101
    sql = look(path, "SELECT sql FROM sqlite_master WHERE name = 'agents'")[0][0]
    assert "id INTEGER PRIMARY KEY AUTOINCREMENT" in sql
    assert "agent_id VARCHAR(64) UNIQUE NOT NULL" in sql
    assert "llm_model VARCHAR(64) NOT NULL" in sql
    names = {name for (name,) in look(path, "SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert {"idx_agents_agent_id", "idx_agents_is_default", "uq_agents_one_default"} <= names
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        look(
            path,
            "INSERT INTO agents (agent_id, name, llm_provider, llm_model)"
            " VALUES ('a', 'n', 'p', 'm')",
        )


async def test_of_several_defaults_the_lowest_id_stays(tmp_path: Path) -> None:
    """Several defaults: the first keeps the flag, and is active from then on."""
    make(
        tmp_path,
        [
            {"agent_id": "a"},
            {"agent_id": "b", "is_default": 1, "is_active": 0},
            {"agent_id": "default", "is_default": 1},
            {"agent_id": "c", "is_default": 1},
        ],
    )
    async with adopted(tmp_path) as store:
        agents = await store.agents()
        assert [name for name, agent in agents.items() if agent.is_default] == ["b"]
        assert agents["b"].is_active
        await store.check_laws()


async def test_with_no_default_the_agent_of_that_name_becomes_it(tmp_path: Path) -> None:
    """`default` is flagged where nobody is, and made active."""
    make(tmp_path, [{"agent_id": "a"}, {"agent_id": "default", "is_active": 0, "llm_model": "m"}])
    async with adopted(tmp_path) as store:
        agent = await store.agent("default")
        assert (agent.is_default, agent.is_active, agent.llm_model) == (True, True, "m")
        await store.check_laws()


async def test_with_no_default_at_all_one_is_seeded(tmp_path: Path) -> None:
    """Neither a flag nor the name: the mission's default agent is added."""
    make(tmp_path, [{"agent_id": "a"}])
    async with adopted(tmp_path) as store:
        agent = await store.agent("default")
        assert (agent.is_default, agent.name) == (True, "Default Agent")
        assert (agent.llm_provider, agent.llm_model) == ("ollama", "mistral:7b-instruct")
        await store.check_laws()


async def test_an_empty_table_is_adopted(tmp_path: Path) -> None:
    """A table with no rows is as good as a new one."""
    make(tmp_path)
    async with adopted(tmp_path) as store:
        assert list(await store.agents()) == ["default"]
        await store.check_laws()


async def test_nulls_take_the_columns_default(tmp_path: Path) -> None:
    """NULL where a value is needed becomes the default; where null is a value it stays."""
    names = "llm_timeout llm_temperature is_default is_active created_at updated_at description"
    path = make(tmp_path, [{"agent_id": "a"} | dict.fromkeys(names.split())])
    before = datetime.now(UTC).replace(microsecond=0)
    async with adopted(tmp_path) as store:
        agent = await store.agent("a")
        assert (agent.llm_timeout, agent.llm_temperature) == (30, None)
        assert (agent.is_default, agent.is_active, agent.description) == (False, True, None)
        assert before <= agent.created_at == agent.updated_at
        await store.check_laws()
    row = look(path, "SELECT llm_timeout, llm_temperature, is_default, is_active FROM agents")[0]
    assert row == (30, None, 0, 1)


async def test_an_id_with_capitals_is_served_and_changed(tmp_path: Path) -> None:
    """An id that breaks our pattern is taken literally, and only what is sent is checked."""
    make(tmp_path, [{"agent_id": "Code Assistant/Ü", "llm_model": "x" * 300, "llm_timeout": 9999}])
    async with adopted(tmp_path) as store:
        written = await store.registry.update(
            "Code Assistant/Ü", AgentUpdate(llm_temperature=1.0), who=Who("tester")
        )
        assert written.agent is not None
        assert (written.agent.llm_temperature, written.agent.llm_timeout) == (1.0, 9999)
        assert (await store.reads.llm("Code Assistant/Ü"))[0].llm_model == "x" * 300
        await store.check_laws()
        await store.registry.delete("Code Assistant/Ü", who=Who("tester"))
        await store.check_laws()


@pytest.mark.parametrize(
    ("column", "stored", "served"),
    [
        ("llm_timeout", "12.5", 12),
        ("llm_timeout", "soon", 30),
        ("llm_timeout", -5, -5),
        ("llm_timeout", 2**62, 2**62),
        ("llm_timeout", float("inf"), 30),
        ("llm_temperature", "0.5", 0.5),
        ("llm_temperature", "warm", None),
        ("llm_temperature", float("inf"), None),
        ("llm_max_tokens", "many", None),
        ("llm_max_tokens", 0, 0),
        ("is_active", "true", True),
        ("is_active", "false", False),
        ("is_active", "no", False),
        ("is_active", 2, True),
        ("is_active", "perhaps", True),
        ("is_default", "false", False),
        ("is_default", "maybe", False),
        ("llm_endpoint", "", None),
        ("llm_endpoint", "not a url", "not a url"),
        ("llm_provider", "OpenAI", "OpenAI"),
        ("llm_model", b"\xff\x00bytes", "\ufffd\x00bytes"),
        ("name", "", ""),
        ("description", 12, "12"),
        ("created_at", "2024-01-02T03:04:05Z", datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("created_at", "2024-01-02 03:04:05", datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("created_at", "2024-01-02 03:04:05+02:00", datetime(2024, 1, 2, 1, 4, 5, tzinfo=UTC)),
        ("created_at", "2024-01-02", datetime(2024, 1, 2, tzinfo=UTC)),
        ("created_at", 1704164645, datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("created_at", "yesterday", datetime(1970, 1, 1, tzinfo=UTC)),
        ("created_at", "0001-01-01 00:00:00+14:00", datetime(1970, 1, 1, tzinfo=UTC)),
        ("created_at", 1e30, datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
async def test_odd_values_are_served(tmp_path: Path, column: str, stored: Any, served: Any) -> None:
    """What breaks our rules is served all the same, and takes no other row down."""
    make(tmp_path, [{"agent_id": "odd", column: stored}, {"agent_id": "even"}])
    async with adopted(tmp_path) as store:
        assert getattr(await store.agent("odd"), column) == served
        assert (await store.agent("even")).llm_timeout == 30
        await store.check_laws()
        await store.reads.snapshot()
        # A change of another field works, and leaves the odd one as it is.
        await store.registry.update("odd", AgentUpdate(llm_options={"a": 1}), who=Who("tester"))
        assert getattr(await store.agent("odd"), column) == served
        await store.check_laws()


@pytest.mark.parametrize("stored", ["", "[1]", "{", '{"a": NaN}', "null", 5, b"\xff", "[" * 9999])
async def test_odd_options_count_as_none(tmp_path: Path, stored: Any) -> None:
    """What is no JSON object in our own column is served as no options."""
    make(tmp_path, [{"agent_id": "a"}])
    async with adopted(tmp_path) as store:
        await store.sql("UPDATE agents SET llm_options = :stored", stored=stored)
        assert (await store.agent("a")).llm_options == {}
        await store.reads.snapshot()
        update = AgentUpdate(llm_options={"seed": 1})
        assert (await store.registry.update("a", update, who=Who("tester"))).changed
        assert (await store.agent("a")).llm_options == {"seed": 1}


async def test_a_word_for_true_is_a_default(tmp_path: Path) -> None:
    """'true' in the BOOLEAN column counts as the flag it was meant to be, once."""
    make(
        tmp_path,
        [{"agent_id": "a", "is_default": "TRUE"}, {"agent_id": "b", "is_default": "true"}],
    )
    async with adopted(tmp_path) as store:
        assert (await store.agent("a")).is_default
        await store.check_laws()


# --- keys ---


async def test_bare_keys_are_bound_and_usable(tmp_path: Path) -> None:
    """Keys in the mission's form are re-encrypted, each for its own place, and get a revision."""
    path = make(
        tmp_path,
        [
            {"agent_id": "a", "llm_api_key_encrypted": OLD.encrypt(b"sk-a").decode()},
            {"agent_id": "b", "llm_api_key_encrypted": OLD.encrypt(b"sk-b").decode()},
            {"agent_id": "c"},
            {"agent_id": "d", "llm_api_key_encrypted": ""},
        ],
    )
    async with adopted(tmp_path, OTHER_KEY) as store:
        assert await keys_of(store) == {
            "a": "sk-a",
            "b": "sk-b",
            "c": None,
            "d": None,
            "default": None,
        }
        agents = await store.agents()
        assert [agents[name].api_key_revision for name in "abcd"] == [1, 2, None, None]
        assert any("'a', 'b'" in note for note in store.notes)
        assert "sk-" not in "".join(store.notes)
        await store.check_laws()
        # Bound: an endpoint edited behind our back gets no key.
        await store.sql("UPDATE agents SET llm_endpoint = 'https://evil.example' WHERE id = 1")
        with pytest.raises(KeyUndecryptable):
            await store.reads.llm("a")
    assert b"sk-" not in path.read_bytes()


async def test_adoption_happens_once(tmp_path: Path) -> None:
    """A second start changes nothing: no new revision, no new ciphertext, no note."""
    path = make(tmp_path, [{"agent_id": "a", "llm_api_key_encrypted": OLD.encrypt(b"k").decode()}])
    async with adopted(tmp_path, OTHER_KEY) as store:
        head = await store.head()
    before = look(path, "SELECT * FROM agents"), look(path, "SELECT * FROM state")
    async with adopted(tmp_path, OTHER_KEY) as store:
        assert await store.head() == head
        assert store.notes == []
    assert (look(path, "SELECT * FROM agents"), look(path, "SELECT * FROM state")) == before


async def test_keys_without_an_encryption_key_refuse_the_start(tmp_path: Path) -> None:
    """A made-up encryption key would brick the stored ones; the file stays as it was."""
    token = OLD.encrypt(b"sk-a").decode()
    path = make(tmp_path, [{"agent_id": "a", "llm_api_key_encrypted": token}])
    before = look(path, "SELECT * FROM agents")
    with pytest.raises(StartupError, match="SLM_ENCRYPTION_KEYS"):
        await Store.open(Settings(data_dir=tmp_path))
    assert [name for (name,) in look(path, "SELECT name FROM sqlite_master")] == [
        "agents",
        "sqlite_autoindex_agents_1",
        "sqlite_sequence",
    ]
    assert look(path, "SELECT * FROM agents") == before
    assert not (tmp_path / "encryption.key").exists()


async def test_a_key_that_does_not_decrypt_is_kept_until_it_does(tmp_path: Path) -> None:
    """Kept untouched and reported; bound at the first start that has its key, as a change."""
    tokens = [NEW.encrypt(b"sk-a").decode(), OLD.encrypt(b"sk-b").decode()]
    rows = [
        {"agent_id": name, "llm_api_key_encrypted": token}
        for name, token in zip("ab", tokens, strict=True)
    ]
    path = make(tmp_path, rows)
    for _ in range(2):
        async with adopted(tmp_path, KEY) as store:
            assert await keys_of(store) == {"a": "sk-a", "b": "undecryptable", "default": None}
            assert any("'b'" in note and "kept" in note for note in store.notes)
            agent = await store.agent("b")
            assert (agent.has_api_key, agent.api_key_revision) == (True, 2)
            assert await store.head() == 3
            query = "SELECT llm_api_key_encrypted FROM agents WHERE agent_id = 'b'"
            assert (await store.sql(query))[0][0] == tokens[1]
    async with adopted(tmp_path, KEY, OTHER_KEY) as store:
        assert (await keys_of(store))["b"] == "sk-b"
        agent = await store.agent("b")
        assert (agent.revision, agent.api_key_revision) == (4, 4)
        assert (await store.changes())[-1].type == "agent_config_changed"
        await store.check_laws()
    # And from then on the old key is needed no more.
    async with adopted(tmp_path, KEY) as store:
        assert (await keys_of(store))["b"] == "sk-b"
        assert store.notes == []
    assert look(path, "SELECT count(*) FROM agents WHERE key_state IS NOT NULL") == [(0,)]


async def test_a_kept_key_does_not_follow_an_edited_endpoint(tmp_path: Path) -> None:
    """A token that waits for its key is bound to the place that it was adopted for."""
    make(tmp_path, [{"agent_id": "b", "llm_api_key_encrypted": OLD.encrypt(b"sk-b").decode()}])
    async with adopted(tmp_path, KEY) as store:
        await store.sql("UPDATE agents SET llm_endpoint = 'https://evil.example' WHERE id = 1")
    async with adopted(tmp_path, KEY, OTHER_KEY) as store:
        assert (await keys_of(store))["b"] == "undecryptable"


async def test_a_kept_key_is_cleared_with_its_place(tmp_path: Path) -> None:
    """Through the API the endpoint can be changed, and the waiting token goes."""
    make(tmp_path, [{"agent_id": "b", "llm_api_key_encrypted": OLD.encrypt(b"sk-b").decode()}])
    async with adopted(tmp_path, KEY) as store:
        update = AgentUpdate(llm_endpoint="https://elsewhere.example")
        written = await store.registry.update("b", update, who=Who("tester"))
        assert written.api_key_cleared
    async with adopted(tmp_path, KEY, OTHER_KEY) as store:
        assert (await keys_of(store))["b"] is None
        assert store.notes == []


async def test_a_kept_key_can_be_replaced(tmp_path: Path) -> None:
    """Setting the key again ends the waiting."""
    make(tmp_path, [{"agent_id": "b", "llm_api_key_encrypted": OLD.encrypt(b"sk-b").decode()}])
    async with adopted(tmp_path, KEY) as store:
        await store.registry.update(
            "b", AgentUpdate(llm_api_key=SecretStr("sk-new")), who=Who("tester")
        )
    async with adopted(tmp_path, KEY, OTHER_KEY) as store:
        assert (await keys_of(store))["b"] == "sk-new"
        assert store.notes == []


@pytest.mark.parametrize(
    "state", [None, "unbound", OLD.encrypt(b"x").decode()], ids=["none", "unbound", "a token"]
)
async def test_a_bare_token_put_there_later_is_refused(tmp_path: Path, state: str | None) -> None:
    """After adoption nobody's bare token is bound, whatever is written beside it."""
    make(tmp_path)
    token = OLD.encrypt(b"sk-stolen").decode()
    async with adopted(tmp_path, OTHER_KEY) as store:
        await store.sql(
            "INSERT INTO agents (agent_id, name, llm_provider, llm_endpoint, llm_model,"
            " llm_api_key_encrypted, key_state)"
            " VALUES ('thief', 'T', 'openai', 'https://evil.example', 'm', :token, :state)",
            token=token,
            state=state,
        )
    async with adopted(tmp_path, OTHER_KEY) as store:
        assert (await keys_of(store))["thief"] == "undecryptable"
        await store.check_laws()


@pytest.mark.parametrize(
    "token",
    ["garbage", "\x00", b"\xff\xfe", 12, OLD.encrypt(b"").decode()],
    ids=["text", "nul", "bytes", "number", "empty"],
)
async def test_a_token_that_is_none_is_kept_and_told(tmp_path: Path, token: Any) -> None:
    """Whatever stands in the key's column, the row is served without a key and says why."""
    make(tmp_path, [{"agent_id": "a", "llm_api_key_encrypted": token}])
    async with adopted(tmp_path, OTHER_KEY) as store:
        assert (await keys_of(store))["a"] == "undecryptable"
        assert any("'a'" in note for note in store.notes)
        await store.check_laws()


async def test_a_table_that_is_not_the_missions_is_refused(tmp_path: Path) -> None:
    """Somebody else's table `agents` is left alone, and the message says what it lacks."""
    path = make(tmp_path, script="CREATE TABLE agents (id INTEGER PRIMARY KEY, agent_id TEXT)")
    with pytest.raises(StartupError, match=r"no column .*llm_model") as caught:
        await Store.open(Settings(data_dir=tmp_path))
    assert "\n" not in str(caught.value)
    assert look(path, "SELECT name FROM sqlite_master") == [("agents",)]


async def test_an_adopted_database_gets_its_tokens(tmp_path: Path) -> None:
    """The two first tokens are made for a database that has none."""
    make(tmp_path, [{"agent_id": "a"}])
    async with adopted(tmp_path) as store:
        assert [name for (name,) in await store.sql("SELECT name FROM tokens")] == [
            "admin",
            "backend",
        ]
    assert (tmp_path / "admin.token").exists()
