"""The messages of docs/protocol.md, as the golden file has them, read and written by our types."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm import protocol
from slm.errors import ProtocolError

GOLDEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "golden" / "messages.json").read_text()
)


@pytest.mark.parametrize("name", GOLDEN["server"])
def test_server_message_survives_a_round_trip(name: str) -> None:
    """What the server sends is parsed and encoded again without a change."""
    message = protocol.parse_server_message(json.dumps(GOLDEN["server"][name]))
    assert message is not None
    assert json.loads(protocol.encode(message)) == GOLDEN["server"][name]


@pytest.mark.parametrize("name", GOLDEN["client"])
def test_client_message_survives_a_round_trip(name: str) -> None:
    """What a client sends is parsed and encoded again without a change."""
    message = protocol.parse_client_message(json.dumps(GOLDEN["client"][name]))
    assert message is not None
    assert json.loads(protocol.encode(message)) == GOLDEN["client"][name]


@pytest.mark.parametrize("name", GOLDEN["server_refused"])
def test_a_wrong_shape_from_the_server_is_an_error(name: str) -> None:
    """A known type of the wrong shape is refused rather than guessed at."""
    with pytest.raises(ProtocolError):
        protocol.parse_server_message(json.dumps(GOLDEN["server_refused"][name]))


def test_an_error_says_which_message_and_where() -> None:
    """The kind of message and its field, a part that is no object among them; never its text."""
    message = GOLDEN["server"]["agent_config_changed"]
    message = message | {"config": message["config"] | {"llm_options": ["canary"]}}
    with pytest.raises(ProtocolError) as refused:
        protocol.parse_server_message(json.dumps(message))
    told = "a message of type agent_config_changed is not of the contract's shape at config"
    assert str(refused.value) == told
    with pytest.raises(ProtocolError, match="not a JSON object"):
        protocol.parse_server_message("[]")


@pytest.mark.parametrize("name", GOLDEN["client_refused"])
def test_a_wrong_shape_from_a_client_is_an_error(name: str) -> None:
    """A subscription or ack of the wrong shape is refused rather than guessed at."""
    with pytest.raises(ProtocolError):
        protocol.parse_client_message(json.dumps(GOLDEN["client_refused"][name]))


@pytest.mark.parametrize("name", GOLDEN["server_ignored"])
def test_an_unknown_type_is_ignored(name: str) -> None:
    """A message type of a later version does not disturb this one."""
    assert protocol.parse_server_message(json.dumps(GOLDEN["server_ignored"][name])) is None


@pytest.mark.parametrize("name", GOLDEN["server"])
def test_unknown_fields_are_ignored(name: str) -> None:
    """A field that a later version adds does not disturb this one."""
    data = GOLDEN["server"][name]
    plain = protocol.parse_server_message(json.dumps(data))
    assert protocol.parse_server_message(json.dumps(data | {"added_later": [1]})) == plain


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_a_message_or_a_protocol_error(text: str) -> None:
    """No text whatever makes the parsers fail in another way, nor is it told in the error."""
    for parse in (protocol.parse_server_message, protocol.parse_client_message):
        told = ""
        try:
            parse(text)
        except ProtocolError as error:
            told = str(error)
        assert len(text) < 12 or text not in told


def test_every_example_of_the_document_is_a_golden_message() -> None:
    """The JSON examples of docs/protocol.md are the golden messages, letter for letter."""
    document = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()
    blocks = [part.split("```")[0] for part in document.split("```json\n")[1:]]
    examples = [json.loads(line) for block in blocks for line in block.strip().split("\n\n")]
    golden = [message for group in GOLDEN.values() for message in group.values()]
    assert len(examples) >= 10
    for example in examples:
        assert example in golden, f"not a golden message: {example}"
