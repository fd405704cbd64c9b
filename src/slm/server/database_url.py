"""The URL of a database, in libpq's spelling or SQLAlchemy's. Connects to nothing."""

from __future__ import annotations

import re
from typing import Final

_LIBPQ_HOSTS: Final = re.compile(
    r"^(?P<scheme>[a-z0-9+]+://)(?P<user>[^/?#@]*@)?(?P<hosts>[^/?#@]*,[^/?#@]*)"
    r"(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?$",
    re.IGNORECASE,
)
_LIBPQ_HOST: Final = re.compile(r"^(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:\[\]]*))(?::(?P<port>\d+))?$")


def sqlalchemy_spelling(url: str) -> str:
    """Convert a URL with several hosts from libpq's spelling to SQLAlchemy's.

    `postgresql://u@a:5432,b:5433/db` becomes `postgresql://u@/db?host=a,b&port=5432,5433`; any
    other URL stays as it is.

    Raises:
        ValueError: one of several hosts or ports is invalid.
    """
    found = _LIBPQ_HOSTS.match(url)
    if found is None:
        return url
    hosts, ports = [], []
    for each in found["hosts"].split(","):
        one = _LIBPQ_HOST.match(each)
        if one is None:
            raise ValueError("one of its hosts or ports is not valid")
        hosts.append(one["v6"] or one["name"])
        ports.append(one["port"] or "5432")
    query = f"host={','.join(hosts)}&port={','.join(ports)}"
    if found["query"]:
        query += f"&{found['query']}"
    return f"{found['scheme']}{found['user'] or ''}{found['path'] or '/'}?{query}"
