"""The tutorial and the guides, played from an empty directory as their reader would."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.documents.blocks import blocks
from tests.documents.replay import Replay

pytestmark = [pytest.mark.documents, pytest.mark.timeout(180)]


def free_ports(count: int) -> list[str]:
    """Return ports of this machine that nobody has."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def test_the_tutorial_works_from_an_empty_directory(tmp_path: Path) -> None:
    """Each file is saved and each command typed, and prints what the page shows."""
    ports = dict(zip(("8760", "9000", "8000"), free_ports(3), strict=True))
    with Replay(tmp_path, {"SLM_PORT": ports["8760"]}, ports) as replay:
        replay.play(blocks("docs/tutorial/fastapi.md", "python", "console"))
