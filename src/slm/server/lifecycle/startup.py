"""Makes a database ready to serve: migrated, adopted, its keys checked and its first tokens made.

One transaction under one lock, so that a start that fails or is killed leaves nothing half done.
Says where a secret was written, never what it is.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy import Connection, delete, func, insert, inspect, select, text

from slm.errors import ProblemError, StartupError
from slm.server.db import state
from slm.server.db.database import Database
from slm.server.db.tables import AGENTS, ENCRYPTION_KEYS, TOKENS, utc_now
from slm.server.encryption.keyring import KeysAtHand, KeySource, key_file, read_keys, register
from slm.server.encryption.secret_files import (
    check_database_file,
    make_data_dir,
    read_private,
    write_private,
)
from slm.server.encryption.vault import Vault, fingerprint
from slm.server.lifecycle.adoption import ACTOR, Adoption, adopt
from slm.server.lifecycle.schema_check import refuse_odd_schema
from slm.server.security import tokens
from slm.server.security.audit import Who
from slm.server.settings import Settings

FIRST_TOKENS: Final = (
    ("admin", "admin.token", tokens.OPERATOR_SCOPES),
    ("backend", "backend.token", tokens.BACKEND_SCOPES),
)
MIGRATIONS: Final = Path(__file__).parents[1] / "db" / "migrations"

# Any number that nobody else uses; and how long one process waits for another's migration.
_ADVISORY_LOCK: Final = 0x51_4D_0001
_MIGRATION_WAIT_SECONDS: Final = 60

_NEEDED: Final = frozenset(c.name for c in AGENTS.c) - {
    "llm_options",
    "revision",
    "api_key_revision",
    "key_state",
}


@dataclass(frozen=True)
class PreparedDatabase:
    """A database that is ready to serve.

    Attributes:
        database: open.
        vault: with the active encryption key first.
        notes: sentences for the operator: what was created and where, and what needs attention.
    """

    database: Database
    vault: Vault
    notes: list[str] = field(default_factory=list)


async def prepare(settings: Settings) -> PreparedDatabase:
    """Open the database and make it ready; in an empty data directory create everything it needs.

    Raises:
        StartupError: it cannot be done; one sentence says why.
    """
    database = Database(
        settings.url,
        lock_timeout_seconds=settings.lock_timeout_seconds,
        idle_in_transaction_seconds=settings.idle_in_transaction_seconds,
    )
    if database.dialect == "sqlite":
        make_data_dir(settings.data_dir)
    if database.path is not None:
        check_database_file(database.path)
    # A command may be slow, so it runs before anything is locked, and outside the loop, which can
    # receive a signal meanwhile.
    at_hand = await asyncio.to_thread(read_keys, settings)
    await database.open()
    try:
        vault, notes = await database.run(
            functools.partial(_prepare, database=database, settings=settings, at_hand=at_hand)
        )
    except ProblemError as error:
        await database.close()
        raise StartupError(f"{database.name} cannot be prepared: {error.detail}") from error
    except BaseException:
        await database.close()
        raise
    database.answer_within(settings.database_timeout_seconds)
    return PreparedDatabase(database, vault, notes)


def _prepare(
    connection: Connection, *, database: Database, settings: Settings, at_hand: KeysAtHand
) -> tuple[Vault, list[str]]:
    notes: list[str] = []
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SET LOCAL lock_timeout = '{_MIGRATION_WAIT_SECONDS}s'"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
    first_time = not is_ours(connection, database.name)
    own = at_hand.source is KeySource.FILE
    keys = _own_keys(connection, database, settings, notes) if own else list(at_hand.keys)
    migrate(connection)
    # Other replicas may be writing: the state row first and the audit's last, as in every write.
    state.lock(connection)
    vault = _checked_vault(connection, keys, may_replace=own)
    notes += register(connection, vault, Who(ACTOR))
    notes += _adoption_notes(adopt(connection, vault, first_time=first_time))
    notes += _first_tokens(connection, settings.data_dir)
    return vault, notes


# --- the schema ---


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def is_ours(connection: Connection, name: str) -> bool:
    """Return whether our migrations ran here before; refuse a database they cannot run on.

    Raises:
        StartupError: a newer version made it, its table `agents` has other columns, or it contains
            something that acts by itself, such as a trigger.
    """
    refuse_odd_schema(connection, name)
    script = ScriptDirectory.from_config(_config(connection))
    known = {revision.revision for revision in script.walk_revisions()}
    heads = MigrationContext.configure(connection).get_current_heads()
    if not known.issuperset(heads):
        raise StartupError(
            f"{name} was made by a newer version of SLM than this one; install that"
            " version or restore an older backup."
        )
    inspector = inspect(connection)
    if not heads and inspector.has_table("agents"):
        missing = _NEEDED - {column["name"] for column in inspector.get_columns("agents")}
        if missing:
            raise StartupError(
                f"The table agents of {name} cannot be taken over: it has no column"
                f" {', '.join(sorted(missing))}."
            )
    return bool(heads)


def migrate(connection: Connection, revision: str = "head") -> None:
    """Migrate the tables to this version, in the transaction of the connection.

    Args:
        connection: in a transaction.
        revision: how far; a test stops earlier.
    """
    command.upgrade(_config(connection), revision)


# --- encryption keys ---


def keys_at_hand(settings: Settings) -> list[SecretStr]:
    """Return the encryption keys that a start would use, or none if it would create one."""
    return list(read_keys(settings).keys)


def _own_keys(
    connection: Connection, database: Database, settings: Settings, notes: list[str]
) -> list[SecretStr]:
    """Return the data directory's keys; create one for a SQLite file that contains no API key."""
    if database.dialect != "sqlite":
        raise StartupError(
            "An encryption key is needed: set SLM_ENCRYPTION_KEYS, the same on every server of"
            " this database, or SLM_ENCRYPTION_KEY_COMMAND."
        )
    path = key_file(settings)
    # Under the database's lock: another server may have created the file just now.
    keys = read_keys(settings, notes).keys
    if keys:
        return list(keys)
    if _holds_api_keys(connection):
        raise StartupError(
            f"{database.name} holds API keys, and the encryption key they need is not given: set"
            f" SLM_ENCRYPTION_KEYS, or put it into {path}."
        )
    key = Vault.generate_key()
    write_private(path, key.get_secret_value() + "\n")
    notes.append(f"Made an encryption key in {path}; without it the stored API keys are lost.")
    return [key]


def _holds_api_keys(connection: Connection) -> bool:
    if not inspect(connection).has_table("agents"):
        return False
    key = AGENTS.c.llm_api_key_encrypted
    return connection.execute(select(key).where(key != "").limit(1)).first() is not None


def _checked_vault(
    connection: Connection, keys: Sequence[SecretStr], *, may_replace: bool
) -> Vault:
    """Return a vault with the active key first: the one that the database names.

    Raises:
        StartupError: that key is not among those given.
    """
    active = connection.execute(
        select(ENCRYPTION_KEYS).where(ENCRYPTION_KEYS.c.is_active)
    ).one_or_none()
    names = [fingerprint(key.get_secret_value()) for key in keys]
    if active is not None and active.fingerprint in names:
        first = names.index(active.fingerprint)
        vault = Vault([keys[first], *keys[:first], *keys[first + 1 :]])
        if not vault.opens_check(active.check_token):
            raise StartupError("The database's check of its encryption key is damaged.")
        return vault
    if active is not None and not (may_replace and not _holds_api_keys(connection)):
        raise StartupError(
            f"The encryption key is the wrong one: this database uses the key with the fingerprint"
            f" {active.fingerprint}, given was {', '.join(names)}."
        )
    # The first start; or the generated key was lost, and nothing needs it.
    vault = Vault(keys)
    connection.execute(delete(ENCRYPTION_KEYS))
    return vault


def _adoption_notes(found: Adoption) -> list[str]:
    notes = []
    if found.bound:
        notes.append(f"Re-encrypted the API keys of {_names(found.bound)}, each for its endpoint.")
    if found.kept:
        notes.append(
            f"The API keys of {_names(found.kept)} do not decrypt with the encryption key given;"
            " they are kept and tried again at each start: add their key to SLM_ENCRYPTION_KEYS."
        )
    return notes


def _names(agent_ids: Sequence[str]) -> str:
    shown = ", ".join(repr(agent_id) for agent_id in agent_ids[:10])
    return shown if len(agent_ids) <= 10 else f"{shown} and {len(agent_ids) - 10} more"


# --- the first tokens ---


def _first_tokens(connection: Connection, data_dir: Path) -> list[str]:
    """Make the two tokens of a database that has none; return notes about them."""
    if connection.execute(select(func.count()).select_from(TOKENS)).scalar_one():
        return []
    make_data_dir(data_dir)
    notes: list[str] = []
    for name, file, scopes in FIRST_TOKENS:
        path = data_dir / file
        token = read_private(path, notes)
        if token is None:
            token = tokens.mint().get_secret_value()
            # Before the commit: after a start killed in between, the next uses the file's token.
            write_private(path, token + "\n")
        elif not tokens.is_well_formed(token):
            raise StartupError(f"{path} holds no token of SLM; move it away and start again.")
        connection.execute(
            insert(TOKENS).values(
                name=name,
                digest=tokens.digest(token),
                scopes=",".join(scopes),
                created_at=utc_now(),
            )
        )
        notes.append(f"The token {name} ({', '.join(scopes)}) is in {path}.")
    state.bump_tokens(connection)
    return notes
