"""What a write stores in the columns of an agent's row, including its key.

Contains no rules of its own and runs no statement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pydantic import SecretStr

from slm.errors import KeyUndecryptable
from slm.schemas import Agent
from slm.server.agents.credentials import binding_of
from slm.server.agents.schemas import VALUE_FIELDS, AgentCreate
from slm.server.encryption.vault import Vault

_PLAIN_FIELDS: Final = tuple(name for name in VALUE_FIELDS if name != "llm_options")
"""Fields stored as they are sent."""


def created_values(agent: AgentCreate) -> dict[str, Any]:
    """Return the columns of a new agent that depend only on the request body."""
    return {name: getattr(agent, name) for name in _PLAIN_FIELDS} | {
        "agent_id": agent.agent_id,
        "llm_options": _options_text(agent.llm_options),
    }


def altered_values(before: Agent, sent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns in which the value sent differs from the value served."""
    altered = {
        name: sent[name]
        for name in _PLAIN_FIELDS
        if name in sent and sent[name] != getattr(before, name)
    }
    if "llm_options" in sent:
        options = _options_text(sent["llm_options"])
        if options != _options_text(before.llm_options):
            altered["llm_options"] = options
    return altered


def _options_text(options: Mapping[str, Any]) -> str:
    """Return the options as they are stored: text in the order given; 1, 1.0 and true differ."""
    return json.dumps(options, ensure_ascii=False, separators=(",", ":"))


def place_key(
    values: dict[str, Any],
    before: Agent,
    after: Agent,
    sent: Mapping[str, Any],
    revision: int,
    vault: Vault,
) -> bool:
    """Set, keep or clear the key in `values`; return whether it was cleared without a request to.

    Args:
        values: the columns about to be written; changed in place.
        before: the agent before the write.
        after: the agent after the write, apart from its key.
        sent: the fields that the write names.
        revision: the revision of the write.
        vault: encrypts and decrypts.
    """
    moved = binding_of(after) != binding_of(before)
    if "llm_api_key" in sent:
        key: SecretStr | None = sent["llm_api_key"]
        if key is not None and not moved and _holds(values, before, key, vault):
            return False
        if key is None and not before.has_api_key:
            return False
        values["key_state"] = None
        values["llm_api_key_encrypted"] = key and vault.encrypt(key, binding_of(after))
        values["api_key_revision"] = key and revision
        return False
    if not (moved and before.has_api_key):
        return False
    values["key_state"] = values["llm_api_key_encrypted"] = values["api_key_revision"] = None
    return True


def _holds(values: Mapping[str, Any], agent: Agent, key: SecretStr, vault: Vault) -> bool:
    if not agent.has_api_key:
        return False
    try:
        held = vault.decrypt(str(values["llm_api_key_encrypted"]), binding_of(agent))
    except KeyUndecryptable:
        return False
    return held.get_secret_value() == key.get_secret_value()
