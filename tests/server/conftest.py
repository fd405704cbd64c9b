"""A prepared store, on each engine in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from slm.server.settings import Settings
from tests.support.postgres import postgres as postgres
from tests.support.postgres import postgres_url as postgres_url
from tests.support.store import KEY, Store


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database, on each engine in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Settings of a new database with a given encryption key."""
    return Settings(
        data_dir=tmp_path / "data",
        database_url=SecretStr(database_url),
        encryption_keys=SecretStr(KEY),
    )


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[Store]:
    """A database that was made ready, with its registry."""
    store = await Store.open(settings)
    try:
        yield store
    finally:
        await store.close()
