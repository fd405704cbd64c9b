"""The last known good file: what is in it, who may read it, and what is ignored."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from slm.client.cache.snapshot_file import Contents, SnapshotFile
from slm.client.config import ResolvedConfig, Step
from slm.errors import ConfigurationError

CANARY = "sk-canary-file"
KEY = Fernet.generate_key().decode()


def config(agent_id: str, **fields: Any) -> ResolvedConfig:
    values: dict[str, Any] = {"llm_provider": "openai", "llm_model": "m", "revision": 7} | fields
    return ResolvedConfig(agent_id=agent_id, step=Step.AGENT, **values)


CONTENTS = Contents(
    [
        (config("plain", llm_options={"seed": 1}), False, True),
        (config("keyed", llm_api_key=SecretStr(CANARY), api_key_revision=5), True, True),
    ],
    epoch="e1",
    revision=9,
    complete=True,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last-known-good.json"


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_what_was_saved_is_loaded(path: Path, key: str | None) -> None:
    """Every field comes back; the API key only where a cache key encrypts it."""
    file = SnapshotFile(path, key)
    file.save(CONTENTS)
    loaded = file.load()
    assert loaded is not None
    assert (loaded.epoch, loaded.revision, loaded.complete) == ("e1", 9, True)
    assert 0 <= loaded.age_seconds < 60
    plain, keyed = loaded.agents
    assert (plain.agent_id, plain.llm_options, plain.revision) == ("plain", {"seed": 1}, 7)
    assert (keyed.is_default, keyed.api_key_revision, keyed.has_api_key) == (True, 5, True)
    secret = keyed.llm_api_key
    assert (secret and secret.get_secret_value()) == (CANARY if key else None)


@pytest.mark.parametrize("temperature", [None, 0.0, 0.7])
def test_a_temperature_comes_back_as_it_was(path: Path, temperature: float | None) -> None:
    """A number, as every file of before has one, or none at all."""
    entry = (config("a", llm_temperature=temperature), True, True)
    SnapshotFile(path).save(Contents([entry], "e1", 9, complete=True))
    loaded = SnapshotFile(path).load()
    assert loaded is not None
    assert loaded.agents[0].llm_temperature == temperature


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_no_api_key_is_in_the_file_in_the_clear(path: Path, key: str | None) -> None:
    """Nobody who reads the file reads a key, and others cannot read it at all."""
    SnapshotFile(path, key).save(CONTENTS)
    assert CANARY.encode() not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_the_file_is_replaced_and_never_changed(path: Path) -> None:
    """Whoever has the old file open goes on reading the whole old file."""
    file = SnapshotFile(path)
    file.save(CONTENTS)
    with path.open("rb") as reader:
        before = path.read_bytes()
        file.save(Contents([], "e1", 10, complete=True))
        assert reader.read() == before
    loaded = file.load()
    assert loaded is not None
    assert loaded.revision == 10


def test_no_file_is_no_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first start of all says nothing about a file that cannot be there yet."""
    assert SnapshotFile(path).load() is None
    assert not caplog.records


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_a_file_that_others_may_touch_is_ignored(
    path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A world-readable or writable file is not believed, and the warning says why."""
    file = SnapshotFile(path)
    file.save(CONTENTS)
    path.chmod(mode)
    assert file.load() is None
    assert "0600" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are a matter of POSIX")
@pytest.mark.parametrize("what", ["fifo", "folder", "device"])
def test_what_is_no_file_holds_nobody_up(
    path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A FIFO, a folder or a device where the file should be is ignored at once."""
    if what == "fifo":
        os.mkfifo(path, 0o600)
    elif what == "folder":
        path.mkdir(0o700)
    else:
        path.symlink_to("/dev/zero")
    assert SnapshotFile(path).load() is None
    assert "is ignored" in caplog.text


def test_a_file_of_another_version_is_ignored(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a newer package wrote is left alone."""
    path.write_text(json.dumps({"format": 2, "whatever": []}))
    path.chmod(0o600)
    assert SnapshotFile(path).load() is None
    assert "another version" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 1, "is_encrypted": false, "body": 7, "sha256": ""}',
        "[" * 100_000,
    ],
)
def test_a_file_that_is_no_snapshot_is_ignored(
    path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Corrupt in whatever way: a warning, and the backend starts."""
    path.write_text(text)
    path.chmod(0o600)
    assert SnapshotFile(path).load() is None
    assert "is ignored" in caplog.text


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@given(
    cut=st.booleans(),
    where=st.floats(0, 1, exclude_max=True),
    damage=st.binary(min_size=1, max_size=3),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_damaged_file_is_ignored_wherever_the_damage_is(
    path: Path, key: str | None, cut: bool, where: float, damage: bytes
) -> None:
    """Cut short or changed in any byte, the file is what it was or nothing."""
    file = SnapshotFile(path, key)
    file.save(CONTENTS)
    whole = path.read_bytes()
    place = int(where * len(whole))
    damaged = whole[:place] if cut else whole[:place] + damage + whole[place + 1 :]
    path.write_bytes(damaged)
    loaded = file.load()
    path.write_bytes(whole)
    assert loaded is None or loaded == file.load()


@pytest.mark.parametrize("key", [None, Fernet.generate_key().decode()], ids=["plain", "encrypted"])
def test_an_encrypted_file_needs_its_key(
    path: Path, key: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the cache key, or with another one, the file is ignored."""
    SnapshotFile(path, KEY).save(CONTENTS)
    assert SnapshotFile(path, key).load() is None
    assert "cache_key" in caplog.text


def test_a_cache_key_that_is_none_is_named() -> None:
    """A cache key of the wrong form is told at once, without being shown."""
    with pytest.raises(ConfigurationError, match="cache_key") as caught:
        SnapshotFile("x", "canary")
    assert "canary" not in str(caught.value)


def test_a_disk_that_refuses_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the file cannot be written, the backend goes on."""
    SnapshotFile(tmp_path / "no-such-folder" / "file").save(CONTENTS)
    assert "was not written" in caplog.text


def test_a_wall_clock_that_was_set_back_makes_nothing_younger_than_now(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The age of a file is never negative, so that nothing is fresh for a day."""
    file = SnapshotFile(path)
    file.save(CONTENTS)
    loaded = file.load()
    assert loaded is not None
    monkeypatch.setattr("time.time", lambda: loaded.saved_at - 86_400)
    assert loaded.age_seconds == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_something_that_is_no_file_is_ignored(tmp_path: Path) -> None:
    """A folder in the file's place is a warning."""
    assert SnapshotFile(tmp_path).load() is None
