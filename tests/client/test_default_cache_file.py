"""The cache file that nobody named: where it is, who shares it, and what it outlives."""

from __future__ import annotations

import random
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from fastapi import FastAPI

import slm
from slm import SLMClient, Step
from slm.client.cache import state_folder
from slm.client.cache.snapshot_file import Contents, SnapshotFile
from slm.client.cache.state_folder import default_cache_file
from tests.client.test_lifespan import serving
from tests.support.raw import Api
from tests.support.servers import InLoopServer

URL = "http://127.0.0.1:9"


def default(name: str = "billing", **other: Any) -> Path:
    """The default file of a client with this name."""
    given: dict[str, Any] = {"urls": [URL], "token_identity": "t", "cache_key": None} | other
    path = default_cache_file(given["urls"], given["token_identity"], name, given["cache_key"])
    assert path is not None
    return path


async def model_of(app: FastAPI) -> tuple[str, Step]:
    async with serving(app):
        config = await app.state.slm.resolve("billing")
        return config.llm_model, config.step


async def test_an_application_restarted_while_the_slm_is_down_has_the_last_configuration(
    server: InLoopServer, admin: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`FastAPI(lifespan=slm.lifespan(url))` and nothing else answers what it last knew."""
    monkeypatch.setenv("SLM_TOKEN", server.backend_token)
    await admin.create("billing", llm_model="last-known-good")
    hook = slm.lifespan(server.url, start_timeout=0.5)
    assert await model_of(FastAPI(lifespan=hook)) == ("last-known-good", Step.AGENT)
    await server.stop()
    try:
        assert await model_of(FastAPI(lifespan=hook)) == ("last-known-good", Step.AGENT)
        without = slm.lifespan(server.url, start_timeout=0.5, cache_file=False)
        assert (await model_of(FastAPI(lifespan=without)))[1] is Step.HARDCODED
        monkeypatch.setenv("SLM_CACHE_FILE", "off")
        assert (await model_of(FastAPI(lifespan=hook)))[1] is Step.HARDCODED
    finally:
        await server.start()
    (path,) = (tmp_path / "state" / "slm").iterdir()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_plain_client_keeps_a_file_where_it_is_asked_to(
    server: InLoopServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`SLMClient()` keeps none; `cache_file=True` and SLM_CACHE_FILE=on keep the same one."""
    folder = tmp_path / "state" / "slm"
    async with SLMClient(server.url, token=server.backend_token) as client:
        await client.resolve("default")
    assert not folder.exists()
    async with SLMClient(server.url, token=server.backend_token, cache_file=True) as client:
        await client.resolve("default")
    (path,) = folder.iterdir()
    path.unlink()
    monkeypatch.setenv("SLM_CACHE_FILE", "ON")
    async with SLMClient(server.url, token=server.backend_token) as client:
        await client.resolve("default")
    assert [*folder.iterdir()] == [path]


@pytest.mark.parametrize("home", ["missing", "no folder", "read-only"])
async def test_without_a_home_it_goes_on_without_a_file_and_says_so_once(
    server: InLoopServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    home: str,
) -> None:
    """A container without HOME, or with one that cannot be written, costs one line in the log."""
    monkeypatch.delenv("XDG_STATE_HOME")
    if home == "missing":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    elif home == "no folder":
        monkeypatch.setenv("HOME", "/dev/null")
    else:
        monkeypatch.setenv("HOME", "/proc")
    token = server.backend_token
    async with SLMClient(server.url, token=token, cache_file=True) as client:
        assert (await client.resolve("default")).step is Step.AGENT
    (said,) = [each.message for each in caplog.records if "cache file" in each.message]
    assert "SLM_CACHE_FILE=off" in said


def test_each_server_token_name_and_key_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Nobody reads what another client saved; the order of the addresses makes no difference."""
    token_file = tmp_path / "token"
    token_file.write_text("slm_one")
    key = Fernet.generate_key().decode()
    others = {
        default(),
        default("another"),
        default("billing/x"),
        default(urls=["http://127.0.0.1:10"]),
        default(token_identity="u"),
        default(cache_key=key),
    }
    assert len(others) == 6
    assert {path.parent for path in others} == {tmp_path / "state" / "slm"}
    two = ["http://127.0.0.1:10", URL]
    assert default(urls=two) == default(urls=two[::-1])
    assert not any("slm_one" in str(path) or key in str(path) for path in others)


def test_a_renewed_token_of_the_same_file_keeps_the_cache(tmp_path: Path) -> None:
    """A token file may be replaced; a token that is given alone is told apart by its hash."""
    from slm.client.transport.credentials import TokenSource

    file = tmp_path / "token"
    file.write_text("slm_one")
    before = TokenSource(token_file=file).identity
    file.write_text("slm_two")
    assert TokenSource(token_file=file).identity == before
    assert TokenSource("slm_one").identity != TokenSource("slm_two").identity
    assert "slm_one" not in TokenSource("slm_one").identity


def test_the_folder_holds_so_many_files_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients with ever new names do not fill the disk: the oldest file goes."""
    monkeypatch.setattr(state_folder, "MAX_FILES", 3)
    for number in range(6):
        default(f"pod-{number}").write_text(str(number))
    left = sorted(path.read_text() for path in default("pod-5").parent.iterdir())
    assert left == ["3", "4", "5"]


def at(revision: int, epoch: str = "e1", since: float = 1.0, complete: bool = True) -> Contents:
    return Contents([], epoch, revision, complete, None, since)


def position(path: Path) -> tuple[str, int]:
    loaded = SnapshotFile(path).load()
    assert loaded is not None
    return loaded.epoch, loaded.revision


def test_an_older_revision_never_replaces_a_newer_one(tmp_path: Path) -> None:
    """Eight clients that share the file, some far behind the others: the newest revision stays."""
    path = tmp_path / "shared.json"
    revisions = [*range(1, 401)]
    random.Random(5).shuffle(revisions)

    def follow(heard: list[int]) -> None:
        file = SnapshotFile(path)
        for revision in sorted(heard):
            file.save(at(revision))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(follow, revisions[n::8]) for n in range(8)]:
            done.result()
    assert position(path) == ("e1", 400)
    assert [*tmp_path.iterdir()] == [path], "no lock is left beside it"


def test_an_older_epoch_never_replaces_a_newer_one(tmp_path: Path) -> None:
    """A client that has not heard of a restored database yet does not bring back the old one."""
    path = tmp_path / "shared.json"
    late, prompt = SnapshotFile(path), SnapshotFile(path)
    late.save(at(50, "old", since=100.0))
    prompt.save(at(7, "new", since=200.0))
    late.save(at(51, "old", since=100.0))
    assert position(path) == ("new", 7)
    late.save(at(8, "new", since=300.0))
    assert position(path) == ("new", 8)
    prompt.save(at(9, "newest", since=400.0))
    assert position(path) == ("newest", 9)


def test_a_clock_that_was_set_back_freezes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written in the future is replaced by the first who has another epoch."""
    path = tmp_path / "shared.json"
    SnapshotFile(path).save(at(50, "old", since=2e9))
    monkeypatch.setattr("time.time", lambda: 1000.0)
    SnapshotFile(path).save(at(7, "new", since=900.0))
    assert position(path) == ("new", 7)


def test_what_is_not_complete_replaces_nothing_complete_of_its_revision(tmp_path: Path) -> None:
    """A client that still waits for keys does not overwrite the one that has them all."""
    path = tmp_path / "shared.json"
    SnapshotFile(path).save(at(5))
    SnapshotFile(path).save(at(5, complete=False))
    loaded = SnapshotFile(path).load()
    assert loaded is not None
    assert loaded.complete
