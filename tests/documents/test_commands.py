"""Every `slm` command that a document shows is one, with options that it has."""

from __future__ import annotations

import re

import pytest
from tools.docs.commands import commands, options

from tests.documents.blocks import ROOT, all_blocks

PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)
EVERYWHERE = {"--help", "-h"}


def shown(page: str) -> list[str]:
    """Return the commands in a page's blocks, each on one line, without what follows a pipe."""
    texts = [each.text for each in all_blocks(page) if each.language in ("sh", "console")]
    texts += re.findall(r"^```\n(\$ .*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    found = [re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(slm .+)", line) for line in lines]
    return [re.split(r" [|#<>]|;|&&", each[1])[0].strip() for each in found if each is not None]


@pytest.mark.parametrize("page", PAGES)
def test_each_command_and_option_exists(page: str) -> None:
    """What is typed there is understood."""
    known = dict(commands())
    for line in shown(page):
        words = re.sub(r"'[^']*'|\"[^\"]*\"", "X", line).split()
        path = next(
            (name for n in (3, 2) if (name := " ".join(words[:n])) in known), " ".join(words)
        )
        if path in ("slm --version", "slm --help", "slm --install-completion"):
            continue
        assert path in known, f"{page}: {line}"
        named = {word for word in words if re.match(r"--?[a-z]", word)}
        assert named <= {*options(known[path]), *EVERYWHERE}, f"{page}: {line}"


def test_most_pages_that_show_commands_are_read() -> None:
    """The commands are found where they are."""
    assert len(shown("docs/operating.md")) > 10
    assert len(shown("docs/providers.md")) > 9
    assert len(shown("docs/reference/commands.md")) > 20
