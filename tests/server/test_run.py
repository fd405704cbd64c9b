"""The server as a process: its start, its refusals, its orderly end, and what it logs."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from slm.errors import StartupError
from slm.server.serve import SLMServer
from slm.server.settings import Settings
from tests.support.raw import Api
from tests.support.servers import TENTH, InLoopServer, ServerProcess, eventually, running_server


async def test_sigterm_closes_the_streams_and_ends(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """Streams are closed with 1012, spread out; the process ends by itself with 0."""
    async with ServerProcess(tmp_path / "data", shutdown_seconds=0.5) as server:
        headers = {"Authorization": f"Bearer {server.backend_token}"}
        streams = [await session.ws_connect(f"{server.url}/ws", headers=headers) for _ in range(20)]
        for stream in streams[:10]:
            await stream.send_str('{"subscribe": "agent_config"}')
            assert json.loads(await stream.receive_str())["type"] == "subscribed"
        server.send_signal(signal.SIGTERM)
        closed = await asyncio.gather(*(_closed_at(stream) for stream in streams))
        assert {code for code, _ in closed} == {1012}
        times = sorted(at for _, at in closed)
        # Five hundred a second, and no slower than the setting says.
        assert times[-1] - times[0] > 0.02
        assert await server.wait() == 0
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{server.url}/healthz")


async def _closed_at(stream: aiohttp.ClientWebSocketResponse) -> tuple[int | None, float]:
    while (await stream.receive()).type is aiohttp.WSMsgType.TEXT:
        pass
    return stream.close_code, asyncio.get_running_loop().time()


async def test_killed_and_started_again_it_goes_on(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """After a kill -9 the same port serves the same data, and `since` is resumed."""
    async with ServerProcess(tmp_path / "data") as server:
        headers = {"Authorization": f"Bearer {server.admin_token}"}
        url = f"{server.url}/api/agents/default"
        await session.put(url, json={"llm_model": "one"}, headers=headers)
        epoch = (await session.get(url, headers=headers)).headers["SLM-Epoch"]
        first = server.url
        server.kill()
        await server.start()
        assert server.url == first
        async with session.ws_connect(f"{server.url}/ws", headers=headers) as stream:
            await stream.send_json({"subscribe": "agent_config", "since": 1, "epoch": epoch})
            types = [json.loads(await stream.receive_str())["type"] for _ in range(2)]
        assert types == ["subscribed", "agent_config_changed"]


async def test_the_log_of_a_process_holds_no_secret(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """At DEBUG, through successes and errors: no key, no token, no query string."""
    async with ServerProcess(tmp_path / "data", log_level="debug") as server:
        headers = {"Authorization": f"Bearer {server.admin_token}"}
        agents = f"{server.url}/api/agents"
        body = {"agent_id": "a", "name": "A", "llm_provider": "openai", "llm_model": "m"}
        await session.post(agents, json=body | {"llm_api_key": "sk-canary-log"}, headers=headers)
        backend = {"Authorization": f"Bearer {server.backend_token}"}
        await session.get(f"{agents}/a/llm?min_revision=1", headers=backend)
        await session.get(f"{server.url}/api/snapshot", headers=backend)
        await session.get(f"{agents}?token=sk-canary-query", headers=headers)
        await session.put(f"{agents}/a", json={"sk-canary-name": 1}, headers=headers)
        await session.put(f"{agents}/a", data=b"sk-canary-body", headers=headers)
        bad = {"Authorization": "Bearer sk-canary-token"}
        await session.get(f"{agents}/sk-canary-path", headers=bad)
        async with session.ws_connect(f"{server.url}/ws?t=sk-canary-ws", headers=headers) as ws:
            await ws.send_str('{"subscribe": "sk-canary-channel"}')
            await ws.receive()
        assert await server.terminate() == 0
        for secret in ("canary", server.admin_token, server.backend_token):
            assert secret not in server.log
        key = (server.data_dir / "encryption.key").read_text().strip()
        assert key not in server.log


async def test_a_port_in_use_is_told_in_one_sentence(tmp_path: Path) -> None:
    """The address of another program is refused with a reason, and nothing is left open."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = SLMServer(Settings(data_dir=tmp_path, port=port, **TENTH))
        with pytest.raises(StartupError, match=rf"cannot listen on 127\.0\.0\.1 port {port}"):
            await server.start()
    async with running_server(tmp_path) as again:
        assert again.url


async def test_a_name_that_is_not_ours_is_told(tmp_path: Path) -> None:
    """A host that does not resolve, or is another machine's, is refused with a reason."""
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(StartupError, match="cannot listen on"):
            await SLMServer(Settings(data_dir=tmp_path, port=0, host=host, **TENTH)).start()


async def test_a_certificate_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """A missing or broken TLS file is one sentence, not a traceback."""
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for cert in (broken, tmp_path / "missing.pem"):
        settings = Settings(
            data_dir=tmp_path / "data", port=0, tls_cert=cert, tls_key=cert, **TENTH
        )
        with pytest.raises(StartupError, match=r"TLS (file|certificate) .* cannot be used"):
            await SLMServer(settings).start()


async def test_a_second_server_on_one_file_is_refused(tmp_path: Path) -> None:
    """SQLite has one server; the second says so, and the first goes on."""
    async with running_server(tmp_path) as first:
        with pytest.raises(StartupError, match="Another process holds"):
            await SLMServer(Settings(data_dir=tmp_path, port=0, **TENTH)).start()
        assert first.running.services.feed.running


@pytest.mark.parametrize("host", ["localhost", "::1", "0.0.0.0"])
async def test_it_listens_where_it_is_told(
    tmp_path: Path, session: aiohttp.ClientSession, host: str
) -> None:
    """Names, IPv6 and all addresses work, and the URL that it tells can be called."""
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    async with running_server(tmp_path, host=host) as server:
        answer = await session.get(f"{server.url}/healthz")
        assert await answer.json() == {"status": "ok"}


async def test_a_request_under_way_is_finished(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """A stop lets a slow upload that has begun end with its answer."""
    server = InLoopServer(tmp_path)
    await server.start()
    api = Api(server, session, server.admin_token)
    go_on = asyncio.Event()
    begun = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"llm_model":'
        begun.set()
        await go_on.wait()
        yield b' "slow"}'

    headers = {"Content-Type": "application/json"}
    writing = asyncio.create_task(
        api.call("PUT", "/api/agents/default", data=slowly(), headers=headers)
    )
    await begun.wait()
    inner = server.running
    stopping = asyncio.create_task(server.stop())
    await eventually(lambda: inner.services.hub._closing)
    go_on.set()
    assert (await writing).status == 200
    await stopping


async def test_a_backup_is_streamed_to_the_caller(admin: Api, backend: Api, tmp_path: Path) -> None:
    """POST /api/admin/backup answers a whole database while the server goes on; no copy stays."""
    await admin.create("a", llm_provider="openai", llm_api_key="sk-canary-backup")
    answer = await admin.call("POST", "/api/admin/backup")
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    copy = tmp_path / "copy.db"
    copy.write_bytes(answer.body)
    with sqlite3.connect(copy) as database:
        rows = database.execute("SELECT agent_id FROM agents ORDER BY id").fetchall()
    assert rows == [("default",), ("a",)]
    assert b"sk-canary-backup" not in answer.body
    assert not list(admin.server.data_dir.glob("*backup*"))
    assert not list(admin.server.data_dir.glob(".*backup*"))
    assert (await backend.call("POST", "/api/admin/backup")).code == "forbidden"
    assert (await admin.put("a", llm_model="goes on")).status == 200


async def test_metrics_tell_what_happened(admin: Api) -> None:
    """Prometheus text with the revision, the streams, and what was refused."""
    async with admin.stream() as stream:
        await stream.frame()
        await admin.create("a")
        await stream.next()
        await Api(admin.server, admin.session, "slm_wrong").get("/api/agents")
        text = (await admin.get("/metrics")).body.decode()
    values = dict(
        line.split(" ") for line in text.splitlines() if line and not line.startswith("#")
    )
    assert float(values["slm_revision"]) == 2
    assert float(values["slm_agents"]) == 2
    assert float(values["slm_subscribers"]) == 1
    assert float(values["slm_changes_total"]) == 1
    assert float(values["slm_auth_failures_total"]) == 1
    assert float(values["slm_feed_current"]) == 1


async def test_the_document_says_what_the_server_does(admin: Api) -> None:
    """Every route documents its problems, its token, and no validation error of another shape."""
    document = (await admin.get("/openapi.json")).json
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    assert {"Problem", "InvalidRequestProblem", "BrokenRule"} <= schemas.keys()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith("/api/"):
                assert operation["security"], path
                assert {"401", "403", "500"} <= operation["responses"].keys(), path
            for status, answer in operation["responses"].items():
                if status.startswith(("4", "5")) and path != "/readyz":
                    assert answer["content"].keys() == {"application/problem+json"}, (path, status)
    for reference in _references(document):
        assert reference.rpartition("/")[2] in schemas


def _references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for value in node.values() for found in _references(value)]
    if isinstance(node, list):
        return [found for value in node for found in _references(value)]
    return []
