"""The last known good configuration on disk, for a backend that starts while the SLM is down.

The file has mode 0600 and is replaced atomically. It contains keys only if a cache key encrypts it;
then it is a single Fernet token, so that no one can redirect an encrypted key to another endpoint.
If anything is wrong with the file, it is ignored with a warning. Knows no socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from slm.client.cache.snapshot import ReceivedAgent
from slm.client.config import ResolvedConfig
from slm.client.runtime.log import quiet_logger
from slm.common.files import NotTrusted, read_own
from slm.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = quiet_logger("slm.client")

_Signature = tuple[int, int, int] | None
_LOCK_SECONDS: Final = 2.0
_LOOK_SECONDS: Final = 0.005

FORMAT: Final = 1
"""The version that is written, and the only one that is read."""

MAX_FILE_BYTES: Final = 256 * 1024 * 1024


class Contents(NamedTuple):
    """What is saved: every complete config and their position.

    Attributes:
        entries: each config with its is_default and is_active.
        epoch: the database's epoch.
        revision: the entries are complete up to this revision.
        complete: whether all entries are there, so that a client may resume from `revision`.
        change_id: the change at `revision`, so that a different change there is not resumed from.
        epoch_since: when that epoch was first seen, in seconds since 1970; None for now.
    """

    entries: Sequence[tuple[ResolvedConfig, bool, bool]]
    epoch: str
    revision: int
    complete: bool
    change_id: str | None = None
    epoch_since: float | None = None


class Loaded(BaseModel):
    """The contents of the file."""

    model_config = ConfigDict(defer_build=True)

    epoch: str
    revision: int
    complete: bool
    saved_at: float
    agents: list[ReceivedAgent]
    change_id: str | None = None
    epoch_since: float | None = None

    @property
    def age_seconds(self) -> float:
        """How long ago it was written; 0 if the wall clock was set back since."""
        return max(0.0, time.time() - self.saved_at)

    @property
    def epoch_age_seconds(self) -> float:
        """How long ago its epoch was first seen; at least as long as the file's age."""
        since = self.saved_at if self.epoch_since is None else self.epoch_since
        return max(self.age_seconds, time.time() - since)

    def is_newer_than(self, contents: Contents) -> bool:
        """Whether the file must not be replaced, because another process saved later data.

        Epochs have no order, so the one first seen later wins. If the clock was set back since the
        file was written, this cannot be decided, and the file is replaced.
        """
        if self.epoch == contents.epoch:
            mine = contents.revision, contents.complete
            return (self.revision, self.complete) > mine
        if self.saved_at > time.time() or contents.epoch_since is None:
            return False
        return (self.epoch_since or self.saved_at) > contents.epoch_since


class Refused(Exception):
    """Why the file is not used; never includes its content."""


class SnapshotFile:
    """Reads and writes one snapshot file, which several processes may share.

    Args:
        path: the file; its folder must exist.
        key: a Fernet key that encrypts it; without one, the file contains no API key.

    Raises:
        ConfigurationError: `key` is not a Fernet key.
    """

    def __init__(self, path: str | os.PathLike[str], key: str | SecretStr | None = None) -> None:
        self.path = Path(path)
        self._written: _Signature | None = None
        self._encrypt: Callable[[bytes], bytes] | None = None
        self._decrypt: Callable[[bytes], bytes] | None = None
        if key is None:
            return
        # Imported here so that a client without a cache key starts faster.
        from cryptography.fernet import Fernet, InvalidToken

        try:
            fernet = Fernet(key.get_secret_value() if isinstance(key, SecretStr) else key)
        except ValueError:
            raise ConfigurationError("cache_key must be a Fernet key") from None

        def decrypt(token: bytes) -> bytes:
            try:
                return fernet.decrypt(token)
            except InvalidToken:
                raise Refused("cache_key does not decrypt it") from None

        self._encrypt, self._decrypt = fernet.encrypt, decrypt

    def load(self) -> Loaded | None:
        """Return the file's content, or None if there is none or it cannot be trusted."""
        try:
            return self._load()
        except FileNotFoundError:
            return None
        except Refused as reason:
            _log.warning("the snapshot file %s is ignored: %s", self.path, reason)
        except OSError as error:
            _log.warning("the snapshot file %s is ignored: %s", self.path, error.strerror)
        return None

    def save(self, contents: Contents) -> None:
        """Replace the file, unless another process has written something newer.

        A failure is logged as a warning, since the backend can continue without the file.
        """
        try:
            with _locked(self.path.parent):
                if not self._is_newer_than(contents):
                    self._replace(self._encoded(contents))
                    self._written = _signature(self.path)
        except OSError as error:
            _log.warning("the snapshot file %s was not written: %s", self.path, error.strerror)
        except Exception as error:
            # Whatever is wrong with this data, the next save must still run.
            what = type(error).__name__
            _log.error("the snapshot file %s was not written: %s", self.path, what)

    def _is_newer_than(self, contents: Contents) -> bool:
        if self._written is not None and self._written == _signature(self.path):
            return False  # ours, and what is saved now is later
        try:
            return self._load().is_newer_than(contents)
        except (Refused, OSError):
            return False  # an unusable file may be replaced

    def _load(self) -> Loaded:
        try:
            raw, mode = read_own(self.path, MAX_FILE_BYTES)
        except NotTrusted as error:
            raise Refused(str(error)) from None
        if os.name == "posix" and mode & 0o077:
            raise Refused("others may read or change it; its mode must be 0600")
        try:
            envelope = json.loads(raw)
            version = envelope["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused("it is corrupt or cut short") from None
        if version != FORMAT:
            raise Refused("another version of this package wrote it")
        try:
            encrypted = envelope["is_encrypted"] is True
            body = envelope["body"].encode()
            digest = envelope["sha256"]
        except (KeyError, AttributeError):
            raise Refused("it is corrupt") from None
        if digest != hashlib.sha256(body).hexdigest():
            raise Refused("it is corrupt: its checksum does not match")
        if encrypted:
            if self._decrypt is None:
                raise Refused("it is encrypted, and no cache_key is given")
            body = self._decrypt(body)
        try:
            return Loaded.model_validate_json(body)
        except ValidationError:
            raise Refused("it does not hold what this version expects") from None

    def _encoded(self, contents: Contents) -> bytes:
        with_keys = self._encrypt is not None
        body = json.dumps(
            {
                "epoch": contents.epoch,
                "revision": contents.revision,
                "change_id": contents.change_id,
                "epoch_since": contents.epoch_since or time.time(),
                "complete": contents.complete,
                "saved_at": time.time(),
                "agents": [_row(*entry, with_key=with_keys) for entry in contents.entries],
            },
            separators=(",", ":"),
        ).encode()
        if self._encrypt is not None:
            body = self._encrypt(body)
        return json.dumps(
            {
                "format": FORMAT,
                "sha256": hashlib.sha256(body).hexdigest(),
                "is_encrypted": with_keys,
                "body": body.decode(),
            }
        ).encode()

    def _replace(self, raw: bytes) -> None:
        """Write a new file and rename it: readers see the old file or the new one, never half."""
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:  # mkstemp made it 0600
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        if os.name == "posix":
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _signature(path: Path) -> _Signature:
    """Return what distinguishes a file from one that another process puts in its place."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder, so that no one else acts between reading a file and replacing it.

    Continues without a lock if the file system has none or another process holds it for long: at
    worst the newest state is lost, and the next change saves it again.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < until:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOOK_SECONDS)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


class Saver:
    """Saves a while after a change, so that a burst of changes is one write.

    Args:
        file: the file to write.
        interval_seconds: how long to wait for more changes.
        contents: returns what to save, or None if nothing can be resumed from.
    """

    def __init__(
        self, file: SnapshotFile, interval_seconds: float, contents: Callable[[], Contents | None]
    ) -> None:
        self._file = file
        self._interval_seconds = interval_seconds
        self._contents = contents
        self._closing = asyncio.Event()
        self._changed = False
        self._task: asyncio.Task[None] | None = None

    def soon(self) -> None:
        """Save within the interval; must be called in the event loop."""
        self._changed = True
        if self._task is None and not self._closing.is_set():
            self._task = asyncio.get_running_loop().create_task(self._save_later())

    async def close(self) -> None:
        """Save any unsaved changes now, and stop."""
        self._closing.set()
        if self._task is not None:
            await self._task
        await self._save()

    async def _save_later(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval_seconds):
                await self._closing.wait()
        saved = await self._save()
        self._task = None
        if saved and self._changed:
            self.soon()

    async def _save(self) -> bool:
        contents = self._contents() if self._changed else None
        if contents is None:
            return False
        self._changed = False
        try:
            # fsync can take arbitrarily long.
            await asyncio.get_running_loop().run_in_executor(None, self._file.save, contents)
        except RuntimeError:
            self._file.save(contents)  # at interpreter shutdown no thread can be started
        return True


def _row(
    config: ResolvedConfig, is_default: bool, is_active: bool, *, with_key: bool
) -> dict[str, Any]:
    key = config.llm_api_key if with_key else None
    return {
        "agent_id": config.agent_id,
        "llm_provider": config.llm_provider,
        "llm_endpoint": config.llm_endpoint,
        "llm_model": config.llm_model,
        "llm_api_key": key and key.get_secret_value(),
        "llm_timeout": config.llm_timeout,
        "llm_temperature": config.llm_temperature,
        "llm_max_tokens": config.llm_max_tokens,
        "llm_options": dict(config.llm_options),
        "is_default": is_default,
        "is_active": is_active,
        "revision": config.revision,
        "api_key_revision": config.api_key_revision,
        "has_api_key": config.api_key_revision is not None,
    }
