"""Bad input over HTTP: 422 (or what the contract says), never 500, never an echo of the input."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.raw import Api, raw_exchange
from tests.support.servers import running_server

# One server for all of them: a refused body leaves nothing behind.
pytestmark = pytest.mark.asyncio(loop_scope="module")

CANARY = "sk-canary-echo"
GOOD = {"agent_id": "a", "name": "A", "llm_provider": "openai", "llm_model": "m"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def apis(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Api]]:
    """One server, called with each of its tokens and with none."""
    directory = tmp_path_factory.mktemp("data")
    async with running_server(directory) as server, aiohttp.ClientSession() as session:
        yield {
            "admin": Api(server, session, server.admin_token, key_token=server.backend_token),
            "backend": Api(server, session, server.backend_token),
            "anonymous": Api(server, session),
        }


@pytest.fixture
def admin(apis: dict[str, Api]) -> Api:
    """Calls with a token of all scopes."""
    return apis["admin"]


@pytest.fixture
def backend(apis: dict[str, Api]) -> Api:
    """Calls with a token of config:read and key:read."""
    return apis["backend"]


@pytest.fixture
def anonymous(apis: dict[str, Api]) -> Api:
    """Calls without a token."""
    return apis["anonymous"]


def with_field(name: str, value: str) -> bytes:
    """The good body with one more field, or with this value for one of its own, in raw JSON."""
    others = {k: v for k, v in GOOD.items() if k != name}
    return f"{json.dumps(others)[:-1]}, {json.dumps(name)}: {value}}}".encode()


BAD: dict[str, bytes] = {
    "empty": b"",
    "not json": b"{" + CANARY.encode(),
    "an array": json.dumps([CANARY]).encode(),
    "a string": json.dumps(CANARY).encode(),
    "null": b"null",
    "a number": b"17",
    "NaN": with_field("llm_temperature", "NaN"),
    "Infinity": with_field("llm_temperature", "Infinity"),
    "minus Infinity": with_field("llm_temperature", "-Infinity"),
    "1e999": with_field("llm_temperature", "1e999"),
    "1e999 in options": with_field("llm_options", '{"x": 1e999}'),
    "NaN in options": with_field("llm_options", '{"x": [NaN]}'),
    "2^63": with_field("llm_max_tokens", str(2**63)),
    "2^63 in options": with_field("llm_options", f'{{"seed": {2**63}}}'),
    "4,000 digits": with_field("llm_max_tokens", "9" * 4000),
    "10,000 digits in options": with_field("llm_options", '{"x": ' + "9" * 10000 + "}"),
    "4,000 digits and a point": with_field("llm_temperature", "9" * 4000 + ".0"),
    "a lone surrogate": with_field("name", r'"\ud800"'),
    "a lone surrogate in a key": with_field("llm_options", r'{"\udfff": 1}'),
    "a lone surrogate in a list": with_field("llm_options", r'{"x": ["\udfff"]}'),
    "NUL": with_field("description", r'"a\u0000b"'),
    "NUL in options": with_field("llm_options", r'{"x": {"y": "\u0000"}}'),
    "a raw NUL": with_field("description", '"a\x00b"'),
    "a duplicate key": json.dumps(GOOD)[:-1].encode() + f', "name": "{CANARY}"}}'.encode(),
    "a duplicate key in options": with_field("llm_options", f'{{"x": 1, "x": "{CANARY}"}}'),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "UTF-32": json.dumps(GOOD).encode("utf-32-le"),
    "Latin-1": with_field("description", '"é"').decode().encode("latin-1"),
    "depth in options": with_field("llm_options", '{"x":' * 100 + "1" + "}" * 100),
    "depth without end": b"[" * 100_000,
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "an unknown field": with_field(CANARY, "1"),
    "an unknown field with a key": with_field("api_key", json.dumps(CANARY)),
    "a number as a string": with_field("llm_timeout", '"30"'),
    "a string as a number": with_field("description", "17"),
    "a bool as a number": with_field("is_active", "1"),
    "a float as a whole number": with_field("llm_timeout", "30.0"),
    "a bool as a whole number": with_field("llm_timeout", "true"),
    "a timeout of 0": with_field("llm_timeout", "0"),
    "a temperature of 3": with_field("llm_temperature", "3"),
    "options as a list": with_field("llm_options", "[]"),
    "options as a string": with_field("llm_options", json.dumps(CANARY)),
    "a key with a newline": with_field("llm_api_key", json.dumps(CANARY + "\r\nX: y")),
    "a key not ASCII": with_field("llm_api_key", json.dumps(CANARY + "é")),
    "a key too long": with_field("llm_api_key", json.dumps(CANARY * 400)),
    "a key as a list": with_field("llm_api_key", json.dumps([CANARY])),
    "an endpoint with a password": with_field("llm_endpoint", f'"https://u:{CANARY}@h/"'),
    "an endpoint that is a file": with_field("llm_endpoint", f'"file:///{CANARY}"'),
    "an endpoint of the cloud": with_field("llm_endpoint", '"http://169.254.169.254/"'),
    "an endpoint with a fragment": with_field("llm_endpoint", f'"https://h/v1#{CANARY}"'),
    "an endpoint of 300": with_field("llm_endpoint", json.dumps("https://h/" + "x" * 300)),
    "another provider": with_field("llm_provider", json.dumps(CANARY)),
    "a model with a line break": with_field("llm_model", json.dumps(f"{CANARY}\r\n")),
    "a model of nothing": with_field("llm_model", '""'),
    "a model of 257": with_field("llm_model", json.dumps("x" * 257)),
    "a name of 129": with_field("name", json.dumps("x" * 129)),
    "a description of 20,000": with_field("description", json.dumps("x" * 20_000)),
    "options of 17 KiB": with_field("llm_options", json.dumps({"x": "y" * 17 * 1024})),
    "a timeout of 3601": with_field("llm_timeout", "3601"),
    "a temperature below 0": with_field("llm_temperature", "-0.1"),
    "no tokens at all": with_field("llm_max_tokens", "0"),
    "an empty key": with_field("llm_api_key", '""'),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_body_is_refused_without_an_echo(admin: Api, name: str) -> None:
    """Each body is 422 with errors that hold nothing of it, for POST and for PUT alike."""
    headers = {"Content-Type": "application/json"}
    before = (await admin.get("/api/agents")).revision
    for method, path in (("POST", "/api/agents"), ("PUT", "/api/agents/default")):
        answer = await admin.call(method, path, data=BAD[name], headers=headers)
        assert (answer.status, answer.code) == (422, "invalid-request"), answer.body
        for error in answer.json["errors"]:
            assert error.keys() == {"loc", "msg", "type"}
        assert CANARY not in answer.body.decode()
        assert CANARY not in str(answer.headers)
    assert (await admin.get("/api/agents")).revision == before


async def test_the_limits_themselves_are_in(admin: Api) -> None:
    """The largest and the smallest of each field are taken; only what is beyond is refused."""
    options = {"x": "y" * (16 * 1024 - len('{"x": ""}'))}
    largest = {
        "name": "x" * 128,
        "description": "x" * 16_384,
        "llm_model": "x" * 256,
        "llm_endpoint": "https://h/" + "x" * 246,
        "llm_api_key": "~" * 4096,
        "llm_timeout": 3600,
        "llm_temperature": 2,
        "llm_options": options,
    }
    smallest = {
        "name": "x",
        "description": "",
        "llm_model": "x",
        "llm_endpoint": "http://h",
        "llm_api_key": "!",
        "llm_timeout": 1,
        "llm_temperature": 0,
        "llm_max_tokens": 1,
    }
    for agent_id, fields in (("a" * 64, largest), ("0", smallest)):
        answer = await admin.create(agent_id, **fields)
        assert answer.status == 201, answer.body
        del fields["llm_api_key"]
        assert {name: answer.json[name] for name in fields} == fields
    for agent_id in ("a" * 65, "A", "-a", "a/b", "a b", "é", ""):
        assert (await admin.create(agent_id)).code == "invalid-request", agent_id


async def test_an_unknown_field_is_told_without_its_name(admin: Api) -> None:
    """A key sent as a field's name by mistake is not told back, and a known field is named."""
    answer = await admin.create("a", **{CANARY: 1, "name": 5})
    assert {(*error["loc"], error["type"]) for error in answer.json["errors"]} == {
        ("body", "name", "string_type"),
        ("body", "unknown_field"),
    }


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"]
)
async def test_a_body_that_is_not_json_by_name_is_415(admin: Api, content_type: str) -> None:
    """The body must be application/json; a browser's form cannot write."""
    answer = await admin.call(
        "POST",
        "/api/agents",
        data=json.dumps(GOOD).encode(),
        headers={"Content-Type": content_type},
    )
    assert (answer.status, answer.code) == (415, "unsupported-media-type")


async def test_a_charset_is_allowed(admin: Api) -> None:
    """application/json with a charset, and a +json type, are JSON too."""
    for number, kind in enumerate(("application/json; charset=utf-8", "application/merge+json")):
        answer = await admin.call(
            "POST",
            "/api/agents",
            data=json.dumps(GOOD | {"agent_id": f"charset-{number}"}).encode(),
            headers={"Content-Type": kind},
        )
        assert answer.status == 201


async def test_a_body_over_256_kib_is_413(admin: Api) -> None:
    """Declared or in chunks of unknown length, a body over the limit is refused as such."""
    headers = {"Content-Type": "application/json"}
    fits = json.dumps(GOOD | {"agent_id": "large"}).encode().ljust(262_144)
    over = fits + b" "

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(over), 10_000):
            yield over[start : start + 10_000]

    declared = await admin.call("POST", "/api/agents", data=over, headers=headers)
    chunked = await admin.call("POST", "/api/agents", data=in_chunks(), headers=headers)
    for answer in (declared, chunked):
        assert (answer.status, answer.code) == (413, "content-too-large")
    assert (await admin.call("POST", "/api/agents", data=fits, headers=headers)).status == 201


@pytest.mark.parametrize(
    "query",
    [
        "limit=-1",
        "limit=0",
        "limit=a",
        "limit=99999999999999999999999",
        "offset=-1",
        "offset=1.5",
        "min_revision=abc",
        "min_revision=-1",
        f"min_revision={2**63}",
        "min_revision=" + "9" * 4000,
        "is_active=perhaps",
        "search=%00",
        "provider=a%00",
        "search=" + "x" * 300,
        f"{CANARY}=1",
        "limit=1&limit=2",
        f"agent_id={CANARY}%00",
    ],
)
async def test_a_bad_parameter_is_refused_without_an_echo(admin: Api, query: str) -> None:
    """Parameters out of their range, misspelt or doubled are 422, and nothing is told back."""
    answer = await admin.get(f"/api/agents?{query}")
    assert (answer.status, answer.code) == (422, "invalid-request")
    assert CANARY not in answer.body.decode()


async def test_nobody_without_a_token_has_a_body_read(anonymous: Api, backend: Api) -> None:
    """The token is asked for before the body is looked at, so a bad body says 401 or 403."""
    headers = {"Content-Type": "application/json"}
    for caller, status in ((anonymous, 401), (backend, 403)):
        for body in (b"{", b"x" * 300_000):
            answer = await caller.call("POST", "/api/agents", data=body, headers=headers)
            assert answer.status == status


async def test_what_is_not_http_is_400(admin: Api) -> None:
    """Bytes that are no request get a 400 that tells nothing of them, and the connection ends."""
    for sent in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        f"GET /api/agents HTTP/1.1\r\nHost: h\r\nX: {CANARY}\x00\r\n\r\n".encode(),
        b"GET /api/agents HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"GET /api/agents HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ):
        received = await raw_exchange(admin.server.url, sent)
        assert received.startswith(b"HTTP/1.1 400 "), received
        assert b"application/problem+json" in received
        assert CANARY.encode() not in received


async def test_options_pass_as_they_are(admin: Api) -> None:
    """What a provider takes, in any nesting, comes back to the letter, in its order."""
    options: dict[str, Any] = {
        "z": [1, 2.5, -(2**63), True, None, "é😀\u2028"],
        "a": {"b": {"c": []}},
        "stop": ["\n", '"', "\\"],
    }
    answer = await admin.create("options", llm_options=options)
    assert answer.status == 201
    assert json.dumps(answer.json["llm_options"]) == json.dumps(options)
    read = (await admin.get("/api/agents/options/llm")).json["llm_options"]
    assert json.dumps(read) == json.dumps(options)
