"""Fixtures of the LLM tests: a server that speaks the dialect, an interface that resolves to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from slm.cli.demo import local_model
from slm.cli.demo.local_model import LocalModel
from slm.llm import ChatResult, LLMInterface, RetrySettings
from tests.support.llm.providers import DIALECTS, Configs, Dialect, RecordingServer, answering

QUICK_RETRY = RetrySettings(backoff_seconds=0.05, backoff_max_seconds=0.8)
"""A tenth of the defaults."""


ASK = [{"role": "user", "content": "Hello?"}]


async def ask(llm: LLMInterface, *, streamed: bool = False, **overrides: Any) -> ChatResult:
    """Ask the agent, by `chat` or by reading a stream to its end."""
    if not streamed:
        return await llm.chat("a", ASK, **overrides)
    stream = llm.stream("a", ASK, **overrides)
    async for _ in stream:
        pass
    return stream.result


@dataclass
class Bench:
    """A provider under test control and the interface that calls it."""

    dialect: Dialect
    server: RecordingServer
    configs: Configs
    llm: LLMInterface

    def set(self, **fields: Any) -> None:
        """Change the agent's config, as an operator does."""
        self.configs.current = self.dialect.config(self.server.url, **fields)


@pytest.fixture(params=DIALECTS, ids=repr)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    """Each provider's protocol in turn."""
    found: Dialect = request.param
    return found


@pytest.fixture
async def bench(dialect: Dialect) -> AsyncIterator[Bench]:
    """A provider that answers well until the test says otherwise."""
    async with RecordingServer(answering(dialect)).running() as server:
        configs = Configs(dialect.config(server.url))
        async with LLMInterface(configs, retry=QUICK_RETRY) as llm:
            yield Bench(dialect, server, configs, llm)


@pytest.fixture(scope="session")
def local() -> Iterator[LocalModel]:
    """The real model in its child process, one for all tests."""
    reason = local_model.missing()
    if reason is not None:
        pytest.skip(reason)
    with LocalModel() as model:
        yield model
