"""A server's periodic work: its lease, its keys, and when tokens were last used.

Each of these may fail without harm and is tried again; none blocks a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from slm.errors import EncryptionKeyMissing, ProblemError
from slm.server.agents.credentials import KeyedReads
from slm.server.db.database import Database
from slm.server.db.leases import Lease
from slm.server.encryption.keyring import Keyring
from slm.server.security.token_store import TokenStore
from slm.server.security.token_table import TokenTable
from slm.server.settings import Settings
from slm.server.tasks.supervisor import Supervisor

logger = logging.getLogger(__name__)

_TRY_AGAIN_SECONDS: Final = 1.0
"""How often a database that cannot be written is tried again."""


class Caretaker:
    """Renews the lease, follows the key ring, tries the stored keys, and saves tokens' last use.

    Attributes:
        keys_usable: whether this replica has the active encryption key.
        lease: this process's row among the replicas.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        keyring: Keyring,
        reads: KeyedReads,
        tokens: TokenTable,
        token_store: TokenStore,
        supervisor: Supervisor | None = None,
    ) -> None:
        self.keys_usable = True
        self.lease = Lease(
            database,
            settings.lease_seconds,
            fingerprints=lambda: keyring.vault.fingerprints,
            tokens_version=lambda: tokens.version,
        )
        self._confirm = asyncio.Event()
        tokens.on_replaced.append(self._confirm.set)
        self._settings = settings
        self._database = database
        self._keyring = keyring
        self._reads = reads
        self._tokens = tokens
        self._token_store = token_store
        self._task = (supervisor or Supervisor()).task("caretaker", self._keep_house)

    async def start(self) -> None:
        """Take the lease and try every stored key, then continue in the background."""
        await self._renew()
        await self._check_keys()
        self._task.start()

    async def stop(self) -> None:
        """Stop, and give up the lease, so that no rotation waits for this process."""
        await self._task.stop()
        with contextlib.suppress(ProblemError):
            await self._note_used()
            await self.lease.give_up()

    async def _keep_house(self) -> None:
        loop = asyncio.get_running_loop()
        checked = noted = loop.time()
        due = loop.time() + self._settings.lease_seconds / 3
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(due, loop.time() + _TRY_AGAIN_SECONDS)):
                    await self._confirm.wait()
            try:
                if self._confirm.is_set():
                    # Someone is waiting to hear that a revoked token is refused here, too.
                    self._confirm.clear()
                    await self.lease.renew()
                if self._database.unwritable is not None:
                    # Until the database accepts writes, plain reads say that they may be stale.
                    await self._database.try_writing()
                if loop.time() < due:
                    continue
                due = loop.time() + self._settings.lease_seconds / 3
                await self._renew()
                if loop.time() - checked >= self._settings.key_check_seconds:
                    await self._check_keys()
                    checked = loop.time()
                if loop.time() - noted >= self._settings.last_used_seconds:
                    await self._note_used()
                    noted = loop.time()
            except ProblemError as error:
                logger.debug("not now: %s", error.code)
            except Exception as error:
                # Only the class: a driver's message may contain what was read.
                logger.error("the caretaker failed with %s", type(error).__name__)

    async def _renew(self) -> None:
        """Follow the key ring, then report: a report only names keys that are here already."""
        try:
            await self._keyring.refresh(self._database)
            usable = True
        except EncryptionKeyMissing as error:
            usable = False
            if self.keys_usable:
                logger.error("%s It refuses writes and key reads until it has it.", error.detail)
        self.keys_usable = usable
        await self.lease.renew()

    async def _check_keys(self) -> None:
        before = len(self._reads.undecryptable)
        with contextlib.suppress(EncryptionKeyMissing):
            await self._reads.check()
        count = len(self._reads.undecryptable)
        if count > before:
            logger.warning("%d stored API keys cannot be used; see /readyz", count)

    async def _note_used(self) -> None:
        used, self._tokens.used = self._tokens.used, {}
        if used:
            await self._token_store.note_used(used)
