"""Fault 11: an expired, wrong-host or untrusted certificate: nothing is sent, the cache serves."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from slm.client.status import ClientStatus
from tests.support.faults.backends import backend, is_live
from tests.support.faults.site import Operator, Site
from tests.support.servers import eventually


def written(certificate: trustme.LeafCert, folder: Path) -> dict[str, Any]:
    """Write a certificate and its key to files; return the server's settings."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    key.write_bytes(certificate.private_key_pem.bytes())
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    return {"tls_cert": cert, "tls_key": key}


def wrong(kind: str, ca: trustme.CA) -> trustme.LeafCert:
    now = datetime.now(UTC)
    if kind == "expired":
        return ca.issue_cert(
            "127.0.0.1", not_before=now - timedelta(days=9), not_after=now - timedelta(days=1)
        )
    if kind == "wrong-host":
        return ca.issue_cert("slm.example.org")
    return trustme.CA().issue_cert("127.0.0.1")


@contextlib.asynccontextmanager
async def eavesdropper(certificate: trustme.LeafCert, port: int) -> AsyncIterator[list[bytes]]:
    """Listen with TLS on a port and record what is said after the handshake."""
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            heard.append(await reader.read(65536))
        writer.transport.abort()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    server = await asyncio.start_server(listen, "127.0.0.1", port, ssl=context)
    try:
        yield heard
    finally:
        server.close()


@pytest.mark.parametrize("kind", ["expired", "wrong-host", "untrusted"])
async def test_a_certificate_that_is_not_to_be_trusted(
    sqlite_site: Site, tmp_path: Path, kind: str
) -> None:
    """The backend says nothing to it, tells why, serves what it has, and recovers."""
    ca = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    trusted = ssl.create_default_context(cafile=str(ca_file))
    server = sqlite_site.in_loop(**written(ca.issue_cert("127.0.0.1"), tmp_path))
    await server.start()
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as http,
            backend(
                server.url, sqlite_site.backend_token, {"backoff_max_seconds": 0.2}, ca_file=ca_file
            ) as client,
        ):
            operator = Operator(http, server.url, sqlite_site.admin_token)
            before = await operator.create("billing", llm_model="old", llm_api_key="sk-canary")
            await eventually(lambda: is_live(client) and client.revision >= before)
            await eventually(lambda: client.peek("billing") is not None)
            await server.stop()

            port = int(server.url.rpartition(":")[2])
            async with eavesdropper(wrong(kind, ca), port) as heard:
                await eventually(lambda: client.status is ClientStatus.TLS_ERROR)
                assert client.last_error is not None
                assert "certificate" in client.last_error
                config = await client.resolve("billing")
                assert (config.step, config.llm_model) == ("agent", "old")
            # A handshake that the client refused may still end in a read of nothing.
            assert b"".join(heard) == b""

            await server.start()
            after = await operator.set("billing", llm_model="new")
            await eventually(lambda: is_live(client) and client.revision >= after)
            assert (await client.resolve("billing")).llm_model == "new"
    finally:
        await server.stop()
