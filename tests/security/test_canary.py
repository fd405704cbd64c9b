"""A canary key, set by every route and used by every provider adapter, is found nowhere.

Everything that a server, a client or a model call says or leaves behind is collected, through
success and through every error, and searched for the canary in plain, in base64, in hexadecimal and
percent-encoded. The two answers whose business it is to hold the key are the only exception.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import json
import logging
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from cryptography.fernet import Fernet

import slm
from slm import SLMClient, Timings
from slm.errors import SLMError
from slm.llm import LLMInterface, RetrySettings
from slm.server.agents.schemas import AgentCreate, AgentUpdate
from tests.security.test_doors import routes_of
from tests.support.http import Caller, agent
from tests.support.recorder import recording_provider
from tests.support.servers import InLoopServer, eventually

CANARY = "sk-canary-3f9Zq+/7w=="
FORMS = {
    CANARY,
    quote(CANARY, safe=""),
    CANARY.encode().hex(),
    base64.b64encode(CANARY.encode()).decode(),
    base64.urlsafe_b64encode(CANARY.encode()).decode(),
    json.dumps(CANARY)[1:-1].replace("/", "\\/"),
    CANARY[3:],
}
OURS = Path(slm.__file__).parent
MESSAGES = [{"role": "user", "content": "hello"}]
KEYED = {("GET", "/api/agents/{agent_id}/llm"), ("GET", "/api/snapshot")}
DIALECTS = ("openai", "anthropic", "ollama")


def hits(text: str | bytes) -> list[str]:
    """The forms of the canary in a text."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    return [form for form in FORMS if form in text]


@dataclass
class Evidence:
    """Everything that was said, by where.

    Attributes:
        said: the texts.
        secrets: what must not be in the logs either: the tokens.
    """

    said: dict[str, list[str]] = field(default_factory=dict)
    secrets: set[str] = field(default_factory=set)

    def add(self, where: str, *texts: str | bytes) -> None:
        kept = self.said.setdefault(where, [])
        kept += [t.decode("latin-1") if isinstance(t, bytes) else t for t in texts]

    def add_error(self, where: str, error: BaseException) -> None:
        """An exception as a log, a crash reporter or a debugger would show it, chain and all."""
        self.add(where, *_told(error, set()))

    def check(self) -> None:
        for where, texts in self.said.items():
            assert texts, f"nothing was collected of {where}"
            for text in texts:
                for form in hits(text):
                    at = text.index(form)
                    raise AssertionError(f"{where}: {text[max(0, at - 300) : at + 100]}")
        for secret in self.secrets:
            assert not [t for t in self.said["logs at DEBUG"] if secret in t]


def _told(error: BaseException, seen: set[int]) -> Iterator[str]:
    if id(error) in seen:
        return
    seen.add(id(error))
    yield "".join(traceback.TracebackException.from_exception(error).format())
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if Path(frame.f_code.co_filename).is_relative_to(OURS):  # the test's own hold the canary
            yield from map(repr, frame.f_locals.values())
    yield repr(error)
    yield from _inside(vars(error), 6, seen)
    yield from _inside(error.args, 6, seen)
    for other in (error.__cause__, error.__context__):
        if other is not None:
            yield from _told(other, seen)


def _inside(value: Any, depth: int, seen: set[int]) -> Iterator[str]:
    """Every text that can be reached from a value, as a crash reporter walks it."""
    if isinstance(value, str | bytes):
        yield value if isinstance(value, str) else value.decode("latin-1")
        return
    if depth == 0 or id(value) in seen or value is None or isinstance(value, int | float):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _inside(name, depth - 1, seen)
            yield from _inside(each, depth - 1, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _inside(each, depth - 1, seen)
    elif isinstance(value, BaseException):
        yield from _told(value, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield repr(value)
        yield from _inside(vars(value), depth - 1, seen)


@pytest.fixture
def evidence() -> Iterator[Evidence]:
    """Collects; what is logged at DEBUG by anybody, and what is printed, is in it."""
    found = Evidence()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s %(args)r"))
    root = logging.getLogger()
    before = {
        name: logging.getLogger(name).level
        for name in [*logging.root.manager.loggerDict, ""]
        if isinstance(logging.getLogger(name), logging.Logger)
    }
    for name in before:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        yield found
    finally:
        root.removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
    found.add("logs at DEBUG", stream.getvalue())
    assert "DEBUG" in stream.getvalue()
    found.check()


WRONG: list[Any] = [
    {"llm_api_key": CANARY + "\n"},
    {"llm_api_key": CANARY + "ż"},
    {"llm_api_key": CANARY * 300},
    {"llm_api_key": [CANARY]},
    {"llm_api_key": {"key": CANARY}},
    {"llm_timeout": CANARY},
    {"llm_provider": CANARY},
    {"llm_endpoint": f"https://user:{CANARY}@example.com"},
    {"llm_endpoint": CANARY},
    {"llm_temperature": CANARY},
    {"llm_max_tokens": CANARY},
    {"llm_options": CANARY},
    {"is_default": CANARY},
    {"agent_id": CANARY},
    {CANARY: 1},
    {"api_key": CANARY},
    [CANARY],
    CANARY,
]


async def test_what_the_server_says_and_keeps(
    ask: Caller, server: InLoopServer, evidence: Evidence, tmp_path: Path
) -> None:
    """Answers, problems, frames, metrics, history, audit, and every byte on the server's disk."""
    async with ask.stream() as stream:
        for dialect in DIALECTS:
            endpoint = f"https://{dialect}.example/v1"
            made = agent(dialect, llm_provider=dialect, llm_endpoint=endpoint, llm_api_key=CANARY)
            assert (await ask("POST", "/api/agents", made)).status == 201
            assert (await ask("POST", "/api/agents", made)).status == 409
            assert (
                await ask("PUT", f"/api/agents/{dialect}", {"llm_api_key": CANARY})
            ).status == 200
            assert (await ask("PUT", f"/api/agents/{dialect}", {"llm_model": "n"})).status == 200
        await ask("PUT", "/api/agents/none", {"llm_api_key": CANARY})
        await ask("PUT", "/api/agents/openai", {"llm_api_key": CANARY}, headers={"If-Match": '"1"'})
        for body in WRONG:
            for method, path in (
                ("POST", "/api/agents"),
                ("PUT", "/api/agents/openai"),
                ("POST", "/api/admin/tokens"),
                ("POST", "/api/admin/keys/rotate"),
                ("POST", "/api/agents/openai/rollback"),
            ):
                whole = (
                    agent("x") | body if path == "/api/agents" and isinstance(body, dict) else body
                )
                refused = await ask(method, path, whole)
                assert 400 <= refused.status < 500, (method, path, body)
        raw = (
            json.dumps(agent("y"))[:-1] + f', "llm_api_key": "{CANARY}", "llm_api_key": "{CANARY}"'
        )
        for text in (raw + "}", raw, raw + ',"a":NaN}', f'"{CANARY}'):
            refused = await ask(
                "POST", "/api/agents", data=text, headers={"Content-Type": "application/json"}
            )
            assert refused.status == 422
        await ask("POST", "/api/agents", data=CANARY, headers={"Content-Type": "text/plain"})
        coded = quote(CANARY, safe="")
        for path in (f"/api/agents?{coded}=1", f"/api/agents?limit={coded}", f"/api/{coded}"):
            assert (await ask("GET", path)).status in (404, 422)
        for path in (f"/api/agents/{coded}", f"/api/agents/{coded}/llm"):
            assert (await ask("GET", path)).status == 404
        await ask.as_(CANARY)("GET", "/api/agents")
        await stream.socket.send_str(json.dumps({"subscribe": CANARY, CANARY: 1}))
        await stream.socket.send_str(json.dumps({"ack": CANARY}))
        await stream.socket.send_str(json.dumps({"what": CANARY}))
        last = await ask("DELETE", "/api/agents/ollama")
        await stream.upto(int(last.headers["SLM-Revision"]))
        for path in (
            "/api/agents",
            "/api/agents/openai",
            "/api/agents/openai/history",
            "/api/changes",
            "/api/fleet",
            "/api/admin/audit?limit=1000",
            "/api/admin/tokens",
            "/api/admin/keys",
            "/metrics",
            "/readyz",
            "/openapi.json",
        ):
            assert (await ask("GET", path)).status == 200, path
        # And each route that there is, those that come later too, with it wherever one can put it.
        for method, path in sorted(routes_of(server) - {("WEBSOCKET", "/ws")} - KEYED):
            for value in (coded, "anthropic", "9999"):
                where = path.format(agent_id=value, token_id=value, revision=value)
                for query in ("", f"?{coded}={coded}", f"?agent_id={coded}&backend={coded}"):
                    for body in (None, CANARY, {"llm_api_key": CANARY, CANARY: CANARY}):
                        await ask(method, where + query, body)
        backup = await ask.session.post(
            f"{ask.url}/api/admin/backup", headers={"Authorization": f"Bearer {ask.token}"}
        )
        evidence.add("the backup", await backup.read())
    evidence.add("answers and frames", *ask.seen)
    ask.seen.clear()
    key = await ask("GET", "/api/agents/openai/llm")
    snapshot = await ask("GET", "/api/snapshot")
    assert hits(ask.seen[0]), "the search finds it where it is"
    assert hits(ask.seen[1])
    evidence.add("headers of keyed answers", str(key.headers), str(snapshot.headers))

    services = server.running.services
    config, _, _ = await services.reads.llm("openai")
    await services.database.run(
        lambda c: (
            c.exec_driver_sql(
                "UPDATE agents SET llm_api_key_encrypted = substr(llm_api_key_encrypted, 1, 90)"
            )
            and None
        )
    )
    with pytest.raises(SLMError) as damaged:
        await services.reads.llm("openai")
    evidence.add_error("a key that does not decrypt", damaged.value)
    evidence.add(
        "reprs of the server",
        *map(repr, (config, services, services.registry, services.keyring.vault, server.running)),
        repr(server.running.settings),
        str(AgentCreate.model_validate(agent("z", llm_api_key=CANARY))),
        repr(AgentUpdate.model_validate({"llm_api_key": CANARY})),
        repr(await services.reads.snapshot()),
        config.model_dump_json(),
        str(config.model_dump()),
    )
    await server.stop()
    files = [p for p in server.data_dir.rglob("*") if p.is_file() and p.suffix != ".token"]
    assert server.data_dir / "slm.db" in files
    evidence.add("files", *(path.read_bytes() for path in files))
    evidence.secrets |= {str(ask.token), server.backend_token}


class Hostile:
    """A provider that fails in every way, and repeats what it was sent where it can."""

    def __init__(self) -> None:
        self.received = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        sent = dict(request.headers.items())
        self.received += bool(hits(str(sent)))
        how = body["model"]
        said = json.dumps({"error": {"message": f"Incorrect API key: {sent}", "type": "x"}})
        if how.isdigit():
            return web.Response(status=int(how), text=said, content_type="application/json")
        if how == "text":
            return web.Response(status=500, text=f"<pre>{sent}</pre>")
        if how == "redirect":
            raise web.HTTPFound(f"http://127.0.0.1:9/?{quote(str(sent))}")
        if how == "nonsense":
            return web.Response(text=f"not json {sent}", content_type="application/json")
        if how == "shape":
            return web.json_response({"unexpected": sent})
        if how == "cut":
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(f"data: {json.dumps(sent)}\n\ndata: {{{json.dumps(sent)}".encode())
            assert request.transport is not None
            request.transport.close()
            return response
        assert how == "stall"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError, OSError):
            while not request.transport or not request.transport.is_closing():
                await response.write(b": wait\n\n")
                await asyncio.sleep(0.05)
        return response


@contextlib.asynccontextmanager
async def hostile_provider() -> AsyncIterator[tuple[Hostile, str]]:
    hostile = Hostile()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", hostile.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield hostile, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


NOWHERE = ("http://127.0.0.1:9", "https://127.0.0.1:{port}", "http://no-such-host.invalid")
WAYS = (
    *("400", "401", "403", "404", "408", "409", "413", "422", "429", "500", "503", "529"),
    *("text", "redirect", "nonsense", "shape", "cut", "stall"),
)


async def test_what_clients_and_adapters_say_and_keep(
    ask: Caller, server: InLoopServer, evidence: Evidence, tmp_path: Path
) -> None:
    """Every adapter, chat and stream, against a provider that echoes what it got in each error."""
    plain, sealed = tmp_path / "plain.json", tmp_path / "sealed.json"
    seal = Fernet.generate_key().decode()
    async with recording_provider() as good, hostile_provider() as (hostile, bad):
        for dialect in DIALECTS:
            version = "/v1" if dialect == "openai" else ""
            for name, where in (("good", good.origin), ("bad", bad)):
                fields = {
                    "llm_provider": dialect,
                    "llm_endpoint": where + version,
                    "llm_api_key": CANARY,
                    "llm_timeout": 1,
                }
                body = agent(f"{name}-{dialect}", **fields)
                assert (await ask("POST", "/api/agents", body)).status == 201
            for number, where in enumerate(NOWHERE):
                where = where.format(port=bad.rpartition(":")[2])
                fields = {"llm_provider": dialect, "llm_endpoint": where, "llm_api_key": CANARY}
                body = agent(f"nowhere-{number}-{dialect}", **fields)
                assert (await ask("POST", "/api/agents", body)).status == 201
        async with (
            SLMClient(server.url, token=server.backend_token, cache_file=plain) as client,
            SLMClient(
                server.url, token=server.backend_token, cache_file=sealed, cache_key=seal
            ) as other,
            LLMInterface(client, retry=RetrySettings(max_retries=1, backoff_seconds=0.01)) as llm,
        ):
            for dialect in DIALECTS:
                result = await llm.chat(f"good-{dialect}", MESSAGES)
                evidence.add("results", repr(result), str(result))
            # Together, since each waits for its stall.
            await asyncio.gather(
                *(_fail_in_every_way(llm, f"bad-{dialect}", evidence) for dialect in DIALECTS)
            )
            for number, _ in enumerate(NOWHERE):
                for dialect in DIALECTS:
                    await _fail(llm, f"nowhere-{number}-{dialect}", "m", evidence)
            assert good.keys() == {CANARY}, "it was used"
            assert hostile.received >= 2 * len(DIALECTS) * len(WAYS) - 6
            resolved = await client.resolve("good-openai")
            config = await client.get_agent_config("good-openai")
            assert config["llm_api_key"] == CANARY
            for backend in (await ask("GET", "/api/fleet")).body["backends"]:
                query = f"agent_id=good-openai&backend={backend['backend']}"
                assert (await ask("GET", f"/api/explain?{query}")).status == 200
            gone = SLMClient("http://127.0.0.1:9", token=CANARY, start_timeout=0.1)
            await gone.connect()
            evidence.add(
                "reprs of the client",
                *map(repr, (client, other, llm, resolved, config, gone)),
                *map(str, (client, llm, resolved, config, gone.last_error)),
                f"{config}",
                repr(vars(client)),
                repr(vars(llm)),
            )
            await gone.close()
            await eventually(lambda: plain.exists() and sealed.exists())
        evidence.add("snapshot files", plain.read_bytes(), sealed.read_bytes())
    evidence.add("answers and frames", *ask.seen)
    evidence.secrets |= {str(ask.token), server.backend_token, seal}


async def _fail_in_every_way(llm: LLMInterface, agent_id: str, evidence: Evidence) -> None:
    for way in WAYS:
        await _fail(llm, agent_id, way, evidence)


async def _fail(llm: LLMInterface, agent_id: str, model: str, evidence: Evidence) -> None:
    try:
        await llm.chat(agent_id, MESSAGES, model=model)
    except SLMError as error:
        evidence.add_error("exceptions of chat", error)
    else:
        raise AssertionError(f"{agent_id}: {model} did not fail")
    try:
        async for chunk in llm.stream(agent_id, MESSAGES, model=model):
            evidence.add("chunks", repr(chunk))
    except SLMError as error:
        evidence.add_error("exceptions of stream", error)
    else:
        raise AssertionError(f"{agent_id}: {model} did not fail as a stream")


ROW = {"agent_id": "a", "llm_provider": "openai", "llm_model": "m", "llm_api_key": CANARY}
BROKEN_ANSWERS: list[tuple[int, str]] = [
    (200, json.dumps(ROW)),
    (200, json.dumps({"revision": 1, "epoch": "e", "agents": [ROW], CANARY: CANARY})),
    (200, json.dumps(ROW | {"agent_id": "b", "revision": 1})),
    (200, f'{{"llm_api_key": "{CANARY}'),
    (200, f"<pre>{CANARY}</pre>"),
    (302, CANARY),
    (409, f'{{"llm_api_key": "{CANARY}'),
    (500, json.dumps(ROW)),
    (503, CANARY),
]


@pytest.mark.parametrize(("status", "body"), BROKEN_ANSWERS, ids=range(len(BROKEN_ANSWERS)))
async def test_a_broken_answer_of_the_slm_is_not_told(
    status: int, body: str, evidence: Evidence
) -> None:
    """What a client makes of an answer that has a key in it and cannot be used: no word of it."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path != "/ws":
            headers = {"Location": f"/{quote(CANARY, safe='')}"} if status == 302 else {}
            return web.Response(status=status, text=body, headers=headers)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json({"type": "subscribed", "revision": 1, "heartbeat": CANARY} | ROW)
        await socket.receive()
        return socket

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        quick = Timings(close_timeout_seconds=0.1, request_timeout_seconds=1.0)
        async with SLMClient(url, token="slm_x", start_timeout=0.2, timings=quick) as client:
            assert client._follower.sync is not None
            connection = client._follower.sync._connection
            for ask in (
                connection.get_llm("a", min_revision=0, epoch=None),
                connection.get_default(epoch=None),
                connection.get_snapshot(min_revision=0),
            ):
                with pytest.raises(SLMError) as failed:
                    await ask
                evidence.add_error("errors of the client", failed.value)
            told = await client.explain("a")
            evidence.add("reprs", repr(client), str(client.last_error), repr(told))
    finally:
        await runner.cleanup()


def test_the_search_itself_finds_what_is_hidden_in_an_exception() -> None:
    """A canary in a cause's attribute, or in a header of a request it holds, is found."""

    class Request:
        def __init__(self) -> None:
            self.headers = {"Authorization": f"Bearer {CANARY}"}

    try:
        try:
            error = ValueError("inner")
            error.request = Request()  # type: ignore[attr-defined]
            raise error
        except ValueError:
            raise RuntimeError("outer") from None
    except RuntimeError as outer:
        found = Evidence()
        found.add_error("a", outer)
    assert any(hits(text) for text in found.said["a"])
    assert sys.exc_info() == (None, None, None)
    gc.collect()
