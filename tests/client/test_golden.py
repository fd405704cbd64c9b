"""The client understands the golden messages, docs/protocol.md's own examples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from slm import ClientStatus, SLMClient, Timings
from slm.client.cache.snapshot import ReceivedSnapshot
from slm.schemas import LLMConfigWithKey
from tests.support.faults.backends import TENTH
from tests.support.faults.scripted import Peer, ScriptedSLM, config, scripted_slm
from tests.support.servers import eventually

GOLDEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "messages.json").read_text()
)
SERVER = GOLDEN["server"]
EPOCH = SERVER["subscribed"]["epoch"]
DEFAULT = {"default": (1, config("d", is_default=True))}


def client_of(slm: ScriptedSLM) -> SLMClient:
    slm.epoch = EPOCH
    return SLMClient(slm.url, token="t", name="billing-backend", timings=Timings(**TENTH))


async def test_the_golden_stream_is_followed() -> None:
    """Created, changed and deleted as in the document; an unknown type and an error do no harm."""

    async def script(peer: Peer) -> None:
        await peer.say(SERVER["subscribed"] | {"heartbeat": 0.5})
        await eventually(lambda: slm.snapshots == 1)
        golden = slm.agents | {
            "code-assistant": (43, SERVER["agent_config_changed"]["config"] | {"llm_api_key": "k"})
        }
        slm.agents = golden
        await peer.say(
            SERVER["agent_config_changed"],
            GOLDEN["server_ignored"]["unknown_type"],
            SERVER["error"],
            SERVER["agent_created"],
            SERVER["heartbeat"] | {"revision": 44},
        )
        await eventually(lambda: client.revision == 44)
        assert client.peek("summariser") is not None
        await peer.say(SERVER["agent_deleted"], SERVER["heartbeat_behind"])
        await eventually(lambda: client.status is ClientStatus.BEHIND)
        await peer.live(45)

    async with scripted_slm(revision=42, agents=DEFAULT, scripts=[script]) as slm:
        client = client_of(slm)
        async with client:
            await eventually(lambda: client.revision == 45 and client.status == "live")
            expected = SERVER["agent_config_changed"]["config"]
            served = await client.get_agent_config("code-assistant")
            assert {k: v for k, v in served.items() if k in expected} == {
                k: v for k, v in expected.items() if k in served
            }
            assert served["llm_api_key"] == "k"
            assert (await client.resolve("summariser")).step == "default"
        assert len(slm.subscriptions) == 1


async def test_the_client_subscribes_as_the_document_says() -> None:
    """First plainly and by name, then with the position: the golden fields, no others."""

    async def first(peer: Peer) -> None:
        await peer.say(SERVER["subscribed"] | {"heartbeat": 0.5})
        await eventually(lambda: slm.snapshots == 1)
        await eventually(lambda: client.status is ClientStatus.LIVE)

    async def second(peer: Peer) -> None:
        await peer.subscribed(42, EPOCH)
        await peer.live(42)

    async with scripted_slm(revision=42, agents=DEFAULT, scripts=[first, second]) as slm:
        client = client_of(slm)
        async with client:
            await eventually(lambda: len(slm.subscriptions) == 2)
            await eventually(lambda: client.status is ClientStatus.LIVE)
    golden = GOLDEN["client"]["subscribe_since"]
    plain, resumed = slm.subscriptions
    assert plain.keys() == golden.keys() - {"since", "epoch", "change_id"}
    assert resumed.keys() == golden.keys()
    assert (resumed["since"], resumed["epoch"]) == (42, EPOCH)
    assert resumed["change_id"] == SERVER["subscribed"]["change_id"]
    # It says nothing of plain http where there is nothing to say.
    assert resumed["client"].keys() == golden["client"].keys() - {"plain_http"}
    assert resumed["client"]["name"] == "billing-backend"
    assert slm.snapshots == 1


@pytest.mark.parametrize("name", ["resync_compacted", "resync_epoch", "resync_ahead"])
async def test_a_golden_resync_brings_a_snapshot(name: str) -> None:
    """Whatever its reason, the stream goes on while a snapshot at N or later is taken."""
    resync = SERVER[name]

    async def script(peer: Peer) -> None:
        await peer.say(SERVER["subscribed"] | {"heartbeat": 0.5})
        await eventually(lambda: client.status is ClientStatus.LIVE)
        slm.revision, slm.agents = 45, {"default": (44, config("moved", is_default=True))}
        await peer.say(resync)
        await peer.live(45)

    async with scripted_slm(revision=42, agents=DEFAULT, scripts=[script]) as slm:
        client = client_of(slm)
        async with client:
            await eventually(lambda: client.revision == 45 and client.status == "live")
            assert (await client.resolve("default")).llm_model == "moved"
        assert (slm.snapshots, len(slm.subscriptions)) == (2, 1)


@pytest.mark.parametrize("name", GOLDEN["server_refused"])
async def test_a_golden_wrong_shape_costs_the_connection(name: str) -> None:
    """Drop, reconnect, resume: the same position, and no full fetch."""

    async def wrong(peer: Peer) -> None:
        await peer.say(SERVER["subscribed"] | {"heartbeat": 0.5})
        await eventually(lambda: client.status is ClientStatus.LIVE)
        await peer.say(json.dumps(GOLDEN["server_refused"][name]))
        await peer.live(42)

    async def right(peer: Peer) -> None:
        await peer.subscribed(42, EPOCH)
        await peer.live(42)

    async with scripted_slm(revision=42, agents=DEFAULT, scripts=[wrong, right]) as slm:
        client = client_of(slm)
        async with client:
            await eventually(lambda: len(slm.subscriptions) == 2)
            await eventually(lambda: client.status is ClientStatus.LIVE)
        assert slm.subscriptions[1]["since"] == 42
        assert slm.snapshots == 1


def test_the_golden_llm_answer_is_read() -> None:
    """The example of GET /api/agents/{agent_id}/llm, with its key kept from sight."""
    agent = LLMConfigWithKey.model_validate(GOLDEN["http"]["llm_config"])
    assert agent.llm_api_key is not None
    assert agent.llm_api_key.get_secret_value() == "sk-an-example"
    assert "sk-an-example" not in repr(agent)


def test_a_snapshot_row_reads_as_the_llm_answer() -> None:
    """An agent is the same from a snapshot as from its own answer, with absent fields too."""
    golden = GOLDEN["http"]["llm_config"]
    least = {"agent_id": "a", "revision": 1, "llm_provider": "p", "llm_model": "m"}
    for one in (golden, least, least | {"of_a_later_version": 1, "key_error": "undecryptable"}):
        text = json.dumps({"revision": 1, "epoch": "e", "agents": [one]})
        [received] = ReceivedSnapshot.model_validate_json(text).agents
        assert dataclasses.asdict(received) == dict(LLMConfigWithKey.model_validate(one))
        assert "sk-an-example" not in repr(received)
