"""Makes foreign text safe to repeat: on one line, without a secret in any encoding.

Knows no provider and no protocol. Runs only when an error is created, never for an answer.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Final

HIDDEN: Final = "***"
PIECE: Final = 8
"""Pieces of the secret with this many characters are hidden too: texts may be cut anywhere."""

MAX_TEXT: Final = 2048
"""Longer text is searched only for the plain secret, except this many characters at its end."""

_ROUNDS: Final = 8
# One character as escaped in HTML, URLs, JSON and other languages, or a layout character.
_ESCAPE: Final = re.compile(
    r"%([0-9a-f]{2})|\\+u\{?0*([0-9a-f]{2})\}?|\\+x([0-9a-f]{2})"
    r"|\\+([0-7]{3})|&#0*([0-9]{2,3});?|&#x0*([0-9a-f]{2});?|&([a-z]{2,8});"
    r"|(\\+[nrtbfv]?)|(.)",
    re.IGNORECASE | re.DOTALL,
)
_NUMBERS: Final = re.compile(r"(?<!\d)\d{1,3}(?:[\s,;|]+\d{1,3}){7,}(?!\d)")
_MARK: Final = re.compile(r"0x(?=[0-9a-f]{2})")
_NUMBER: Final = re.compile(r"\d{1,3}")
# API keys contain no letters that become several characters in lower case.
_LOWER: Final = str.maketrans({chr(code): chr(code + 32) for code in range(65, 91)})

Folded = list[tuple[str, int, int]]


def one_line(text: str, limit: int = 300) -> str:
    """Return foreign text as one printable line, for an error or a log."""
    # Cut first: it may be megabytes. It must not add log lines or inject terminal sequences.
    text = text[:MAX_TEXT]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]


def scrubbed(text: str, secret: str) -> str:
    """Return the text with `***` wherever it contains the secret or a piece of it.

    Finds the secret and every piece of 8 or more characters: plain, in either case, with line
    breaks inside, as escaped (once or twice) by URLs, JSON, HTML and Python, in hexadecimal, in
    base64 at any offset, in double base64, in base32, backwards, as a list of numbers, and with
    other signs between its characters. A secret of fewer than 8 characters is hidden only where it
    is a separate word, so that a single letter is not removed everywhere.

    Args:
        text: the foreign text.
        secret: what must not be visible; an empty one hides nothing.
    """
    if not secret:
        return text
    long, text = text[:-MAX_TEXT], text[-MAX_TEXT:]
    if long and len(secret) >= PIECE:
        long = re.sub(re.escape(secret), HIDDEN, long, flags=re.IGNORECASE)
    folded = _folded([(char, at, at + 1) for at, char in enumerate(text)])
    found = [*_plain(text.translate(_LOWER), secret.translate(_LOWER)), *_within(folded, secret)]
    if len(secret) >= PIECE:
        found += [*_spaced(folded, secret), *_numbered(text, secret)]
    return long + _without(text, found)


def _plain(text: str, secret: str) -> Iterator[tuple[int, int]]:
    if len(secret) < PIECE:
        for found in re.finditer(re.escape(secret), text):
            start, end = found.span()
            if not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum()):
                yield start, end
        return
    pieces = _pieces(secret, PIECE)
    for at in range(len(text) - PIECE + 1):
        if text[at : at + PIECE] in pieces:
            yield at, at + PIECE


def _within(folded: Folded, secret: str) -> Iterator[tuple[int, int]]:
    plain = "".join(char for char, _, _ in folded)
    short, pieces = _searched(secret)
    for found in short.finditer(plain) if short is not None else ():
        start, end = found.span()
        before, after = plain[start - 1 : start], plain[end : end + 1]
        # White space also ends a word, but is missing in the folded text.
        apart = start == 0 or folded[start - 1][2] < folded[start][1]
        ends = end == len(folded) or folded[end - 1][2] < folded[end][1]
        if (apart or not before.isalnum()) and (ends or not after.isalnum()):
            yield folded[start][1], folded[end - 1][2]
    for length, known in pieces.items():
        for at in range(len(plain) - length + 1):
            if plain[at : at + length] in known:
                yield folded[at][1], folded[at + length - 1][2]


def _spaced(folded: Folded, secret: str) -> Iterator[tuple[int, int]]:
    """Find the secret by its letters and digits alone, whatever is between them."""
    whole = _fold(secret)
    yield from _runs(folded, PIECE, _pieces(whole[::-1], PIECE), 0, 0)
    kept = [item for item in folded if item[0].isalnum()]
    # Adjacent ones were found before; `s-k-1` has something between all of them.
    yield from _runs(kept, PIECE, _pieces(_alone(whole), PIECE), 1, 3)
    for length, pieces in _coded(secret.encode()).items():
        yield from _runs(kept, length, pieces, 0, 3)
    # `0x73, 0x6b` is hexadecimal, too.
    plain = "".join(char for char, _, _ in kept)
    marks = {at for found in _MARK.finditer(plain) for at in range(*found.span())}
    if marks:
        kept = [item for at, item in enumerate(kept) if at not in marks]
        yield from _runs(kept, 2 * PIECE, _pieces(secret.encode().hex(), 2 * PIECE), 0, 4)


def _runs(
    items: Folded, length: int, pieces: frozenset[str], least: int, most: int
) -> Iterator[tuple[int, int]]:
    """Find pieces with `least` to `most` characters between each two of theirs."""
    text = "".join(char for char, _, _ in items)
    # For each character, how many before it are this close together.
    run = 0
    for at in range(len(items)):
        between = items[at][1] - items[at - 1][2] if at else -1
        run = run + 1 if least <= between <= most else 0
        if run >= length - 1 and text[at - length + 1 : at + 1] in pieces:
            yield items[at - length + 1][1], items[at][2]


def _coded(raw: bytes) -> dict[int, frozenset[str]]:
    """Return the pieces of the secret's encodings by length, only letters and digits."""
    once = _base64(raw)
    codes = [*once, *(twice for each in once for twice in _base64(each.encode()))]
    coded = PIECE * 4 // 3
    wide = set(_pieces(raw.hex(), 2 * PIECE))
    for offset in range(5):
        code = base64.b32encode(b"\0" * offset + raw).decode().rstrip("=")
        wide |= _pieces(code[-(-offset * 8 // 5) : -1].lower(), 2 * PIECE)
    narrow = frozenset().union(*(_pieces(_alone(code.lower()), coded) for code in codes))
    return {coded: narrow, 2 * PIECE: frozenset(wide)}


def _numbered(text: str, secret: str) -> Iterator[tuple[int, int]]:
    """Find the secret as a list of its characters' numbers."""
    known = _pieces(secret.translate(_LOWER), PIECE)
    for run in _NUMBERS.finditer(text):
        numbers = list(_NUMBER.finditer(text, *run.span()))
        chars = "".join(chr(int(number[0])).translate(_LOWER) for number in numbers)
        for at in range(len(chars) - PIECE + 1):
            if chars[at : at + PIECE] in known:
                yield numbers[at].start(), numbers[at + PIECE - 1].end()


def _alone(text: str) -> str:
    return "".join(char for char in text if char.isalnum())


def _base64(raw: bytes) -> list[str]:
    """Return the bytes' base64 at each offset, without the characters shared with neighbours."""
    codes = []
    for offset in range(3):
        code = base64.b64encode(b"\0" * offset + raw).decode().rstrip("=")
        codes.append(code[-(-offset * 8 // 6) : len(code) - (1 if (offset + len(raw)) % 3 else 0)])
    return codes


def _searched(secret: str) -> tuple[re.Pattern[str] | None, dict[int, frozenset[str]]]:
    """Return a short secret as a pattern, or all pieces of a longer one by length."""
    raw = secret.encode()
    plain = _fold(secret)
    if len(plain) < PIECE:
        forms = {plain, *((raw.hex(), _fold(base64.b64encode(raw).decode())) if raw[3:] else ())}
        words = "|".join(re.escape(form) for form in sorted(forms - {""}, key=len, reverse=True))
        return re.compile(words) if words else None, {}
    codes: set[str] = set()
    for inner in _base64(raw):
        codes |= {inner.lower(), inner.lower().replace("+", "-").replace("/", "_")}
    coded = PIECE * 4 // 3
    return None, {
        PIECE: _pieces(plain, PIECE),
        2 * PIECE: _pieces(raw.hex(), 2 * PIECE),
        coded: frozenset().union(*(_pieces(code, coded) for code in codes)),
    }


def _pieces(text: str, length: int) -> frozenset[str]:
    return frozenset(text[at : at + length] for at in range(len(text) - length + 1))


def _fold(text: str) -> str:
    return "".join(char for char, _, _ in _folded([(c, i, i + 1) for i, c in enumerate(text)]))


def _folded(chars: Folded) -> Folded:
    """Undo escapes, case and layout; keep each character's position in the text."""
    for _ in range(_ROUNDS):
        text = "".join(char for char, _, _ in chars)
        folded = []
        for match in _ESCAPE.finditer(text):
            char = _meaning(match)
            if char:
                folded.append((char, chars[match.start()][1], chars[match.end() - 1][2]))
        done = len(folded) == len(chars)
        chars = folded
        if done:
            break
    return [item for item in chars if item[0] != "\\"]


def _meaning(match: re.Match[str]) -> str:
    """Return the unescaped character in lower case; nothing for a layout character."""
    percent, four, two, octal, decimal, hexadecimal, name, slashes, plain = match.groups()
    if plain is not None:
        char = plain
    elif slashes is not None:
        # Kept until no escapes are left: with what follows, it may form another escape.
        char = "\\" if slashes[-1] == "\\" else ""
    elif name is not None:
        # Imported here, because it contains every name there is.
        from html import unescape

        char = unescape(f"&{name};")[0]
    elif octal is not None:
        char = chr(int(octal, 8) & 0xFF)
    elif decimal is not None:
        char = chr(int(decimal) & 0xFF)
    else:
        char = chr(int(percent or four or two or hexadecimal, 16))
    char = char.translate(_LOWER)
    return char if char.isprintable() and not char.isspace() else ""


def _without(text: str, found: list[tuple[int, int]]) -> str:
    parts: list[str] = []
    end = 0
    for start, stop in sorted(found):
        if start > end or not parts:
            parts += [text[end:start], HIDDEN]
        end = max(end, stop)
    return "".join(parts) + text[end:]
