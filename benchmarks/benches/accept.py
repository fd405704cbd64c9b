"""How many connections a second become live streams: handshake, token, subscription, answer."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.errors import Missing
from benchmarks.harness.run import Bench, Options, say
from benchmarks.harness.slm_server import BenchServer
from benchmarks.native import Farm


async def measure(options: Options) -> dict[str, Any]:
    count = 500 if options.quick else 3_000
    found: dict[str, Any] = {"connections": count, "plain": [], "tls": [], "missing": None}
    with tempfile.TemporaryDirectory(prefix="slm-bench-") as folder:
        tls = _certificate(Path(folder))
        for repeat in range(options.repeats):
            found["plain"].append(await _one(count))
            if found["missing"] is None:
                try:
                    found["tls"].append(await _one(count, **tls))
                except Missing as error:
                    found["missing"] = f"OpenSSL's headers (apt-get install libssl-dev): {error}"
            say(f"accept {repeat + 1}", {n: found[n][-1] for n in ("plain", "tls") if found[n]})
    return found


async def _one(count: int, **tls: Any) -> float:
    server_core, farm_core = machine.cores()
    async with BenchServer(core=server_core, **tls) as server:
        farm = Farm(server.port, server.backend_token, count, farm_core, tls=bool(tls))
        async with farm:
            await farm.grow(50)  # the first ones warm everything up
            seconds = await farm.grow(count)
    return (count - 50) / seconds


def _certificate(folder: Path) -> dict[str, str]:
    """Make a self-signed certificate on P-256, the usual curve; return the server's settings."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return {"tls_cert": str(certificate), "tls_key": str(key)}


BENCH = Bench("accept", "Connections accepted", measure)
