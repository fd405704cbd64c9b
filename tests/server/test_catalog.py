"""The catalog: applying changes one by one is the same as loading what they lead to."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from slm.schemas import Agent
from slm.server.agents.catalog import AgentFilter, Catalog
from slm.server.agents.changes import CommittedChange

NOW = datetime(2026, 11, 22, tzinfo=UTC)


def agent(number: int, agent_id: str, revision: int, **fields: object) -> Agent:
    """An agent as the database would give it."""
    data = {
        "id": number,
        "agent_id": agent_id,
        "name": agent_id.upper(),
        "llm_provider": "ollama",
        "llm_model": "m",
        "revision": revision,
        "created_at": NOW,
        "updated_at": NOW,
    }
    return Agent.model_validate(data | fields)


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "delete", "default"]), st.sampled_from("abcdef")),
        max_size=40,
    ),
    st.lists(st.integers(0, 10), max_size=10),
)
def test_applied_changes_equal_a_load(steps: list[tuple[str, str]], cuts: list[int]) -> None:
    """Any run of changes, handed over in any portions, leaves what a load would."""
    rows: dict[str, Agent] = {"x": agent(1, "x", 0, is_default=True)}
    catalog = Catalog()
    catalog.load(rows.values(), 0, "e")
    changes: list[CommittedChange] = []
    ids = 1
    for action, agent_id in steps:
        revision = (changes[-1].revision if changes else 0) + 1
        known = rows.get(agent_id)
        if action == "delete":
            if known is None or known.is_default:
                continue
            changes.append(CommittedChange(revision, "agent_deleted", rows.pop(agent_id)))
            continue
        if known is None:
            ids += 1
        number = ids if known is None else known.id
        kind = "agent_created" if known is None else "agent_config_changed"
        is_default = action == "default" or (known is not None and known.is_default)
        old = next(row for row in rows.values() if row.is_default)
        rows[agent_id] = agent(number, agent_id, revision, is_default=is_default)
        changes.append(CommittedChange(revision, kind, rows[agent_id]))
        if is_default and old.agent_id != agent_id:
            demoted = agent(old.id, old.agent_id, revision + 1)
            rows[old.agent_id] = demoted
            changes.append(CommittedChange(revision + 1, "agent_config_changed", demoted, True))
    head = changes[-1].revision if changes else 0
    rest = list(changes)
    for size in [*cuts, len(rest)]:
        portion, rest = rest[:size], rest[size:]
        if portion:
            catalog.apply(portion, portion[-1].revision)
            catalog.list_body()
    loaded = Catalog()
    loaded.load(sorted(rows.values(), key=lambda row: row.id), head, "e")
    assert catalog.revision == head
    assert catalog.list_body() == loaded.list_body()
    assert catalog.default() is not None
    assert catalog.default().agent == loaded.default().agent  # type: ignore[union-attr]
    assert len(catalog) == len(rows)


def test_the_list_is_encoded_once_a_revision() -> None:
    """The same bytes object answers until something changes."""
    catalog = Catalog()
    catalog.load([agent(1, "a", 1)], 1, "e")
    first = catalog.list_body()
    assert catalog.list_body() is first
    assert json.loads(first)["agents"][0]["agent_id"] == "a"
    catalog.apply([CommittedChange(2, "agent_created", agent(2, "b", 2))], 2)
    second = catalog.list_body()
    assert json.loads(second)["total"] == 2
    assert json.loads(second)["revision"] == 2


def test_a_search_knows_no_case() -> None:
    """Search finds text of id, name and description, whatever its case, in any alphabet."""
    catalog = Catalog()
    catalog.load([agent(1, "a", 1, name="Größe", description="ΣΊΣΥΦΟΣ")], 1, "e")
    for text in ("GRÖSSE", "größe", "σίσυφος", "A"):
        found = json.loads(catalog.list_body(AgentFilter(search=text)))
        assert found["total"] == 1, text
    assert json.loads(catalog.list_body(AgentFilter(search="absent")))["total"] == 0
