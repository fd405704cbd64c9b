"""What is in the audit: every write, token event, rotation and key read; and nothing without it."""

from __future__ import annotations

from typing import Any

import pytest

from slm import SLMClient
from tests.support.command import slm
from tests.support.http import Caller, agent, make_token
from tests.support.servers import InLoopServer, eventually


async def _entries(ask: Caller, query: str = "") -> list[dict[str, Any]]:
    """The entries after the start's own, oldest first."""
    found = (await ask("GET", f"/api/admin/audit?limit=1000{query}")).body["entries"]
    return [entry for entry in reversed(found) if entry["actor"] != "slm"]


async def test_who_did_what_to_which_agent_from_where(ask: Caller, server: InLoopServer) -> None:
    """Writes with the fields that were sent, key reads, token events, the steps of a rotation."""
    await ask("POST", "/api/agents", agent("a", llm_api_key="sk-a", is_default=True))
    await ask("PUT", "/api/agents/a", {"llm_model": "n", "llm_api_key": "sk-b"})
    await ask("PUT", "/api/agents/a", {"llm_model": "n"})  # alters nothing
    await ask("PUT", "/api/agents/none", {"llm_model": "n"})  # fails
    backend = await make_token(ask, "backend-1", "key:read", "config:read")
    await backend("GET", "/api/agents/a/llm")
    await backend("GET", "/api/agents/default/llm")  # has no key
    await backend("GET", "/api/agents/a")
    await backend("GET", "/api/snapshot")
    await ask("POST", "/api/agents/a/rollback", {})
    await ask("POST", "/api/agents", agent("b"))
    await ask("DELETE", "/api/agents/b")
    number = (await ask("GET", "/api/admin/tokens")).body["tokens"][-1]["id"]
    await ask("DELETE", f"/api/admin/tokens/{number}")
    await ask("POST", "/api/admin/keys")
    await ask("POST", "/api/admin/keys/rotate", {})
    await ask("POST", "/api/admin/keys/reencrypt")
    await ask("POST", "/api/admin/keys/prune")
    await ask("POST", "/api/admin/backup")
    entries = await _entries(ask)
    told = [(entry["actor"], entry["action"], entry["agent_id"]) for entry in entries]
    assert told == [
        ("admin", "agent.create", "a"),
        ("admin", "agent.update", "a"),
        ("admin", "token.create", None),
        ("backend-1", "key.read", "a"),
        ("backend-1", "key.read_all", None),
        ("admin", "agent.update", "a"),
        ("admin", "agent.create", "b"),
        ("admin", "agent.delete", "b"),
        ("admin", "token.revoke", None),
        ("admin", "encryption_key.add", None),
        ("admin", "encryption_key.rotate", None),
        ("admin", "encryption_key.reencrypt", None),
        ("admin", "encryption_key.prune", None),
        ("admin", "database.backup", None),
    ]
    assert {entry["address"] for entry in entries} == {"127.0.0.1"}
    details = [entry["detail"] for entry in entries]
    assert details[1]["fields"] == ["llm_api_key", "llm_model"]
    assert details[2] | {"token_id": 0} == {
        "token_id": 0,
        "name": "backend-1",
        "scopes": ["key:read", "config:read"],
        "agents": None,
        "expires_in_seconds": None,
    }
    assert (
        details[3]["api_key_revision"]
        == (await ask("GET", "/api/agents/a")).body["api_key_revision"]
    )
    assert details[4]["keys"] == 1
    assert "sk-" not in str(entries)
    assert (await ask("GET", "/api/admin/audit/verify")).body["whole"]
    reads = await _entries(ask, "&action=key.&agent=a")
    assert [entry["action"] for entry in reads] == ["key.read", "key.read_all"]


async def test_a_backend_s_reads_are_in_it(ask: Caller, server: InLoopServer) -> None:
    """What an SDK fetches by itself, at its start and after a key change, is recorded too."""
    await ask("POST", "/api/agents", agent("a", llm_api_key="sk-a"))
    async with SLMClient(server.url, token=server.backend_token) as client:
        assert (await client.get_agent_config("a"))["llm_api_key"] == "sk-a"
        await ask("PUT", "/api/agents/a", {"llm_api_key": "sk-b"})

        async def renewed() -> bool:
            return bool((await client.get_agent_config("a"))["llm_api_key"] == "sk-b")

        await eventually(renewed)
    reads = [e["action"] for e in await _entries(ask, "&actor=backend")]
    assert reads == ["key.read_all", "key.read"]


@pytest.mark.parametrize("fault", ["trigger", "full"])
async def test_what_cannot_be_recorded_is_not_done(
    ask: Caller, server: InLoopServer, fault: str
) -> None:
    """With an audit that takes no row: no write, no token, no key; plain reads go on."""
    await ask("POST", "/api/agents", agent("a", llm_api_key="sk-a"))
    before = (await ask("GET", "/api/agents")).body
    tokens = (await ask("GET", "/api/admin/tokens")).body
    database = server.running.services.database

    async def sql(*statements: str) -> None:
        for statement in statements:
            await database.run(lambda c, s=statement: c.exec_driver_sql(s) and None)  # type: ignore[misc]

    broken = "CREATE TRIGGER no_audit BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END"
    if fault == "full":
        broken = broken.replace("RAISE(ABORT, 'no')", "zeroblob(10)")
        await sql(
            "CREATE TABLE filler (b BLOB)",
            "CREATE TRIGGER no_audit BEFORE INSERT ON audit"
            " BEGIN INSERT INTO filler VALUES (zeroblob(100000)); END",
            "PRAGMA max_page_count = 1",  # takes the present size: nothing more fits
        )
    else:
        await sql(broken)
    refused = [
        await ask("GET", "/api/agents/a/llm"),
        await ask("GET", "/api/snapshot"),
        await ask("PUT", "/api/agents/a", {"llm_model": "n"}),
        await ask("POST", "/api/agents", agent("b")),
        await ask("DELETE", "/api/agents/a"),
        await ask("POST", "/api/admin/tokens", {"name": "t", "scopes": ["admin"]}),
        await ask("DELETE", "/api/admin/tokens/2"),
    ]
    wanted = 507 if fault == "full" else 503
    assert [answer.status for answer in refused] == [wanted] * len(refused)
    assert "sk-a" not in str([answer.body for answer in refused])
    assert (await ask("GET", "/api/agents")).body == before
    assert (await ask("GET", "/api/agents/default/llm")).status == 200, "it hands out no key"
    await sql("PRAGMA max_page_count = 1000000", "DROP TRIGGER no_audit")
    assert (await ask("GET", "/api/admin/tokens")).body == tokens
    assert (await ask("GET", "/api/agents/a/llm")).body["llm_api_key"] == "sk-a"
    assert (await ask("GET", "/api/admin/audit/verify")).body["whole"]


async def test_the_commands_for_tokens_and_audit(ask: Caller, server: InLoopServer) -> None:
    """`slm tokens create|revoke|list` and `slm audit list|verify`, as an operator runs them."""
    where: dict[str, Any] = {"data": server.data_dir, "env": {"SLM_URL": server.url}}
    made = await slm(
        *("tokens", "create", "--name", "billing", "--scope", "config:read,key:read"),
        *("--agents", "billing,code-*", "--expires", "90d"),
        **where,
    )
    token = made.out.strip()
    assert (made.code, token.startswith("slm_"), token in made.err) == (0, True, False)
    assert "billing" in made.err
    limited = ask.as_(token)
    assert [a["agent_id"] for a in (await limited("GET", "/api/agents")).body["agents"]] == [
        "default"
    ]
    into = server.data_dir / "ci.token"
    filed = await slm("tokens", "create", "--name", "ci", "--out", str(into), **where)
    assert (filed.code, filed.out) == (0, "")
    assert into.stat().st_mode & 0o777 == 0o600
    revoked = await slm("tokens", "revoke", "billing", **where)
    assert revoked.code == 0, revoked
    assert (await limited("GET", "/api/agents")).status == 401
    listed = await slm("tokens", "list", "--all", "--json", **where)
    assert [t["name"] for t in listed.json] == ["admin", "backend", "billing", "ci"]
    assert listed.json[2]["agents"] == ["billing", "code-*"]
    assert token not in listed.out
    seen = await slm("audit", "list", "--action", "token.", **where)
    assert [line.split()[4] for line in seen.out.splitlines()[1:]] == [
        "token.revoke",
        "token.create",
        "token.create",
    ]
    head = (await ask("GET", "/api/admin/audit/verify")).body["head"]
    await server.running.services.database.run(
        lambda c: c.exec_driver_sql("UPDATE audit SET actor = 'nobody' WHERE seq = 2") and None
    )
    broken = await slm("audit", "verify", "--expect", head, **where)
    assert (broken.code, "entry 2" in broken.error) == (1, True)


ALTERED = [
    *(f"UPDATE audit SET {name} = CAST('x' AS BLOB) WHERE seq = 2" for name in
      ("at", "actor", "action", "agent_id", "address", "detail", "hash")),
    *("UPDATE audit SET address = 9e999 WHERE seq = 2", "UPDATE audit SET at = 5 WHERE seq = 2"),
    *("UPDATE audit_head SET seq = 'abc'", "UPDATE audit_head SET hash = x'00'"),
    *("UPDATE audit_head SET cut_seq = 'abc'", "UPDATE audit_head SET cut_hash = x'00'"),
]  # fmt: skip


async def test_a_value_of_another_type_is_shown_and_found(
    ask: Caller, server: InLoopServer
) -> None:
    """Whoever alters a column's type makes the chain broken, and no route fail."""
    await ask("POST", "/api/agents", agent("a"))
    database = server.running.services.database
    for statement in ALTERED:
        rows: list[dict[str, Any]] = []

        def alter(connection: Any, statement: str = statement, rows: Any = rows) -> None:
            for table in ("audit", "audit_head"):
                found = connection.exec_driver_sql(f"SELECT * FROM {table}").mappings().all()
                rows += [{"table": table, **row} for row in found]
            connection.exec_driver_sql(statement)

        def put_back(connection: Any, rows: Any = rows) -> None:
            for row in map(dict, rows):
                table, key = row.pop("table"), "seq" if "actor" in row else "id"
                columns = ", ".join(f"{name} = ?" for name in row)
                where = f" WHERE {key} = {row[key]}" if key == "seq" else ""
                connection.exec_driver_sql(
                    f"UPDATE {table} SET {columns}{where}", tuple(row.values())
                )

        await database.run(alter)
        assert (await ask("GET", "/api/admin/audit")).status == 200, statement
        verdict = await ask("GET", "/api/admin/audit/verify")
        assert (verdict.status, verdict.body["whole"]) == (200, False), statement
        await database.run(put_back)
    assert (await ask("GET", "/api/admin/audit/verify")).body["whole"]
