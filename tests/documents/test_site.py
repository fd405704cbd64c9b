"""The documentation as a site: whole, without a dead link, and it fetches nothing elsewhere."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tools.docs import site
from tools.docs.pages import ROOT

MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
IN_NAV = re.findall(r": (\S+\.md)$", NAV, re.MULTILINE)
LLMS = (ROOT / "docs" / "llms.txt").read_text()

FETCHED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "input": ("src",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "video": ("src", "poster"),
}
"""What a browser fetches by itself; a link is fetched where its `rel` says so."""

KEPT_LINKS = {"canonical", "next", "prev"}


class Fetches(HTMLParser):
    """Collects the addresses that a browser fetches for a page by itself, and its Mermaid."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.has_mermaid = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        names = FETCHED.get(tag, ())
        if tag == "link" and not KEPT_LINKS & set(given.get("rel", "").split()):
            names = ("href",)
        self.addresses += [given[name] for name in names if name in given]
        self.has_mermaid |= "mermaid" in given.get("class", "").split()


@pytest.fixture(scope="module")
def built() -> Path:
    """The site, built as `make docs` builds it."""
    if not MKDOCS.exists():
        pytest.skip("make .venv-docs/installed makes what builds the site")
    site.build(str(MKDOCS))
    return site.SITE


def test_llms_txt_names_every_page() -> None:
    """Whatever is in the menu is in docs/llms.txt, once, and nothing else."""
    assert sorted(re.findall(r"^- \[.+?\]\((.+?)\): ", LLMS, re.MULTILINE)) == sorted(IN_NAV)


@pytest.mark.documents
@pytest.mark.xdist_group("site")
def test_every_page_is_there_as_html_and_as_markdown(built: Path) -> None:
    """Each page of the menu, and what llms.txt names, can be fetched."""
    for name in IN_NAV:
        html = re.sub(r"README\.md$", "index.md", name).removesuffix(".md") + ".html"
        assert (built / html).is_file(), html
        assert (built / name).is_file(), name
    assert (built / "llms.txt").is_file()
    assert (built / "search" / "search_index.json").stat().st_size > 100_000


@pytest.mark.documents
@pytest.mark.xdist_group("site")
def test_a_page_fetches_nothing_from_elsewhere(built: Path) -> None:
    """No script, style, font or picture has another host, so nobody learns who reads what."""
    pages = list(built.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        found = Fetches()
        found.feed(page.read_text())
        assert len(found.addresses) > 2, page
        elsewhere = [each for each in found.addresses if re.search(r"(^|[\s,])(\w+:)?//", each)]
        assert not elsewhere, page
        assert not found.has_mermaid, f"{page}: Mermaid is fetched from elsewhere"
        assert not re.search(r"@import|url\([\"']?(https?:)?//", page.read_text()), page
    for style in built.rglob("*.css"):
        text = re.sub(r"url\(data:[^)]*\)|url\(\"data:[^\"]*\"\)", "", style.read_text())
        assert not re.search(r"@import|url\([\"']?(https?:)?//", text), style


@pytest.mark.documents
@pytest.mark.xdist_group("site")
def test_no_page_shows_its_own_markup(built: Path) -> None:
    """A fence or a table that was not understood would stand there as text."""
    for page in built.rglob("*.html"):
        text = re.sub(r"<(pre|script|code)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        assert "```" not in text, page
        assert "|---" not in text, page


@pytest.mark.documents
@pytest.mark.xdist_group("site")
def test_a_dead_link_ends_the_build(
    built: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A page that is not there, and an anchor that is not there; both are named."""
    page = site.PAGES / "sdk.md"
    text = page.read_text()
    page.write_text(f"{text}\n[dead](no-such-page.md) [too](protocol.md#no-such-heading)\n")
    try:
        with pytest.raises(subprocess.CalledProcessError):
            site.render(str(MKDOCS), tmp_path)
    finally:
        page.write_text(text)
    said = capfd.readouterr().err
    assert "'no-such-page.md'" in said
    assert "'#no-such-heading'" in said
