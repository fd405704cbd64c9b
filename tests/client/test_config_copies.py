"""What is answered belongs to whoever asked: copies are deep, and pickles hold no key."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from pydantic import SecretStr

from slm import AgentConfigCache
from slm.client.cache.snapshot import ReceivedAgent, ReceivedSnapshot
from slm.client.config import ResolvedConfig

OPTIONS: dict[str, Any] = {"stop": ["a"], "thinking": {"type": "enabled", "deep": [{"x": 1}]}}


def held() -> ResolvedConfig:
    """Return a config as a cache holds it."""
    cache = AgentConfigCache()
    agent = ReceivedAgent(
        agent_id="a",
        revision=1,
        llm_provider="openai",
        llm_model="m",
        llm_options=copy.deepcopy(OPTIONS),
        has_api_key=True,
        api_key_revision=1,
        llm_api_key=SecretStr("sk-canary"),
    )
    cache.apply_snapshot(ReceivedSnapshot(revision=1, epoch="e", agents=[agent]))
    cache.liveness.set(True)
    return cache.ready["a"]


def test_a_dict_of_your_own_shares_nothing() -> None:
    """Whatever is done to one answer, deep inside too, the next one is as the SLM has it."""
    config = held()
    mine = config.as_dict()
    mine["llm_options"]["stop"].append("EVIL")
    mine["llm_options"]["thinking"]["deep"][0]["x"] = 2
    mine["llm_model"] = "EVIL"
    assert config.as_dict()["llm_options"] == OPTIONS
    assert config.as_dict()["llm_model"] == "m"
    by_hand = AgentConfigCache()
    by_hand.set("a", mine)
    mine["llm_options"]["stop"].clear()
    answer = by_hand.get("a")
    assert answer is not None
    answer["llm_options"]["stop"].clear()
    again = by_hand.get("a")
    assert again is not None
    assert again["llm_options"]["stop"] == ["a", "EVIL"]


def test_a_config_can_be_copied() -> None:
    """By copy, deepcopy, asdict and replace; the key stays in this process."""
    config = held()
    for made in (copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)):
        assert made.llm_options == OPTIONS
        assert made.llm_api_key == config.llm_api_key
        assert (made.age, made.stale) == (0.0, False)
    fields = dataclasses.asdict(config)
    fields["llm_options"] = dict(fields["llm_options"])
    assert fields["llm_options"] == OPTIONS
    with pytest.raises(TypeError, match="not to be changed"):
        config.llm_options["x"] = 1  # type: ignore[index]
    with pytest.raises(TypeError, match="not to be changed"):
        config.llm_options.update(x=1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_holds_no_key(protocol: int) -> None:
    """What goes through a queue to another process is the config without its key, and stale."""
    written = pickle.dumps(held(), protocol)
    assert b"canary" not in written
    config = pickle.loads(written)
    assert (config.llm_api_key, config.llm_model) == (None, "m")
    assert config.llm_options == OPTIONS
    assert config.stale
    assert 0 <= config.age < 60
