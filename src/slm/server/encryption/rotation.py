"""Moves to another encryption key without a gap: add, rotate, re-encrypt, prune.

The database names the active key and no replica ever encrypts with another one (`Keyring.follow`),
so each step can be interrupted anywhere and run again. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy import Connection, bindparam, select, update

from slm.errors import Conflict, KeysNotReady, StartupError
from slm.server.db import state
from slm.server.db.database import Database
from slm.server.db.leases import Lease, ReplicaInfo, replicas
from slm.server.db.tables import AGENTS, ENCRYPTION_KEYS, STATE, utc_now
from slm.server.encryption.keyring import (
    Keyring,
    KeySource,
    key_file,
    newest_inactive,
    read_keys,
    register,
)
from slm.server.encryption.secret_files import replace_private
from slm.server.encryption.vault import Vault, fingerprint
from slm.server.security.audit import AuditEvent, Who, append, reseal
from slm.server.security.audit_reader import ends
from slm.server.settings import Settings

_ENCRYPTED: Final = (
    select(AGENTS.c.id, AGENTS.c.llm_api_key_encrypted, AGENTS.c.key_state)
    .where((AGENTS.c.llm_api_key_encrypted != "") | AGENTS.c.key_state.is_not(None))
    .order_by(AGENTS.c.id)
)
_REPLACE: Final = (
    update(AGENTS)
    .where(AGENTS.c.id == bindparam("row_id"))
    .values(llm_api_key_encrypted=bindparam("token"), key_state=bindparam("mark"))
)
_PAGE: Final = 500


@dataclass(frozen=True)
class KeyInfo:
    """One encryption key, as the database knows it.

    Attributes:
        fingerprint: its name, which reveals nothing about it.
        is_active: whether it encrypts.
        created_at: when it was added to the database.
        retired_at: when it was pruned; None if it was not.
        rows: how many agents' keys need it.
        here: whether this replica has it.
    """

    fingerprint: str
    is_active: bool
    created_at: datetime
    retired_at: datetime | None
    rows: int
    here: bool


@dataclass(frozen=True)
class KeyStatus:
    """All keys and all replicas.

    Attributes:
        source: where this replica gets its keys from.
        keys: in the order in which they were added to the database.
        unreadable: how many agents' keys none of this replica's keys decrypts.
        replicas: every server process that reported.
    """

    source: KeySource
    keys: list[KeyInfo]
    unreadable: int
    replicas: list[ReplicaInfo]


@dataclass(frozen=True)
class Progress:
    """How far a re-encryption has got.

    Attributes:
        last_id: the last row it has processed, after which the next step continues. None: it is
            complete.
        changed: how many rows this step re-encrypted.
    """

    last_id: int | None
    changed: int


class KeyRotation:
    """The steps of a rotation; each is one request."""

    def __init__(
        self, settings: Settings, database: Database, keyring: Keyring, lease: Lease
    ) -> None:
        self._settings = settings
        self._database = database
        self._keyring = keyring
        self._lease = lease
        self._file_lock = asyncio.Lock()

    @property
    def _vault(self) -> Vault:
        return self._keyring.vault

    @property
    def source(self) -> KeySource:
        """Where this replica gets its keys from."""
        if self._settings.encryption_keys is not None:
            return KeySource.ENVIRONMENT
        if self._settings.encryption_key_command is not None:
            return KeySource.COMMAND
        return KeySource.FILE

    async def status(self) -> KeyStatus:
        """Count which key every row needs; in pages, so that nobody has to wait for it."""
        rows, unreadable = await self._count()

        def read(connection: Connection) -> tuple[Sequence[Any], list[ReplicaInfo]]:
            keys = select(ENCRYPTION_KEYS).order_by(
                ENCRYPTION_KEYS.c.created_at, ENCRYPTION_KEYS.c.fingerprint
            )
            found = replicas(connection, self._settings.lease_seconds)
            return connection.execute(keys).all(), found

        keys, processes = await self._database.read(read)
        infos = [
            KeyInfo(
                fingerprint=key.fingerprint,
                is_active=key.is_active,
                created_at=key.created_at,
                retired_at=key.retired_at,
                rows=rows[key.fingerprint],
                here=key.fingerprint in self._vault.fingerprints,
            )
            for key in keys
        ]
        return KeyStatus(self.source, infos, unreadable, processes)

    async def add(self, *, who: Who) -> str:
        """Create a key in the data directory, which this server can decrypt with; return its name.

        If keys come from the environment or a command, the operator adds them there.

        Raises:
            Conflict: the keys are not in the data directory.
        """
        # Before the file is touched, which no transaction can undo.
        await self._database.read(who.require_counts)
        if self.source is not KeySource.FILE:
            raise Conflict(
                "The encryption keys are not in the data directory; add it where they are."
            )
        made = Vault.generate_key()
        name = fingerprint(made.get_secret_value())
        async with self._file_lock:
            # The file first: a key that the database knows of must never be lost.
            self._vault.replace(await asyncio.to_thread(self._rewrite, lambda keys: [*keys, made]))
        await self._register(who)
        await self._lease.renew()
        return name

    async def _register(self, who: Who) -> None:
        """Add every key of this server that the database does not know yet."""

        def work(connection: Connection) -> None:
            _lock_state(connection, who)
            register(connection, self._vault, who)

        await self._database.run(work)

    async def rotate(self, wanted: str | None, *, who: Who) -> str:
        """Make a key active: once committed, it encrypts every write on every replica.

        Args:
            wanted: its fingerprint; None: the newest, or the active one again if there is none.
            who: who requests it.

        Returns:
            The fingerprint of the active key.

        Raises:
            KeysNotReady: a live replica does not have it, or the database does not know it. The
                other replicas read their keys again within a third of their lease.
        """
        # The command may print a new key by now.
        await self._keyring.load()
        await self._register(who)
        await self._lease.renew()

        def work(connection: Connection) -> str:
            _lock_state(connection, who)
            keys = {key.fingerprint: key for key in connection.execute(select(ENCRYPTION_KEYS))}
            active: str = next(name for name, key in keys.items() if key.is_active)
            name: str = wanted or newest_inactive(connection) or active
            if name == active:
                return active
            if name not in keys or keys[name].retired_at is not None:
                raise KeysNotReady("No key of this fingerprint was added, or it was pruned.")
            _require_everywhere(name, replicas(connection, self._settings.lease_seconds))
            for fingerprint_, is_active in ((active, False), (name, True)):
                connection.execute(
                    update(ENCRYPTION_KEYS)
                    .where(ENCRYPTION_KEYS.c.fingerprint == fingerprint_)
                    .values(is_active=is_active)
                )
            state.bump_keyring(connection)
            detail = {"fingerprint": name, "before": active}
            append(connection, AuditEvent(who, "encryption_key.rotate", detail=detail))
            return name

        name = await self._database.run(work)
        await self._keyring.refresh(self._database)
        return name

    async def reencrypt(self, after_id: int, limit: int, *, who: Who) -> Progress:
        """Re-encrypt some rows under the active key, without changing their revisions.

        Args:
            after_id: rows up to here are done.
            limit: how many rows to process, in one short transaction.
            who: who requests it.
        """

        def work(connection: Connection) -> Progress:
            self._keyring.follow(connection, _lock_state(connection, who))
            rows = connection.execute(_ENCRYPTED.where(AGENTS.c.id > after_id).limit(limit)).all()
            changed = 0
            for row in rows:
                token = self._vault.reencrypt(str(row.llm_api_key_encrypted))
                mark = self._vault.reencrypt(str(row.key_state))
                if token or mark:
                    changed += 1
                    values = {
                        "row_id": row.id,
                        "token": token or row.llm_api_key_encrypted,
                        "mark": mark or row.key_state,
                    }
                    connection.execute(_REPLACE, values)
            detail = {"after_id": after_id, "rows": len(rows), "changed": changed}
            append(connection, AuditEvent(who, "encryption_key.reencrypt", detail=detail))
            if len(rows) == limit:
                return Progress(rows[-1].id, changed)
            return Progress(None, changed + reseal(connection, self._vault.reencrypt))

        return await self._database.run(work)

    async def prune(self, *, who: Who) -> list[str]:
        """Retire every key but the active one; return their names.

        Raises:
            KeysNotReady: a row still needs one of them.
        """
        version, active, unretired = await self._database.read(_ring_of)
        rows, unreadable = await self._count()
        elsewhere = sorted(unretired - set(self._vault.fingerprints))
        if elsewhere and unreadable:
            # The rows that need them cannot be counted here.
            raise KeysNotReady(
                f"{unreadable} stored keys cannot be read here, and this server does not have the"
                f" encryption key {', '.join(elsewhere)}; give it to this server first."
            )
        needed = sorted(set(rows) - {active})
        if needed:
            raise KeysNotReady(
                f"{sum(rows[name] for name in needed)} stored keys still need the encryption key"
                f" {', '.join(needed)}; run the rotation again, which re-encrypts them."
            )

        def work(connection: Connection) -> list[str]:
            if _lock_state(connection, who) != version:
                raise KeysNotReady("The encryption keys changed just now; try again.")
            old = select(ENCRYPTION_KEYS.c.fingerprint).where(
                ENCRYPTION_KEYS.c.is_active.is_(False), ENCRYPTION_KEYS.c.retired_at.is_(None)
            )
            names = sorted(connection.execute(old).scalars())
            if names:
                retire = update(ENCRYPTION_KEYS).where(ENCRYPTION_KEYS.c.fingerprint.in_(names))
                connection.execute(retire.values(retired_at=utc_now()))
                state.bump_keyring(connection)
                detail = {"fingerprints": names}
                append(connection, AuditEvent(who, "encryption_key.prune", detail=detail))
            return names

        names = await self._database.run(work)
        if self.source is KeySource.FILE:
            await self._drop_from_file()
        return names

    async def _drop_from_file(self) -> None:
        """Keep in the file only what is not retired, including keys that nobody knows of yet."""
        retired = await self._database.read(
            lambda connection: set(
                connection.execute(
                    select(ENCRYPTION_KEYS.c.fingerprint).where(
                        ENCRYPTION_KEYS.c.retired_at.is_not(None)
                    )
                ).scalars()
            )
        )

        def drop(keys: Sequence[SecretStr]) -> list[SecretStr]:
            return [k for k in keys if fingerprint(k.get_secret_value()) not in retired]

        async with self._file_lock:
            self._vault.replace(await asyncio.to_thread(self._rewrite, drop))

    def _rewrite(self, change: Callable[[Sequence[SecretStr]], list[SecretStr]]) -> list[SecretStr]:
        try:
            before = read_keys(self._settings).keys
            after = change(before)
            if len(after) != len(before):
                text = "".join(f"{key.get_secret_value()}\n" for key in after)
                replace_private(key_file(self._settings), text)
        except StartupError as error:
            raise Conflict(str(error)) from None
        return after

    async def _count(self) -> tuple[Counter[str], int]:
        """Return how many rows need each key, and how many no key of this replica decrypts."""
        rows: Counter[str] = Counter()
        unreadable, after_id = 0, 0
        while True:
            page = _ENCRYPTED.where(AGENTS.c.id > after_id).limit(_PAGE)
            found = await self._database.read(lambda c, page=page: c.execute(page).all())  # type: ignore[misc]
            names, lost = await asyncio.to_thread(_needed, self._vault, found)
            rows.update(names)
            unreadable += lost
            if len(found) < _PAGE:
                break
            after_id = found[-1].id
        # One of them seals the audit's cut.
        seal = (await self._database.read(ends)).seal
        if seal is not None and (name := self._vault.key_of(seal)) is not None:
            rows[name] += 1
        return rows, unreadable


def _lock_state(connection: Connection, who: Who) -> int:
    """Lock the state row and return the key ring's version; the caller must still be authorized.

    Raises:
        Unauthorized: the token is no longer valid.
    """
    locked = state.lock(connection)
    who.require_counts(connection, locked.tokens_version)
    return locked.keyring_version


def _ring_of(connection: Connection) -> tuple[int, str, set[str]]:
    """Return the key ring's version, the active key, and every key that is not pruned."""
    version = connection.execute(select(STATE.c.keyring_version).where(STATE.c.id == 1))
    keys = connection.execute(
        select(ENCRYPTION_KEYS).where(ENCRYPTION_KEYS.c.retired_at.is_(None))
    ).all()
    active = next((key.fingerprint for key in keys if key.is_active), "")
    return version.scalar_one(), active, {key.fingerprint for key in keys}


def _needed(vault: Vault, rows: Sequence[Any]) -> tuple[Counter[str], int]:
    names: Counter[str] = Counter()
    unreadable = 0
    for row in rows:
        needed = {vault.key_of(str(t)) for t in (row.llm_api_key_encrypted, row.key_state) if t}
        unreadable += None in needed
        names.update(name for name in needed if name is not None)
    return names, unreadable


def _require_everywhere(name: str, processes: Sequence[ReplicaInfo]) -> None:
    without = [p for p in processes if p.live and name not in p.fingerprints]
    if without:
        told = ", ".join(f"{p.name} (heard {p.seconds_since_seen:.0f} s ago)" for p in without)
        raise KeysNotReady(
            f"These servers do not have the key {name} yet: {told}. Give it to each of them, or"
            " stop them and wait for their leases to run out."
        )
