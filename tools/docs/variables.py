"""The tables of the server's variables, from the docstring and the defaults of its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from slm.server.settings import Settings

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "address-and-data": ("host", "port", "data_dir", "database_url", "log_level"),
    "tls": ("tls_cert", "tls_key", "tls_client_ca"),
    "keys-and-endpoints": (
        "encryption_keys",
        "encryption_key_command",
        "encryption_key_command_env",
        "endpoints",
        "endpoint_allow",
    ),
    "networks-and-metrics": ("trusted_proxies", "trusted_networks", "metrics_token"),
    "retention": ("changes_keep", "audit_keep_days"),
    "limits": (
        "auth_failures_per_second",
        "auth_failures_burst",
        "writes_per_second",
        "writes_burst",
        "streams_per_token",
        "waits_per_token",
        "max_connections",
        "max_opening_streams",
        "max_snapshots",
        "buffer_bytes",
        "buffer_total_bytes",
        "max_body_bytes",
        "max_header_bytes",
        "replay_page",
    ),
    "testing": ("testing", "failpoint"),
}
"""The settings of each table; whatever is in none is in the table `timings`."""


def variable(setting: str) -> str:
    """Return the name of a setting's environment variable."""
    return f"SLM_{setting.upper()}"


def default(setting: str) -> str:
    """Return what the table says of a setting's default; nothing where there is none."""
    value = Settings.model_fields[setting].default
    if value in (None, ()):
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")
    return f"`{text}`"


def descriptions() -> dict[str, str]:
    """Return the text of each setting in the docstring, with variables in place of settings."""
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", Settings.__doc__ or "", re.MULTILINE)
    described = {name: " ".join(text.split()).removesuffix(".") for name, text in found}

    def named(match: re.Match[str]) -> str:
        return f"`{variable(match[1])}`" if match[1] in Settings.model_fields else match[0]

    return {name: re.sub(r"`([a-z_]+)`", named, text) for name, text in described.items()}


def parts() -> dict[str, str]:
    """Return the table of each group."""
    grouped = [name for names in GROUPS.values() for name in names]
    rest = [name for name in Settings.model_fields if name not in grouped]
    groups = {**GROUPS, "timings": tuple(rest)}
    return {group: _table(names) for group, names in groups.items()}


def _table(settings: tuple[str, ...]) -> str:
    described = descriptions()
    rows = [
        f"| `{variable(name)}` | {default(name)} | {described[name]} |".replace("|  |", "| |")
        for name in settings
    ]
    return "\n".join(["| variable | default | what it sets |", "|---|---|---|", *rows])
