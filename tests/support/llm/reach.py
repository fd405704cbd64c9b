"""What can be reached from an exception, as a crash reporter or a debugger would follow it."""

from __future__ import annotations

import base64
import gc
import types
from urllib.parse import quote

_NOT_FOLLOWED = (types.ModuleType, types.FunctionType, types.FrameType, types.TracebackType, type)


def reaches(error: BaseException, secret: str, limit: int = 100_000) -> bool:
    """Say whether the secret, in any spelling, can be reached from the error, its frames left out.

    Args:
        error: the exception; its cause and context are followed.
        secret: what must not be found.
        limit: how many objects are looked at.
    """
    forms = [secret, quote(secret, safe=""), secret.encode().hex(), repr(secret)[1:-1]]
    forms += [
        base64.b64encode(secret.encode()).decode().rstrip("=")[:-2],
        secret.replace('"', '\\"'),
    ]
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending and len(seen) < limit:
        item = pending.pop()
        if id(item) in seen or isinstance(item, _NOT_FOLLOWED):
            continue
        seen.add(id(item))
        if isinstance(item, bytes | bytearray):
            item = bytes(item).decode("latin-1")
        if isinstance(item, str):
            if any(form.lower() in item.lower() for form in forms):
                return True
            continue
        if isinstance(item, BaseException):
            pending += [item.__cause__, item.__context__, item.args, vars(item)]
        pending.extend(gc.get_referents(item))
    return False
