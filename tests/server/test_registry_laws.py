"""What holds after any run of writes, whatever they are."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from slm.errors import ProblemError
from slm.server.agents.changes import Written
from slm.server.agents.schemas import AgentUpdate
from slm.server.security.audit import Who
from slm.server.settings import Settings
from tests.support.store import KEY, Store, new_agent

NAMES = st.sampled_from(["default", "a", "b", "c"])
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "llm_provider": st.sampled_from(["openai", "anthropic", "ollama"]),
        "llm_endpoint": st.sampled_from([None, "https://one.example/v1", "https://two.example"]),
        "llm_timeout": st.integers(1, 3),
        "llm_api_key": st.sampled_from([None, "sk-one", "sk-two"]),
        "llm_options": st.sampled_from([{}, {"seed": 1}]),
        "is_default": st.booleans(),
        "is_active": st.booleans(),
    },
)
WRITES = st.lists(
    st.one_of(
        st.tuples(st.just("create"), NAMES, FIELDS),
        st.tuples(st.just("update"), NAMES, FIELDS),
        st.tuples(st.just("delete"), NAMES, st.just({})),
    ),
    max_size=25,
)


async def write(store: Store, verb: str, name: str, fields: dict[str, Any]) -> Written:
    match verb:
        case "create":
            return await store.registry.create(new_agent(name, **fields), who=Who("tester"))
        case "update":
            update = AgentUpdate.model_validate(fields)
            return await store.registry.update(name, update, who=Who("tester"))
        case _:
            return await store.registry.delete(name, who=Who("tester"))


async def run(folder: Path, writes: list[tuple[str, str, dict[str, Any]]]) -> None:
    store = await Store.open(
        Settings(data_dir=folder, encryption_keys=SecretStr(KEY), lock_timeout_seconds=1)
    )
    try:
        keys: dict[str, str | None] = {}
        for verb, name, fields in writes:
            before = await store.head()
            with contextlib.suppress(ProblemError):
                written = await write(store, verb, name, fields)
                assert written.changed == (await store.head() > before)
                assert written.revision == await store.head()
                if "llm_api_key" in fields:
                    keys[name] = fields["llm_api_key"]
                elif written.agent is None or not written.agent.has_api_key:
                    keys[name] = None
        await store.check_laws()
        snapshot = await store.reads.snapshot()
        for config in snapshot.agents:
            held = config.llm_api_key and config.llm_api_key.get_secret_value()
            assert (held, config.key_error) == (keys.get(config.agent_id), None)
            assert config.has_api_key == (held is not None)
            assert (config.api_key_revision is None) == (held is None)
    finally:
        await store.close()


@settings(max_examples=60, deadline=None)
@given(writes=WRITES)
def test_any_run_of_writes_keeps_the_laws(writes: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Revisions without a gap, one active default, and changes that lead to the table."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder), writes))
