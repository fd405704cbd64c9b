"""Build the documentation as a site: `python -m tools.docs.site PATH_OF_MKDOCS`.

docs/ is copied, with the pages that stand outside of it, and the links between the two are made to
lead on. Each page's Markdown is put beside its HTML, which is what llms.txt names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tools.docs.pages import ROOT

PAGES: Final = ROOT / "build" / "pages"
SITE: Final = ROOT / "build" / "site"
OUTSIDE: Final = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "docs/decisions": "decisions/README.md",
}
"""What stands outside of docs/, or is a folder there, and the page of the site that it is."""

LESS_SOUGHT: Final = ("changelog.md", "decisions/0*.md")
"""What search shows after the pages that tell how something is done."""

_LINK: Final = re.compile(r"(?<!!)\[(?P<text>[^][]*)\]\((?P<to>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def gather(target: Path) -> None:
    """Write the site's pages into a folder, which is made anew."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target)
    shutil.copy(Path(__file__).with_name("site.css"), target)
    for page in target.rglob("*.md"):
        source = ROOT / "docs" / page.relative_to(target)
        page.write_text(_linked(source.read_text(), source, page.relative_to(target)))
    for name, page_name in OUTSIDE.items():
        if (source := ROOT / name).is_file():
            text = _linked(source.read_text(), source, Path(page_name))
            (target / page_name).write_text(text)
    for pattern in LESS_SOUGHT:
        for page in target.glob(pattern):
            page.write_text(f"---\nsearch:\n  boost: 0.1\n---\n\n{page.read_text()}")


def build(mkdocs: str) -> None:
    """Build the site anew.

    Raises:
        CalledProcessError: mkdocs warned of something.
    """
    gather(PAGES)
    render(mkdocs, SITE)
    for page in PAGES.rglob("*.md"):
        shutil.copy(page, SITE / page.relative_to(PAGES))


def render(mkdocs: str, target: Path) -> None:
    """Make the HTML of the pages that were gathered; whatever mkdocs warns of ends it.

    Raises:
        CalledProcessError: a link or an anchor leads nowhere, or a page is in no menu.
    """
    # Not --quiet, with which mkdocs counts no warnings.
    command = [mkdocs, "build", "--clean", "--strict", "--site-dir", str(target)]
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environ, check=True)


def _linked(text: str, source: Path, page: Path) -> str:
    """Return a page's text with links that lead to pages of the site.

    A link to a file that is no part of the site is its text alone.

    Args:
        text: the page as it is written.
        source: where it stands now.
        page: where it stands in the site.
    """

    def led(found: re.Match[str]) -> str:
        target = os.path.normpath(source.parent / found["to"])
        name = str(Path(target).relative_to(ROOT))
        inside = OUTSIDE.get(name) or (name[len("docs/") :] if name.startswith("docs/") else None)
        if inside is None:
            return found["text"]
        to = os.path.relpath(inside, page.parent)
        return f"[{found['text']}]({to}{found['anchor'] or ''})"

    # A fence may say more than its language, as in CONTRIBUTING.md; mkdocs knows no such fence.
    text = re.sub(r"^```(\w+) .*$", r"```\1", text, flags=re.MULTILINE)
    # Not in code, where `handlers[name](call)` is no link.
    pieces = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(_LINK.sub(led, each) if i % 2 == 0 else each for i, each in enumerate(pieces))


if __name__ == "__main__":
    build(sys.argv[1])
