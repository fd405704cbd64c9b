"""docs/operations.md, tried as it is written: nginx, backup and restore, a rolling restart."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from sqlalchemy.engine import make_url

from tests.support.faults.backends import backend, backends, believes, is_live
from tests.support.faults.network import UP, proxied
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import heard, subscribers
from tests.support.postgres import free_port, programs
from tests.support.servers import ServerProcess, eventually

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def block(language: str, holding: str) -> str:
    """Return the page's code block of this language that holds this text."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    [one] = [text for text in found if holding in text]
    return one


def nginx_program() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        pytest.skip("nginx is not installed here")
    return found


def configured(folder: Path, port: int, replicas: list[str], ca: trustme.CA) -> Path:
    """Write the page's own configuration; only addresses and paths are ours."""
    folder.mkdir()
    certificate = ca.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(folder / "slm.key"))
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(str(folder / "slm.pem"), append=True)
    text = block("nginx", "upstream slm")
    for number, url in enumerate(replicas, 1):
        text = text.replace(f"10.0.0.1{number}:8760", url.removeprefix("http://"))
    text = re.sub(r"^ *server 10\.0\.0\.\d+:8760 .*\n", "", text, flags=re.MULTILINE)
    text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    text = text.replace("/etc/nginx/", f"{folder}/")
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        + ("user root;\n" if os.geteuid() == 0 else "")
        + "events {}\nhttp {\naccess_log off;\n"
        + temporary
        + text
        + "}\n"
    )
    return config


@contextlib.asynccontextmanager
async def nginx(folder: Path, replicas: list[str], ca: trustme.CA) -> AsyncIterator[str]:
    """Run nginx as the page says."""
    program, port = nginx_program(), free_port()
    config = configured(folder, port, replicas, ca)
    process = await asyncio.create_subprocess_exec(program, "-c", str(config), "-p", str(folder))
    try:

        async def listening() -> bool:
            assert process.returncode is None, (folder / "error.log").read_text()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            return True

        await eventually(listening)
        yield f"https://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def written(operator: Operator, model: str) -> int:
    """Change the model; nginx may for a second still hold the other replica for dead (502)."""

    async def done() -> str | None:
        status, headers, said = await operator.ask(
            "PUT", "/api/agents/billing", {"llm_model": model}
        )
        assert status in (200, 502), said
        return headers["SLM-Revision"] if status == 200 else None

    return int(await eventually(done) or 0)


async def test_nginx_as_documented(postgres_site: Site, tmp_path: Path) -> None:
    """Keys and streams through it, replicas killed behind it: the backends go on."""
    site, ca = postgres_site, trustme.CA()
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    nginx_program()
    servers = [site.process(n, trusted_proxies="127.0.0.1") for n in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        url = await stack.enter_async_context(
            nginx(tmp_path / "nginx", [server.url for server in servers], ca)
        )
        context = ssl.create_default_context(cafile=str(ca_file))
        http = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context))
        )
        operator = Operator(http, url, site.admin_token)
        before = await operator.create("billing", llm_provider="openai", llm_api_key="sk-canary")
        clients = await stack.enter_async_context(
            backends(6, url, site.backend_token, ca_file=ca_file)
        )
        await eventually(lambda: all(c.revision >= before and is_live(c) for c in clients))
        for client in clients:
            key = (await client.resolve("billing")).llm_api_key
            assert key is not None
            assert key.get_secret_value() == "sk-canary"
        assert (await operator.ask("GET", "/metrics"))[0] == 404

        servers[0].kill()
        after = await written(operator, "without the first")
        await eventually(lambda: all(c.revision >= after and is_live(c) for c in clients), 20)
        await servers[0].start()
        servers[1].kill()
        last = await written(operator, "without the second")
        await eventually(lambda: all(c.revision >= last and is_live(c) for c in clients), 20)
        truth = await operator.agents()
        for client in clients:
            assert await believes(client, truth)


async def test_nginx_that_was_not_named(postgres_site: Site, tmp_path: Path) -> None:
    """Without SLM_TRUSTED_PROXIES what nginx says does not count: streams pass, keys do not."""
    site, ca = postgres_site, trustme.CA()
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    nginx_program()
    context = ssl.create_default_context(cafile=str(ca_file))
    async with (
        site.process() as server,
        nginx(tmp_path / "nginx", [server.url], ca) as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http,
    ):
        operator = Operator(http, url, site.backend_token)
        status, _, said = await operator.ask("GET", "/api/agents/default/llm")
        assert (status, said.get("code")) == (403, "tls-required"), said
        assert (await operator.ask("GET", "/api/agents/default"))[0] == 200
        await heard(http, url, site.backend_token, upto=0)


@pytest.mark.history(resyncs=["epoch"], committed=False)
async def test_postgresql_backup_and_restore_as_documented(
    postgres_site: Site, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    """The page's own lines: dumped while it serves, restored, and every backend drops the rest."""
    site = postgres_site
    if not (programs() / "pg_dump").exists():
        pytest.skip("this PostgreSQL comes without pg_dump")
    plain = make_url(site.database_url or "").set(drivername="postgresql")
    environment = os.environ | {
        "PATH": f"{programs()}:{os.environ['PATH']}",
        "SLM_PG_URL": plain.render_as_string(hide_password=False),
    }

    async def shell(lines: str) -> None:
        await asyncio.to_thread(
            subprocess.run, ["sh", "-ec", lines], cwd=tmp_path, env=environment, check=True
        )

    server = site.in_loop()
    await server.start()
    try:
        operator = Operator(http, server.url, site.admin_token)
        kept = await operator.create("kept", llm_model="old")
        async with (
            subscribers(4, server.url, site.backend_token) as subs,
            backend(server.url, site.backend_token) as client,
        ):
            await shell(block("sh", "pg_dump"))
            await operator.create("made-later")
            last = await operator.set("kept", llm_model="new")
            await eventually(lambda: all(s.reached(last) for s in subs))
            await eventually(lambda: client.revision >= last)
            epoch = server.running.services.feed.epoch
            await server.stop()
            await shell(block("sh", "pg_restore"))
            await server.start()
            assert server.running.services.feed.epoch != epoch
            for n in range(last - kept + 2):
                after = await operator.set("kept", llm_timeout=n + 1)
            assert after > last
            await eventually(lambda: all(s.epoch != epoch and s.reached(after) for s in subs))
            await eventually(lambda: is_live(client) and client.revision == after)
            truth = await operator.agents()
            assert truth.keys() == {"default", "kept"}
            assert all(s.agents == truth for s in subs)
            assert await believes(client, truth)
            assert (await client.resolve("made-later")).step == "default"
    finally:
        await server.stop()


@pytest.mark.history(streams=False)
@pytest.mark.parametrize("holding", ["pg_dump", "pg_restore"])
def test_an_unset_address_stops_before_another_database_is_touched(
    tmp_path: Path, holding: str
) -> None:
    """With SLM_PG_URL unset or empty, none of the page's programs is called."""
    for name in ("pg_dump", "pg_restore", "psql"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for more in ({}, {"SLM_PG_URL": ""}):
        done = subprocess.run(
            ["sh", "-c", block("sh", holding)], env={"PATH": path} | more, cwd=tmp_path
        )
        assert done.returncode != 0
        assert not (tmp_path / "called").exists()
    given = {"PATH": path, "SLM_PG_URL": "postgresql://slm@db/slm"}
    subprocess.run(["sh", "-c", block("sh", holding)], env=given, cwd=tmp_path, check=True)
    assert (tmp_path / "called").exists()


@pytest.mark.history(streams=False)
async def test_sqlite_backup_and_restore_as_documented(tmp_path: Path) -> None:
    """The page's own lines name the server's data directory, and bring back what was there."""
    data = tmp_path / "data"
    (tmp_path / "slm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m slm "$@"\n')
    (tmp_path / "slm").chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLM_")}
    environment = clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    async def shell(lines: str) -> None:
        await asyncio.to_thread(
            subprocess.run,
            ["sh", "-ec", lines.replace("/var/lib/slm", str(data))],
            cwd=tmp_path,
            env=environment,
            check=True,
        )

    async with ServerProcess(data) as server, aiohttp.ClientSession() as http:
        operator = Operator(http, server.url, server.admin_token)
        await operator.create("kept")
        await shell(block("sh", "slm db backup"))
        await operator.create("made-later")
        await server.terminate()
        copied = await asyncio.to_thread(lambda: [*tmp_path.glob("slm-*.db")])
        lines = block("sh", "slm db restore").replace("slm-2026-11-22.db", copied[0].name)
        await shell(lines.replace("restore", "restore --yes"))
        await server.start()
        assert (await operator.agents()).keys() == {"default", "kept"}


@pytest.mark.history(streams=False)
def test_the_systemd_unit_can_be_enabled_and_starts_a_server() -> None:
    """It has the section that `systemctl enable` needs, and a command that `slm` understands."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block("ini", "ExecStart"))
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    program, *arguments = unit["Service"]["ExecStart"].split()
    assert program.endswith("/slm")
    done = subprocess.run(
        [sys.executable, "-m", "slm", *arguments, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


async def test_a_rolling_restart(postgres_site: Site, http: aiohttp.ClientSession) -> None:
    """SIGTERM to one replica after the other: requests finish, streams end with 1012 and resume."""
    site = postgres_site
    servers = [site.process(n) for n in range(2)]
    async with servers[0], servers[1]:
        urls = [server.url for server in servers]
        operators = [Operator(http, url, site.admin_token) for url in urls]
        revision = await operators[0].create("billing")
        await servers[0].terminate()
        await servers[0].start(failpoint="before_commit:hold:0.3")
        async with subscribers(20, lambda n: urls[n % 2], site.backend_token) as subs:
            await eventually(lambda: all(s.reached(revision) for s in subs))
            connections = [len(s.connections) for s in subs]
            under_way = asyncio.create_task(operators[0].set("billing", llm_model="under way"))
            await eventually(
                lambda: (
                    site.rows(
                        "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
                        " AND datname = current_database() AND backend_xid IS NOT NULL"
                    )
                    == [(1,)]
                ),
                every=0.005,
            )
            for server in servers:
                began = time.monotonic()
                assert await server.terminate() == 0
                assert time.monotonic() - began < 10
                await server.start(failpoint=None)
            assert await under_way == revision + 1
            last = await operators[1].set("billing", llm_model="after")
            await eventually(lambda: all(s.reached(last) for s in subs), 20)
            assert all(1012 in s.closes for s in subs)
            assert all(len(s.connections) > n for s, n in zip(subs, connections, strict=True))
            truth = await operators[0].agents()
            assert all(s.agents == truth for s in subs)


@pytest.mark.parametrize("silent_since", ["long", "this moment"])
async def test_sigterm_ends_it_within_ten_seconds_whatever_hangs(
    silent_since: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """A silent database, a body that never ends, one who reads nothing: it is gone in 10 s."""
    url = make_url(request.getfixturevalue("postgres_url"))
    direct = url.render_as_string(hide_password=False)
    async with proxied(direct) as database:
        through = url.set(port=database.port).render_as_string(hide_password=False)
        site = Site("postgresql", tmp_path, direct, through)
        # The defaults: what an operator has.
        defaults: dict[str, Any] = {"database_timeout_seconds": 10.0, "shutdown_seconds": 3.0}
        async with (
            site.process(**defaults) as server,
            subscribers(5, server.url, site.backend_token) as subs,
            proxied(server.url) as clients,
            subscribers(5, clients.url, site.backend_token) as silent,
            proxied(server.url) as way,
        ):
            operator = Operator(http, way.url, site.admin_token)
            revision = await operator.create("billing")
            await eventually(lambda: all(s.reached(revision) for s in [*subs, *silent]))
            port = int(server.url.rpartition(":")[2])
            _, half = await asyncio.open_connection("127.0.0.1", port)
            half.write(
                b"PUT /api/agents/billing HTTP/1.1\r\nHost: slm\r\nContent-Length: 1000\r\n"
                b"Authorization: Bearer " + site.admin_token.encode() + b"\r\n\r\n{"
            )
            clients.stall()
            database.stall()
            writing = asyncio.create_task(operator.ask("PUT", "/api/agents/billing", {"name": "x"}))
            await eventually(lambda: any(b"PUT " in each.head[UP] for each in way.passages))
            if silent_since == "long":
                await eventually(lambda: all(s.behind for s in subs))
            began = time.monotonic()
            assert await server.terminate() == 0
            record_property("seconds_to_exit", round(time.monotonic() - began, 1))
            assert time.monotonic() - began < 10
            assert all(1012 in s.closes for s in subs)
            half.transport.abort()
            status, _, problem = await writing
            assert (status, problem["code"]) == (503, "database-unavailable")
            database.resume()
