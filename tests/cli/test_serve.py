"""`slm serve`: what it says, what it leaves, and why it refuses to start."""

from __future__ import annotations

import asyncio
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.support.command import slm
from tests.support.servers import ServerProcess


async def test_an_empty_directory(tmp_path: Path) -> None:
    """It makes what it needs, for its owner alone, says where, and not what is in it."""
    data = tmp_path / "data"
    async with ServerProcess(data) as server:
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        for name in ("slm.db", "encryption.key", "admin.token", "backend.token"):
            assert stat.S_IMODE((data / name).stat().st_mode) == 0o600, name
            assert name == "slm.db" or str(data / name) in server.log
        for name in ("encryption.key", "admin.token", "backend.token"):
            assert (data / name).read_text().strip() not in server.log
        lines = server.log.splitlines()
        assert lines[-1] == f"SLM ready at {server.url}"
        assert sum(line.startswith("SLM ready") for line in lines) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_orderly_end(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C end it with 0; the file that names its address is there only meanwhile."""
    async with ServerProcess(tmp_path / "data") as server:
        file = tmp_path / "data" / "server.url"
        assert file.read_text() == f"{server.url}\n"
        server.send_signal(number)
        assert await server.wait() == 0
        assert not file.exists()
        assert server.log.splitlines()[-1].startswith("SLM ready"), "nothing to complain of"


async def test_after_a_power_cut(tmp_path: Path) -> None:
    """A file left by a killed server does no harm: the next one writes and removes its own."""
    async with ServerProcess(tmp_path / "data") as server:
        server.kill()
        assert (tmp_path / "data" / "server.url").exists()
        gone = await slm("agents", "list", data=tmp_path / "data")
        assert (gone.code, gone.error.startswith(f"no SLM at {server.url}")) == (1, True)
        await server.start()
        assert (await slm("agents", "list", data=tmp_path / "data")).code == 0
        assert await server.terminate() == 0
        assert not (tmp_path / "data" / "server.url").exists()


async def test_two_on_one_directory(tmp_path: Path) -> None:
    """The second server on a SQLite file refuses in one sentence and leaves the first alone."""
    async with ServerProcess(tmp_path / "data") as server:
        done = await slm("serve", "--port", "0", data=tmp_path / "data")
        assert done.code == 1
        assert "Another process holds" in done.error
        assert (tmp_path / "data" / "server.url").read_text() == f"{server.url}\n"
        assert (await slm("agents", "list", data=tmp_path / "data")).code == 0


async def test_two_on_one_port(tmp_path: Path) -> None:
    """A port that is taken is said in one sentence."""
    async with ServerProcess(tmp_path / "data") as server:
        port = server.url.rpartition(":")[2]
        done = await slm("serve", "--port", port, data=tmp_path / "other")
        assert (done.code, port in done.error) == (1, True)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SLM_BUFFER_BYTES", "lots"),
        ("SLM_HEARTBEAT_SECONDS", "-1"),
        ("SLM_DATABASE_URL", "mysql://root:sk-canary-7c21@db/x"),
        ("SLM_ENCRYPTION_KEYS", "sk-canary-7c21"),
        ("SLM_TLS_CERT", "only-the-certificate.pem"),
        ("SLM_LOG_LEVEL", "loud"),
    ],
)
async def test_a_setting_that_makes_no_sense(tmp_path: Path, variable: str, value: str) -> None:
    """It refuses to start and says which setting is wrong, not what it held."""
    done = await slm("serve", "--port", "0", data=tmp_path / "data", env={variable: value})
    assert done.code == 1
    assert done.error  # and `slm` has looked for the canary


async def test_options_go_before_variables(tmp_path: Path) -> None:
    """Host, port, data, database and TLS by options win over variables that say otherwise."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    certificate.cert_chain_pems[0].write_to_path(cert)
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    database = tmp_path / "elsewhere.db"

    class WithOptions(ServerProcess):
        def _spawn(self, arguments: list[str], environment: dict[str, str]) -> Any:
            options = {
                "--host": "localhost",
                "--database-url": f"sqlite:///{database}",
                "--tls-cert": cert,
                "--tls-key": key,
            }
            words = [str(word) for option in options.items() for word in option]
            return super()._spawn([*arguments, *words], environment)

    wrong = {
        "SLM_HOST": "192.0.2.1",
        "SLM_PORT": "1",
        "SLM_DATA_DIR": str(tmp_path / "wrong"),
        "SLM_DATABASE_URL": "sqlite:///wrong.db",
        "SLM_TLS_CERT": "wrong",
        "SLM_TLS_KEY": "x",
    }
    data = tmp_path / "data"
    async with WithOptions(data, env=wrong) as server:
        assert server.url.startswith("https://localhost:")
        assert database.exists()
        assert not (data / "slm.db").exists()
        assert not (tmp_path / "wrong").exists()
        listed = await slm("agents", "list", "--ca-file", str(ca), data=data)
        assert listed.code == 0, listed.err


async def test_commands_over_tls(tmp_path: Path) -> None:
    """With a certificate it serves https, and commands verify it against --ca-file alone."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    certificate.cert_chain_pems[0].write_to_path(cert)
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    data = tmp_path / "data"
    async with ServerProcess(data, tls_cert=cert, tls_key=key) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusted = await slm("agents", "list", "--ca-file", str(ca), data=data)
        assert trusted.code == 0
        watched = asyncio.create_task(
            slm("watch", "--count", "1", "--json", "--ca-file", str(ca), data=data)
        )
        while not watched.done():
            await slm("agents", "set", "default", "--option", "a=1", SLM_CA_FILE=str(ca), data=data)
            await slm("agents", "set", "default", "--option", "a=", SLM_CA_FILE=str(ca), data=data)
        assert '"agent_config_changed"' in watched.result().out
        unknown = await slm("agents", "list", data=data)
        assert unknown.code == 1
        assert "certificate is not accepted" in unknown.error
        assert "--ca-file" in unknown.error


async def test_commands_find_a_server_that_listens_everywhere(tmp_path: Path) -> None:
    """With --host 0.0.0.0 the commands beside it speak to it over loopback, with its own token."""
    async with ServerProcess(tmp_path / "data", host="0.0.0.0") as server:
        port = server.url.rpartition(":")[2]
        assert server.url == f"http://0.0.0.0:{port}"
        assert (tmp_path / "data" / "server.url").read_text() == f"http://127.0.0.1:{port}\n"
        assert (await slm("agents", "list", data=tmp_path / "data")).code == 0
        assert await server.terminate() == 0
        assert not (tmp_path / "data" / "server.url").exists()
