"""The encryption keys that this process has: where they come from, and which one is active.

A process gets its keys from SLM_ENCRYPTION_KEYS, from the command SLM_ENCRYPTION_KEY_COMMAND, or
from the data directory; the database names the active one by its fingerprint and never contains a
key. Knows no API key and no HTTP.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr
from sqlalchemy import Connection, insert, select

from slm.common.environment import decoded
from slm.errors import ConfigurationError, EncryptionKeyMissing, StartupError
from slm.server.db import state
from slm.server.db.database import Database
from slm.server.db.tables import ENCRYPTION_KEYS, STATE, utc_now
from slm.server.encryption.secret_files import read_private
from slm.server.encryption.vault import Vault, parse_keys
from slm.server.security.audit import AuditEvent, Who, append
from slm.server.settings import Settings

logger = logging.getLogger(__name__)

KEY_FILE: Final = "encryption.key"

_ORDINARY: Final = frozenset(
    ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "XDG_RUNTIME_DIR")
)
_SECRET_PREFIXES: Final = ("SLM_", "AUTOBOT_")

_ACTIVE: Final = select(ENCRYPTION_KEYS.c.fingerprint).where(ENCRYPTION_KEYS.c.is_active)
_VERSION: Final = select(STATE.c.keyring_version).where(STATE.c.id == 1)


class KeySource(enum.StrEnum):
    """Where this process gets its encryption keys from."""

    ENVIRONMENT = "environment"
    COMMAND = "command"
    FILE = "file"


@dataclass(frozen=True)
class KeysAtHand:
    """The keys that a source returned; a file may contain none yet."""

    source: KeySource
    keys: Sequence[SecretStr]


def read_keys(settings: Settings, notes: list[str] | None = None) -> KeysAtHand:
    """Return the encryption keys that the settings specify; a missing file means no keys.

    Args:
        settings: encryption_keys, encryption_key_command and data_dir are used.
        notes: gets a sentence if other users can read the file.

    Raises:
        StartupError: they cannot be read, or are not Fernet keys; the message has none of them.
    """
    if settings.encryption_keys is not None:
        text = settings.encryption_keys.get_secret_value()
        return KeysAtHand(KeySource.ENVIRONMENT, _parsed(text, "SLM_ENCRYPTION_KEYS"))
    if settings.encryption_key_command is not None:
        text = _output_of(
            settings.encryption_key_command,
            settings.key_command_seconds,
            _environment(settings.encryption_key_command_env),
        )
        name = "What SLM_ENCRYPTION_KEY_COMMAND prints"
        return KeysAtHand(KeySource.COMMAND, _parsed(text, name))
    path = key_file(settings)
    content = read_private(path, [] if notes is None else notes)
    if content is None:
        return KeysAtHand(KeySource.FILE, [])
    return KeysAtHand(KeySource.FILE, _parsed(content, str(path)))


def key_file(settings: Settings) -> Path:
    """Return the path of the data directory's keys."""
    return settings.data_dir / KEY_FILE


def _parsed(text: str, name: str) -> list[SecretStr]:
    keys = parse_keys(text)
    try:
        Vault(keys)
    except ConfigurationError as error:
        raise StartupError(f"{name} cannot be used: {error}.") from None
    return keys


def _environment(wanted: Sequence[str]) -> dict[str, str]:
    """Return the command's environment: what any program needs, and what the operator names."""

    def is_wanted(name: str) -> bool:
        if name.upper().startswith(_SECRET_PREFIXES):
            return False
        return name in _ORDINARY or any(
            name == each or (each.endswith("*") and name.startswith(each[:-1]))
            for each in (*wanted, "LC_*")
        )

    return {name: value for name, value in os.environ.items() if is_wanted(name)}


def _output_of(command: str, seconds: float, environment: Mapping[str, str]) -> str:
    """Run the operator's command, without a shell, and return what it prints."""
    try:
        done = subprocess.run(  # noqa: S603 - what the setting is for # nosec B603
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            env=environment,
            capture_output=True,
            timeout=seconds,
            check=True,
        )
        return decoded(done.stdout)
    except subprocess.TimeoutExpired:
        why = f"it took longer than {seconds:g} s"
    except subprocess.CalledProcessError as error:
        # Its output may contain a key.
        why = f"it ended with {error.returncode}"
    except UnicodeDecodeError:
        why = "what it prints is not text"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not a command"
    raise StartupError(f"SLM_ENCRYPTION_KEY_COMMAND cannot be used: {why}.") from None


def register(connection: Connection, vault: Vault, who: Who) -> list[str]:
    """Add each key that the database does not know yet; this makes no key active.

    If the database knows none, the first one becomes active, and the others are treated as older: a
    rotation never moves to them by itself.

    Returns:
        What needs the operator's attention: a configured key that was pruned.
    """
    known = {
        row.fingerprint: row
        for row in connection.execute(
            select(ENCRYPTION_KEYS.c.fingerprint, ENCRYPTION_KEYS.c.retired_at)
        )
    }
    now = utc_now()
    for name in vault.fingerprints:
        if name not in known:
            connection.execute(
                insert(ENCRYPTION_KEYS).values(
                    fingerprint=name,
                    check_token=vault.make_check_of(name),
                    is_active=not known and name == vault.fingerprints[0],
                    created_at=now,
                )
            )
            append(connection, AuditEvent(who, "encryption_key.add", detail={"fingerprint": name}))
    if not known.keys() >= set(vault.fingerprints):
        state.bump_keyring(connection)
    pruned = [n for n in vault.fingerprints if n in known and known[n].retired_at is not None]
    return [
        f"The encryption key {name} was pruned and need not be given any more." for name in pruned
    ]


class Keyring:
    """This process's vault, kept in line with what the database says about the keys.

    A write calls `follow` in its own transaction, which holds the state row. So once a key has been
    made active and committed, no replica encrypts a row with another one.

    Args:
        vault: its keys are replaced and activated here.
        read: reads the keys from their source again; may raise StartupError.
    """

    def __init__(self, vault: Vault, read: Callable[[], Sequence[SecretStr]]) -> None:
        self.vault = vault
        self._read = read
        self._version = -1
        self._lock = threading.Lock()

    def follow(self, connection: Connection, version: int | None = None) -> None:
        """Activate the key that the database names; costs nothing while nothing has changed.

        Args:
            connection: of the transaction in which rows are encrypted or decrypted next.
            version: the state row's keyring_version in this transaction; None: it is read here.

        Raises:
            EncryptionKeyMissing: this process does not have that key.
        """
        if version is None:
            version = connection.execute(_VERSION).scalar_one()
        if version != self._version:
            self._activate(connection.execute(_ACTIVE).scalar_one(), version)

    async def load(self) -> None:
        """Read the source again, whatever the database knows."""
        # Not in the database's thread: a command may be slow.
        await asyncio.to_thread(self._reload)

    async def refresh(self, database: Database) -> None:
        """Read the source again if the database knows of a key that is missing here.

        Raises:
            EncryptionKeyMissing: the active key is missing there too.
            DatabaseUnavailable: the database does not answer.
        """
        known, active, version = await database.read(_known)
        if not known <= set(self.vault.fingerprints):
            await self.load()
        self._activate(active, version)

    def _activate(self, active: str, version: int) -> None:
        with self._lock:
            if not self.vault.activate(active):
                raise EncryptionKeyMissing(
                    f"This server does not have the encryption key {active}, which is in use now."
                )
            self._version = version

    def _reload(self) -> None:
        try:
            keys = self._read()
        except StartupError as error:
            logger.error("%s The keys of before stay in use.", error)
            return
        with self._lock:
            if keys and not self.vault.has(keys):
                self.vault.replace(keys)
                names = ", ".join(self.vault.fingerprints)
                logger.info("the encryption keys were read again: %s", names)


def _known(connection: Connection) -> tuple[set[str], str, int]:
    """Return the keys that are not pruned, the active one, and the version that this applies to."""
    wanted = select(ENCRYPTION_KEYS.c.fingerprint).where(ENCRYPTION_KEYS.c.retired_at.is_(None))
    known = set(connection.execute(wanted).scalars())
    return (
        known,
        connection.execute(_ACTIVE).scalar_one(),
        connection.execute(_VERSION).scalar_one(),
    )


def newest_inactive(connection: Connection) -> str | None:
    """Return the fingerprint of the key that a rotation would move to, or None if there is none."""
    rows = connection.execute(
        select(ENCRYPTION_KEYS).where(ENCRYPTION_KEYS.c.retired_at.is_(None))
    ).all()
    active = next(row for row in rows if row.is_active)
    newer = [row for row in rows if row.created_at > active.created_at]
    return max(newer, key=lambda row: row.created_at).fingerprint if newer else None
