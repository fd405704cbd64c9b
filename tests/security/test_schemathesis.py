"""The API against its own document: schemathesis generates what it allows and what it forbids.

No answer is a 500, none has a status or a shape that the document does not know, no bad input is
accepted, no route forgets to ask for the token; in chains of requests, too.

Every check is on, for every route; `SETTINGS` says where one is not, and why.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any

import pytest

from slm.errors import problem_classes
from tests.support.http import Caller, admin, agent, make_token
from tests.support.servers import InLoopServer, running_server

# Without the garbage collector: in CPython before 3.11.8 two threads of which one is collecting in
# mid-parse spoil each other's `ast.parse` (python/cpython#106905), and hypothesis parses a lot.
RUN = "import gc; gc.disable(); from schemathesis.cli import schemathesis; schemathesis()"

SETTINGS = """
[checks.not_a_server_error]
# 503 is an answer of the contract: `min_revision` asks for what is not there yet.
expected-statuses = ["2xx", "3xx", "4xx", 503]

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "304", "401", "403", "404", "409", "412", "503"]
"""
# Whose bodies have rules that the document does not say: which places an endpoint may name, that a
# null is for some fields alone, that no limited token is an administrator's, 2^63 - 1 to the digit.
for operation in (
    "POST /api/agents",
    "PUT /api/agents/{agent_id}",
    "POST /api/agents/{agent_id}/rollback",
    "POST /api/admin/tokens",
):
    SETTINGS += f"""
[[operations]]
include-name = "{operation}"
checks.positive_data_acceptance.enabled = false
"""
# PUT and DELETE of this path are for the agent whose id is `default`; `Allow` names them, rightly.
SETTINGS += """
[[operations]]
include-path = "/api/agents/default"
checks.allow_header_conformance.enabled = false
"""


async def _schemathesis(server: InLoopServer, token: str, folder: Path) -> tuple[int, str]:
    """Run it against this server and return its exit code and what it said."""
    command = [
        *(sys.executable, "-c", RUN, "run", f"{server.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {token}"),
        *("--phases", "coverage,fuzzing,stateful", "--mode", "all"),
        *("--max-examples", "10", "--seed", "20261122", "--workers", "1"),
        *("--continue-on-failure", "--no-color", "--no-shrink", "--warnings", "off"),
        *("--generation-database", "none", "--report", "har"),
        *("--report-har-path", str(folder / "har.json")),
    ]
    (folder / "schemathesis.toml").write_text(SETTINGS)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, cwd=folder
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode() + err.decode()


@pytest.mark.documents
@pytest.mark.timeout(300)
async def test_the_api_does_what_its_document_says(tmp_path: Path) -> None:
    """Generated requests, valid and not, with and without the token, one by one and in chains."""
    settings = {
        "auth_failures_burst": 1_000_000,
        "writes_burst": 1_000_000,
        "min_revision_wait_seconds": 0.01,
    }
    async with running_server(tmp_path / "data", **settings) as server, admin(server) as ask:
        await ask("POST", "/api/agents", agent("code-assistant", llm_api_key="sk-x"))
        tester = await make_token(ask, "tester", "config:read", "key:read", "agents:write", "admin")
        assert tester.token is not None
        code, said = await _schemathesis(server, tester.token, tmp_path)
        assert code == 0, said
        failures = server.running.services.counts.failures
        still = (await tester("GET", "/api/admin/tokens")).status
    entries: list[Any] = json.loads((tmp_path / "har.json").read_text())["log"]["entries"]
    statuses = {entry["response"]["status"] for entry in entries}
    assert {200, 201, 204, 401, 404, 405, 409, 415, 422} <= statuses, "all of it was tried"
    assert len(entries) > 500
    for entry in entries:
        if entry["response"]["status"] == 503:
            assert json.loads(entry["response"]["content"]["text"])["code"] == "behind"
    assert failures == 0
    assert still == 200, "the token was good to the end"


async def test_statuses_that_are_rare_are_in_the_document(ask: Caller) -> None:
    """A read that finds nothing new is 304, a delete that waits 200; the document says so."""
    document = (await ask("GET", "/openapi.json")).body
    await ask("POST", "/api/agents", agent("a"))
    documented = document["paths"]
    for path, place in (
        ("/api/agents", "/api/agents"),
        ("/api/agents/default", "/api/agents/default"),
        ("/api/agents/a", "/api/agents/{agent_id}"),
    ):
        tag = (await ask("GET", path)).headers["ETag"]
        assert (await ask("GET", path, headers={"If-None-Match": tag})).status == 304
        assert "304" in documented[place]["get"]["responses"]
    assert (await ask("DELETE", "/api/agents/a?wait=0.1s")).status == 200
    assert documented["/api/agents/{agent_id}"]["delete"]["responses"].keys() >= {"200", "204"}


async def test_the_document_lists_every_problem_code(ask: Caller) -> None:
    """Every code of the error tree and of the parser, and for each route what it can answer."""
    document = (await ask("GET", "/openapi.json")).body
    listed = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert set(listed) > set(problem_classes())
    assert {"header-fields-too-large", "request-timeout"} <= set(listed)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            secured = [name for each in operation.get("security", []) for name in each]
            statuses = set(operation["responses"])
            where = f"{method} {path}"
            if path in ("/healthz", "/readyz"):
                continue
            assert {"401", "429"} <= statuses, where
            assert secured == ["bearer"] or path == "/metrics", where
            assert {"403", "500"} <= statuses, where
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert "`" in answer["description"], (where, status)
    told = json.dumps(document)
    raised = {"agent-exists", "agent-is-default", "key-undecryptable", "tls-required", "behind"}
    assert all(f"`{code}`" in told for code in raised)
