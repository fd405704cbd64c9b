"""A grammar of what peers may send: WebSocket frames and HTTP requests, sound, odd and broken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from hypothesis import strategies as st

from slm.protocol import Ack, Explained, Subscribe

TOKEN: Final = b"{token}"
"""What stands for the token until a message is sent."""


@dataclass(frozen=True)
class Conversation:
    """What one peer does.

    Attributes:
        upgrades: whether it opens a WebSocket first.
        messages: what it sends, one after the other.
        reads: whether it reads what it is answered.
        in_one: whether all is sent at once.
        leaves: how it goes: `close`, `reset`, `half` (it closes its own side) or `stay`.
    """

    upgrades: bool
    messages: list[bytes]
    reads: bool
    in_one: bool
    leaves: str


# --- WebSocket ---

scalars: Any = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, 10**400, 0.5, 1e308])
    | st.text(max_size=20)
    | st.sampled_from(["agent_config", "default", "\x00", "\ud800", "²", "a" * 500, "../x"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
names = st.sampled_from(
    sorted({name for model in (Subscribe, Ack, Explained) for name in model.model_fields})
)


def near(**sound: Any) -> Any:
    """A message of the contract, some of whose fields are missing or are anything."""
    return st.tuples(
        st.lists(st.sampled_from(sorted(sound)), max_size=1),
        st.dictionaries(names, values, max_size=2),
    ).map(lambda drawn: {k: v for k, v in sound.items() if k not in drawn[0]} | drawn[1])


texts = st.one_of(
    near(subscribe="agent_config"),
    near(subscribe="agent_config", since=1, epoch="e", client={"name": "n", "instance": "i"}),
    near(ack=1, not_in_force={"default": {"revision": 1, "reason": "r"}}, keys={"default": 1}),
    near(explained="0" * 16, report={"agent_id": "default", "steps": []}),
    values,
).map(lambda value: json.dumps(value).encode())

broken_texts = st.one_of(
    texts.flatmap(lambda text: st.integers(0, len(text)).map(lambda cut: text[:cut])),
    st.sampled_from([b"\xff\xfe", b'"\xed\xa0\x80"', b"{" * 3000, b"[" * 60_000, b"1e999", b""]),
    st.binary(max_size=200),
)

close_payloads = st.one_of(
    st.just(b""),
    st.tuples(st.integers(0, 65535), st.binary(max_size=130)).map(
        lambda drawn: drawn[0].to_bytes(2, "big") + drawn[1]
    ),
    st.binary(max_size=1),
)

payloads = st.one_of(
    texts,
    texts,
    broken_texts,
    close_payloads,
    st.binary(max_size=130),
    st.sampled_from([0, 1, 125, 126, 127, 4095, 4096, 4097, 65535, 65536, 70_000]).map(bytes),
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """One frame, or what calls itself one (RFC 6455 section 5.2)."""
    opcode = draw(st.sampled_from([1, 1, 1, 0, 0, 2, 8, 9, 9, 10, 10, 3, 7, 11, 15]))
    payload: bytes = draw(close_payloads if opcode == 8 else payloads)
    if opcode >= 8 and draw(st.integers(0, 9)):
        payload = payload[:125]
    fin = draw(st.sampled_from([True, True, True, False]))
    reserved = draw(st.sampled_from([0] * 12 + [1, 2, 4]))
    masked = draw(st.sampled_from([True] * 12 + [False]))
    length = len(payload) + draw(st.sampled_from([0] * 12 + [1, 70_000, 2**40, 2**63]))
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    form = draw(st.sampled_from(["shortest"] * 10 + ["two", "eight"]))
    bit = 0x80 if masked else 0
    if length < 126 and form == "shortest":
        head = bytes([first, bit | length])
    elif length < 65536 and form != "eight":
        head = bytes([first, bit | 126]) + length.to_bytes(2, "big")
    else:
        head = bytes([first, bit | 127]) + length.to_bytes(8, "big")
    if not masked:
        return head + payload
    mask = draw(st.sampled_from([b"\0\0\0\0", b"\x01\x02\x03\x04"]))
    # A mask of zeros leaves the payload as it is, so it stays near the contract.
    return (
        head
        + mask
        + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload[:5000]))
        + (payload[5000:])
    )


def whole(opcode: int, payload: bytes, fin: bool = True) -> bytes:
    """A sound frame."""
    head = bytes([(0x80 if fin else 0) | opcode])
    size = len(payload)
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([0x80 | 127]) + size.to_bytes(8, "big")
    return head + bytes(4) + payload


@st.composite
def pieces(draw: st.DrawFn) -> bytes:
    """A message in fragments, with control frames between them."""
    text = draw(texts | broken_texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    sent = b""
    for number, part in enumerate(parts):
        sent += whole(0 if number else 1, part, fin=number == len(parts) - 1)
        sent += draw(st.sampled_from([b"", b"", whole(9, b"?"), whole(10, b"!"), whole(9, b"")]))
    return sent


floods = st.sampled_from([(9, b""), (9, b"p" * 125), (10, b""), (0, b""), (1, b"{}"), (1, b"x")])

ws_messages = st.one_of(
    frames(),
    frames(),
    pieces(),
    texts.map(lambda text: whole(1, text)),
    st.tuples(floods, st.integers(1, 3000)).map(lambda f: whole(*f[0]) * f[1]),
)

# --- HTTP ---

methods = st.sampled_from(
    [
        "GET",
        "GET",
        "PUT",
        "POST",
        "DELETE",
        "HEAD",
        "OPTIONS",
        "CONNECT",
        "TRACE",
        "get",
        "G\0T",
        "",
    ]
)
targets = st.one_of(
    st.sampled_from(
        ["/healthz", "/readyz", "/metrics", "/openapi.json", "/api/agents", "/api/snapshot", "/ws"]
    ),
    st.sampled_from(
        ["/api/agents/default/llm", "/api/changes?limit=²", "*", "http://evil/api/agents", "/%00"]
    ),
    st.text(max_size=40).map(lambda text: "/" + text),
    st.integers(1, 20_000).map(lambda size: "/" + "x" * size),
)
versions = st.sampled_from(["HTTP/1.1"] * 8 + ["HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "", "http/1.1"])
fields = st.one_of(
    st.sampled_from(
        [
            "Host: h",
            "Host: h",
            "Host: evil",
            "Authorization: Bearer {token}",
            "Authorization: Bearer {token}",
            "Authorization: Bearer slm_wrong",
            "Authorization: Basic {token}",
            "Content-Type: application/json",
            "Content-Length: 2",
            "Content-Length: 5",
            "Content-Length: -1",
            "Content-Length: 99999999999999999999",
            "Transfer-Encoding: chunked",
            "Transfer-Encoding: chunked, chunked",
            "Transfer-Encoding: gzip",
            "Expect: 100-continue",
            "Connection: close",
            "Connection: keep-alive, Upgrade",
            "Upgrade: websocket",
            "Upgrade: h2c",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Version: 8",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Key: x",
            "Origin: https://evil.example",
            'If-Match: W/"1"',
            "Accept-Encoding: gzip",
            " folded: x",
            "no colon",
            "X-Space : x",
        ]
    ),
    st.tuples(st.text(max_size=20), st.text(max_size=40)).map(lambda f: f"{f[0]}: {f[1]}"),
    st.integers(1, 12_000).map(lambda size: "X-Big: " + "y" * size),
)
ends = st.sampled_from(["\r\n"] * 12 + ["\n", "\r", "\r\n "])
bodies = st.one_of(
    st.just(b""),
    st.just(b""),
    st.just(b"{}"),
    st.just(b"2\r\n{}\r\n0\r\n\r\n"),
    st.just(b"2;a=b\r\n{}\r\n0\r\nTrailer: x\r\n\r\n"),
    st.just(b"ffffffffffffffffff\r\n{}"),
    st.just(b"2\n{}\n0\n\n"),
    st.binary(max_size=100),
    st.integers(1, 300_000).map(bytes),
    texts,
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request, or what calls itself one (RFC 9112)."""
    line = f"{draw(methods)} {draw(targets)} {draw(versions)}"
    lines = [line, *draw(st.lists(fields, max_size=8))]
    if draw(st.integers(0, 3)):
        lines.insert(1, "Host: h")
    head = "".join(each + draw(ends) for each in lines) + draw(ends)
    body: bytes = draw(bodies)
    sent = head.encode("utf-8", "surrogatepass") + body
    return sent[: draw(st.integers(0, len(sent)))] if not draw(st.integers(0, 9)) else sent


sound = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
http_messages = st.one_of(
    requests(),
    requests(),
    st.integers(1, 500).map(lambda count: sound * count),
    st.binary(max_size=100),
)


@st.composite
def conversations(draw: st.DrawFn, messages: int) -> Conversation:
    """One peer with so many messages."""
    upgrades = draw(st.booleans())
    kind: Any = ws_messages if upgrades else http_messages
    return Conversation(
        upgrades=upgrades,
        messages=draw(st.lists(kind, min_size=messages, max_size=messages)),
        reads=draw(st.sampled_from([True, True, False])),
        in_one=draw(st.booleans()),
        leaves=draw(st.sampled_from(["close", "reset", "half", "stay"])),
    )
