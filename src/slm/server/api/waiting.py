"""The parameter `wait` of the writes, and the receipt in their answer (docs/protocol.md 3)."""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any, Final

from fastapi import Query
from pydantic import BeforeValidator

from slm.errors import Unauthorized
from slm.server.agents.service import Written
from slm.server.security.token_table import Caller
from slm.server.services import Services

MAX_WAIT_SECONDS: Final = 60.0

_DURATION: Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(ms|s|)")

# The same with the limit in it, for the API's document.
_DOCUMENTED: Final = (
    r"^(([0-5]?[0-9](\.[0-9]{1,6})?|60(\.0{1,6})?)s?"
    r"|([0-5]?[0-9]{1,4}(\.[0-9]{1,6})?|60000(\.0{1,6})?)ms)$"
)


def _seconds(text: Any) -> float:
    found = _DURATION.fullmatch(str(text))
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1) if found else -1.0
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise ValueError(f"a duration such as 5s or 500ms, at most {MAX_WAIT_SECONDS:g}s")
    return seconds


Wait = Annotated[
    float | None,
    BeforeValidator(_seconds, json_schema_input_type=str),
    Query(
        description="Wait until every backend has answered for the change, such as 5s or 500ms,"
        f" at most {MAX_WAIT_SECONDS:g}s; the answer then has a `receipt`.",
        json_schema_extra={"pattern": _DOCUMENTED},
    ),
]


async def receipt_of(
    services: Services, caller: Caller, written: Written, wait: float
) -> dict[str, Any] | None:
    """Return the receipt of a write, after waiting for it.

    The write is made, so it is answered even if its token is revoked meanwhile: then with what is
    known by that time.
    """
    subject = await services.receipts.subject_of(written)
    if subject is None:
        return None
    with contextlib.suppress(Unauthorized):
        async with services.doorkeeper.while_it_counts(caller):
            return await services.receipts.receipt(subject, wait, named=named_for(caller))
    return await services.receipts.receipt(subject, named=named_for(caller))


def named_for(caller: Caller) -> str | None:
    """Return the token whose backends a receipt may name to this caller; None: everyone's.

    Who may not read the fleet, for want of a scope or because the token is limited, sees by name
    only the backends that use the same token.
    """
    return None if caller.sees_fleet else caller.name
