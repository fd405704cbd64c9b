"""Tokens and certificates that are renewed while a backend runs."""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from slm import ClientStatus, SLMClient, Timings
from slm.client.transport.credentials import TlsContext, Watch
from slm.client.transport.tls import TlsFiles
from tests.support.faults.backends import TENTH
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server

PATIENT = Timings(**(TENTH | {"refused_retry_seconds": 600.0, "backoff_max_seconds": 0.2}))
"""Whoever is refused comes back after minutes, unless a file changes."""


def status_of(client: SLMClient) -> ClientStatus:
    """Return the status; by a call, since a type checker takes a property for unchanging."""
    return client.status


async def made(admin: Api, name: str, *scopes: str) -> str:
    body = {"name": name, "scopes": scopes or ("config:read", "key:read")}
    answer = await admin.call("POST", "/api/admin/tokens", json=body)
    return str(answer.json["token"])


async def revoke(admin: Api, name: str) -> None:
    listed = (await admin.get("/api/admin/tokens")).json["tokens"]
    (number,) = [token["id"] for token in listed if token["name"] == name]
    assert (await admin.call("DELETE", f"/api/admin/tokens/{number}")).status == 200


def replace(path: Path, text: str | bytes) -> None:
    """Replace a file as an orchestrator does: by another one, in one step."""
    new = path.with_suffix(".new")
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    new.replace(path)


async def test_a_refused_token_is_tried_again_once_its_file_changes(
    server: InLoopServer, admin: Api, tmp_path: Path
) -> None:
    """Not after minutes: the file is looked at every second while its token is refused."""
    file = tmp_path / "token"
    file.write_text(await made(admin, "one"))
    async with SLMClient(server.url, token_file=file, timings=PATIENT) as client:
        assert status_of(client) is ClientStatus.LIVE
        await revoke(admin, "one")
        await eventually(lambda: status_of(client) is ClientStatus.UNAUTHORIZED)
        assert client.last_error is not None
        assert "does not accept the token" in client.last_error
        replace(file, await made(admin, "two"))
        await eventually(lambda: status_of(client) is ClientStatus.LIVE, timeout=4)
        assert client.last_error is None


async def test_a_file_that_an_orchestrator_swaps_by_a_link_counts_as_changed(
    server: InLoopServer, admin: Api, tmp_path: Path
) -> None:
    """Kubernetes replaces a folder behind a link; the file's own name stays what it was."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "token").write_text("slm_wrong")
    (tmp_path / "two" / "token").write_text(await made(admin, "two"))
    (tmp_path / "data-link").symlink_to("one")
    file = tmp_path / "data-link" / "token"
    async with SLMClient(server.url, token_file=file, timings=PATIENT) as client:
        assert status_of(client) is ClientStatus.UNAUTHORIZED
        (tmp_path / "new-link").symlink_to("two")
        (tmp_path / "new-link").rename(tmp_path / "data-link")
        await eventually(lambda: status_of(client) is ClientStatus.LIVE, timeout=4)


async def test_a_token_that_may_fetch_no_key_is_replaced(
    server: InLoopServer, admin: Api, tmp_path: Path
) -> None:
    """A refused snapshot, too, is asked for again as soon as the file changes."""
    await admin.create("billing", llm_provider="openai", llm_api_key="sk-1")
    file = tmp_path / "token"
    file.write_text(await made(admin, "no-keys", "config:read"))
    async with SLMClient(server.url, token_file=file, timings=PATIENT) as client:
        await eventually(lambda: status_of(client) is ClientStatus.UNAUTHORIZED)
        replace(file, await made(admin, "keys"))
        await eventually(lambda: status_of(client) is ClientStatus.LIVE, timeout=4)
        config = await client.resolve("billing")
        assert config.llm_api_key is not None


async def test_a_file_that_does_not_change_is_not_tried_more_often(tmp_path: Path) -> None:
    """The wait ends for a change alone."""
    file = tmp_path / "token"
    file.write_text("one")
    watch = Watch([file])
    assert not await watch.wait(0.01)
    file.write_text("other")
    assert await watch.wait(600)
    watch.note()
    assert not await watch.wait(0.01)
    file.unlink()
    assert await watch.wait(600)
    assert not await Watch([]).wait(0.01)


# --- certificates ---


class Authority:
    """A private CA, and the files of a server and a backend that it vouches for."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(str(folder / "ca.pem"))
        self.server = self.ca.issue_cert("127.0.0.1")
        self.server.private_key_pem.write_to_path(str(folder / "server-key.pem"))
        self.server.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
        own = self.ca.issue_cert("backend.internal")
        own.private_key_pem.write_to_path(str(folder / "client-key.pem"))
        own.cert_chain_pems[0].write_to_path(str(folder / "client.pem"))

    def settings(self, clients: Path) -> dict[str, Any]:
        """Settings of a server that shows this certificate and asks for one of `clients`."""
        return {
            "tls_cert": self.folder / "server.pem",
            "tls_key": self.folder / "server-key.pem",
            "tls_client_ca": clients,
        }


def provide(authority: Authority, folder: Path) -> None:
    """Put a CA's files where the backend looks for them, each in one step."""
    for name in ("ca.pem", "client.pem", "client-key.pem"):
        replace(folder / name, (authority.folder / name).read_bytes())


async def test_renewed_certificates_are_used_from_the_next_connection_on(tmp_path: Path) -> None:
    """CA file, certificate and key are replaced before the old ones are refused; no restart."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = tmp_path / "files"
    files.mkdir()
    provide(old, files)
    server = InLoopServer(tmp_path / "data", **old.settings(old.folder / "ca.pem"))
    await server.start()
    try:
        async with SLMClient(
            server.url,
            server.backend_token,
            ca_file=files / "ca.pem",
            client_cert=(files / "client.pem", files / "client-key.pem"),
            timings=PATIENT,
        ) as client:
            assert status_of(client) is ClientStatus.LIVE
            provide(new, files)
            await server.stop()
            await server.start(**new.settings(new.folder / "ca.pem"))
            await eventually(lambda: status_of(client) is ClientStatus.LIVE)
    finally:
        await server.stop()


async def test_certificates_that_come_after_the_refusal_are_tried_at_once(tmp_path: Path) -> None:
    """The wait after a refused certificate ends when the file is replaced."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = tmp_path / "files"
    files.mkdir()
    provide(old, files)
    slow = Timings(**(TENTH | {"backoff_initial_seconds": 600.0, "backoff_max_seconds": 600.0}))
    async with (
        running_server(tmp_path / "data", **new.settings(new.folder / "ca.pem")) as server,
        SLMClient(
            server.url,
            server.backend_token,
            ca_file=files / "ca.pem",
            client_cert=(files / "client.pem", files / "client-key.pem"),
            timings=slow,
        ) as client,
    ):
        assert status_of(client) is ClientStatus.TLS_ERROR
        provide(new, files)
        await eventually(lambda: status_of(client) is ClientStatus.LIVE, timeout=4)


def test_a_pair_that_does_not_fit_yet_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the two writes of a renewal the former pair goes on; said once, not each time."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = tmp_path / "files"
    files.mkdir()
    provide(old, files)
    context = TlsContext(
        TlsFiles(files / "ca.pem", (files / "client.pem", files / "client-key.pem"))
    )
    first = context.current()
    assert isinstance(first, ssl.SSLContext)
    assert context.current() is first
    replace(files / "client.pem", (new.folder / "client.pem").read_bytes())
    for _ in range(3):
        assert context.current() is first
    assert len([r for r in caplog.records if "not used yet" in r.getMessage()]) == 1
    replace(files / "client-key.pem", (new.folder / "client-key.pem").read_bytes())
    assert context.current() is not first
    os.unlink(files / "ca.pem")  # noqa: PTH108
    assert context.current() is not first
    shutil.copy(new.folder / "ca.pem", files / "ca.pem")
    renewed = context.current()
    assert isinstance(renewed, ssl.SSLContext)
    assert context.current() is renewed
