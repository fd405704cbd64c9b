"""The encryption key routes, scope `admin`: the keys' state and the steps of a rotation.

No request and no response ever contains an encryption key.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from slm.errors import (
    Conflict,
    ContentTooLarge,
    DatabaseUnavailable,
    EncryptionKeyMissing,
    InsufficientStorage,
    InvalidRequest,
    KeysNotReady,
    OutcomeUnknown,
    UnsupportedMediaType,
)
from slm.server.api.access import Admin, Asking
from slm.server.api.parameters import MAX_ROW_ID, QueryModel, Rotation
from slm.server.api.problems import problem_responses
from slm.server.api.responses import model_response
from slm.server.api.route import SLMRoute
from slm.server.encryption.rotation import KeyStatus
from slm.server.strict_json import MAX_INTEGER

router = APIRouter(prefix="/api/admin/keys", route_class=SLMRoute, tags=["administration"])

_PROBLEMS = (
    DatabaseUnavailable,
    EncryptionKeyMissing,
    InsufficientStorage,
    InvalidRequest,
    OutcomeUnknown,
)


class KeyRead(BaseModel):
    """One encryption key, by its fingerprint."""

    fingerprint: str
    is_active: bool
    created_at: str
    retired_at: str | None
    rows: int
    here: bool


class ReplicaRead(BaseModel):
    """One server process, and the keys it has."""

    id: str
    name: str
    fingerprints: list[str]
    seconds_since_seen: float
    live: bool


class KeyStatusRead(BaseModel):
    """All keys and all replicas."""

    source: str
    keys: list[KeyRead]
    unreadable: int
    replicas: list[ReplicaRead]


class KeyName(BaseModel):
    """The key that was added or is now active."""

    fingerprint: str


class RotateTo(BaseModel):
    """The body of POST /api/admin/keys/rotate."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None


class ReencryptQuery(QueryModel):
    """Where a re-encryption continues, and with how many rows."""

    after_id: int = Field(0, ge=0, le=MAX_INTEGER)
    limit: int = Field(200, ge=1, le=1000)


class Reencrypted(BaseModel):
    """How far a re-encryption has got; `last_id` is null when it is complete."""

    last_id: int | None
    changed: int


class Pruned(BaseModel):
    """The keys that no row needs any more."""

    fingerprints: list[str]


@router.get("", response_model=KeyStatusRead, responses=problem_responses(DatabaseUnavailable))
async def get_keys(rotation: Rotation, _: Admin) -> Response:
    """Return which keys there are, how many rows need each, and which replica has which."""
    return model_response(_read(await rotation.status()))


@router.post(
    "", status_code=201, response_model=KeyName, responses=problem_responses(*_PROBLEMS, Conflict)
)
async def add_key(rotation: Rotation, _: Admin, who: Asking) -> Response:
    """Create a key in the data directory; it can decrypt, but does not encrypt yet."""
    name = await rotation.add(who=who)
    return model_response(KeyName(fingerprint=name), 201)


@router.post(
    "/rotate",
    response_model=KeyName,
    responses=problem_responses(*_PROBLEMS, KeysNotReady, ContentTooLarge, UnsupportedMediaType),
)
async def rotate(wanted: RotateTo, rotation: Rotation, _: Admin, who: Asking) -> Response:
    """Make a key active on every replica at once; rows are re-encrypted afterwards."""
    name = await rotation.rotate(wanted.fingerprint, who=who)
    return model_response(KeyName(fingerprint=name))


@router.post("/reencrypt", response_model=Reencrypted, responses=problem_responses(*_PROBLEMS))
async def reencrypt(
    rotation: Rotation, _: Admin, who: Asking, query: Annotated[ReencryptQuery, Query()]
) -> Response:
    """Re-encrypt some rows under the active key, in one short transaction."""
    progress = await rotation.reencrypt(min(query.after_id, MAX_ROW_ID), query.limit, who=who)
    return model_response(Reencrypted(last_id=progress.last_id, changed=progress.changed))


@router.post(
    "/prune", response_model=Pruned, responses=problem_responses(*_PROBLEMS, Conflict, KeysNotReady)
)
async def prune(rotation: Rotation, _: Admin, who: Asking) -> Response:
    """Retire every key but the active one; refused while a row needs one of them."""
    names = await rotation.prune(who=who)
    return model_response(Pruned(fingerprints=names))


def _read(status: KeyStatus) -> KeyStatusRead:
    keys = [
        KeyRead(
            **vars(key)
            | {
                "created_at": key.created_at.isoformat(),
                "retired_at": key.retired_at and key.retired_at.isoformat(),
            }
        )
        for key in status.keys
    ]
    replicas = [ReplicaRead(**vars(replica)) for replica in status.replicas]
    return KeyStatusRead(
        source=status.source, keys=keys, unreadable=status.unreadable, replicas=replicas
    )
