"""TLS: keys over nothing else, certificates verified both ways, reloaded while serving."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import slm
from slm.cli.commands.certs import make_certificates
from slm.errors import ConfigurationError, StartupError
from tests.support.command import slm as command
from tests.support.http import agent
from tests.support.servers import ServerProcess, eventually, running_server


def write(directory: Path, *hosts: str) -> Path:
    """Make a CA and its certificates in a directory, over those that are there."""
    directory.mkdir(exist_ok=True)
    for name, content in make_certificates([*hosts] or ["127.0.0.1"], "backend", 1).items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    return write(tmp_path / "certs")


def tls(certs: Path, **more: Any) -> dict[str, Any]:
    return {"tls_cert": certs / "server.pem", "tls_key": certs / "server-key.pem"} | more


def client_pair(certs: Path) -> tuple[Path, Path]:
    return certs / "client.pem", certs / "client-key.pem"


async def _serial(url: str, ca: Path) -> int:
    """The serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=ca)
    host, _, port = url.removeprefix("https://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    certificate = writer.get_extra_info("ssl_object").getpeercert()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return int(certificate["serialNumber"], 16)


async def test_a_certificate_is_replaced_while_serving(certs: Path, tmp_path: Path) -> None:
    """SIGHUP takes the new one for new connections, keeps the open ones, and survives a bad one."""
    server = ServerProcess(tmp_path / "data", **tls(certs))
    async with server:
        first = await _serial(server.url, certs / "ca.pem")
        old_ca = tmp_path / "old-ca.pem"
        old_ca.write_bytes((certs / "ca.pem").read_bytes())
        context = ssl.create_default_context(cafile=old_ca)
        headers = {"Authorization": f"Bearer {server.admin_token}"}
        async with (
            aiohttp.ClientSession(
                headers=headers, connector=aiohttp.TCPConnector(ssl=context)
            ) as session,
            session.ws_connect(f"{server.url}/ws", compress=0) as stream,
        ):
            await stream.send_json({"subscribe": "agent_config"})
            assert (await stream.receive_json())["type"] == "subscribed"

            good = (certs / "server.pem").read_bytes()
            (certs / "server.pem").write_text("nonsense")
            server.send_signal(signal.SIGHUP)
            await eventually(lambda: "TLS was not reloaded" in server.log)
            assert await _serial(server.url, old_ca) == first, "the old one stays"
            (certs / "server.pem").write_bytes(good)

            write(certs)
            server.send_signal(signal.SIGHUP)

            async def renewed() -> bool:
                with contextlib.suppress(ssl.SSLError):
                    return await _serial(server.url, certs / "ca.pem") != first
                return False

            await eventually(renewed)
            changed = await session.put(
                f"{server.url}/api/agents/default",
                json={"llm_model": "n"},
                ssl=ssl.create_default_context(cafile=certs / "ca.pem"),
            )
            assert changed.status == 200
            # The stream that was open goes on.
            message = await stream.receive_json()
            while message["type"] == "heartbeat":
                message = await stream.receive_json()
            assert message["type"] == "agent_config_changed"
        assert "Traceback" not in server.log


async def test_the_client_verifies_and_shows_its_own_certificate(
    certs: Path, tmp_path: Path
) -> None:
    """Mutual TLS: with the right CA and certificate everything works, without either nothing."""
    stranger = write(tmp_path / "stranger")
    settings = tls(certs, tls_client_ca=certs / "ca.pem")
    async with running_server(tmp_path / "data", **settings) as server:
        ca, pair = certs / "ca.pem", client_pair(certs)
        async with (
            slm.SLMClient(
                server.url, token=server.backend_token, ca_file=ca, client_cert=pair
            ) as client,
            aiohttp.ClientSession() as session,
        ):
            assert client.status is slm.ClientStatus.LIVE
            context = ssl.create_default_context(cafile=ca)
            context.load_cert_chain(*pair)
            made = await session.post(
                f"{server.url}/api/agents",
                json=agent("a", llm_api_key="sk-over-tls"),
                headers={"Authorization": f"Bearer {server.admin_token}"},
                ssl=context,
            )
            assert made.status == 201
            assert made.headers["Strict-Transport-Security"] == "max-age=31536000"
            config = await client.get_agent_config("a")
            assert config["llm_api_key"] == "sk-over-tls"

        for ca_file, cert in (
            (ca, None),
            (ca, client_pair(stranger)),
            (stranger / "ca.pem", pair),
            (None, pair),
        ):
            client = slm.SLMClient(
                server.url,
                token=server.backend_token,
                ca_file=ca_file,
                client_cert=cert,
                start_timeout=0.5,
            )
            await client.connect()
            assert client.status is not slm.ClientStatus.LIVE
            assert client.last_error
            await client.close()


async def test_the_command_line_speaks_mutual_tls(certs: Path, tmp_path: Path) -> None:
    """`slm certs dev` makes what `slm serve` and the other commands need for it."""
    made = await command("certs", "dev", "made", "--host", "127.0.0.1", cwd=tmp_path)
    assert made.code == 0, made
    assert (tmp_path / "made" / "server-key.pem").stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "made").glob("ca-key*")), "the CA's key is not kept"
    again = await command("certs", "dev", "made", cwd=tmp_path)
    assert (again.code, "is there already" in again.error) == (1, True)
    files = tmp_path / "made"
    settings = tls(files, tls_client_ca=files / "ca.pem")
    async with running_server(tmp_path / "data", **settings) as server:
        variables = {"SLM_URL": server.url, "SLM_CA_FILE": str(files / "ca.pem")}
        refused = await command("agents", "list", data=server.data_dir, env=variables)
        assert refused.code == 1
        variables |= {
            "SLM_CLIENT_CERT": str(files / "client.pem"),
            "SLM_CLIENT_KEY": str(files / "client-key.pem"),
        }
        listed = await command("agents", "list", data=server.data_dir, env=variables)
        assert (listed.code, "default" in listed.out) == (0, True), listed


async def test_files_that_cannot_be_used_are_told_in_one_sentence(
    certs: Path, tmp_path: Path
) -> None:
    """A missing file, another's key, an encrypted key: refused at the start, on both sides."""
    stranger = write(tmp_path / "stranger")
    for broken in (
        {"tls_key": stranger / "server-key.pem"},
        {"tls_cert": certs / "no-such.pem"},
        {"tls_client_ca": certs / "server-key.pem"},
    ):
        with pytest.raises(StartupError, match="cannot be used"):
            async with running_server(tmp_path / "data", **tls(certs, **broken)):
                pass
    for wrong in (certs / "no-such.pem", certs / "client.pem", certs / "client-key.pem"):
        with pytest.raises(ConfigurationError, match="client_cert"):
            slm.SLMClient("https://localhost", token="t", client_cert=wrong)
