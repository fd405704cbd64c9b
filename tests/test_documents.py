"""What the documents say is so: links lead on, the protocol's table is whole; so are the locks."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slm import errors

ROOT = Path(__file__).parents[1]
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def tracked_files() -> list[Path]:
    """Return the files under version control, or in an unpacked archive all that look like it."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        names = [ROOT / name for name in done.stdout.split("\0") if name]
    else:
        names = [p for p in ROOT.rglob("*") if not {".venv", ".git"} & set(p.parts)]
    return [path for path in names if path.is_file()]


def test_the_protocol_lists_every_error_code() -> None:
    """The table of codes in docs/protocol.md is that of the errors that the server answers."""
    table = re.findall(r"^\| ([45]\d\d) \| (`.*`) \|$", PROTOCOL, re.MULTILINE)
    told = {(int(status), code) for status, codes in table for code in re.findall("[a-z-]+", codes)}
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    problems = {each for each in kinds if issubclass(each, errors.ProblemError)}
    assert told == {(each.status, each.code) for each in problems - {errors.ProblemError}}


def anchors(document: Path) -> set[str]:
    """Return the anchors that a code forge gives the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each).lower() for each in headings]
    return {re.sub(r"[^\w\- ]", "", each).strip().replace(" ", "-") for each in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link of a document names a file, and a heading in it, that is there."""
    links = re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", document.read_text())
    for target, anchor in links:
        page = document.parent / target if target else document
        assert page.exists(), target
        if anchor and page.suffix == ".md":
            assert anchor in anchors(page), f"{target}#{anchor}"


def test_nothing_names_a_machine_or_a_registry() -> None:
    """No tracked file holds a path of somebody's machine or tells pip where to look."""
    # Put together here, so that this file does not hold them either.
    hosts = [
        ".".join(name) for name in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))
    ]
    options = [
        "--" + "index-url",
        "--extra" + "-index-url",
        "--find" + "-links",
        "--trusted" + "-host",
    ]
    home = re.compile("/" + r"(?:home|Users|root|work)/[.a-z]")
    for path in tracked_files():
        text = path.read_text(errors="replace")
        for word in hosts + options:
            assert word not in text, f"{path.relative_to(ROOT)} holds {word}"
        assert not home.search(text), path.relative_to(ROOT)


def test_the_locks_pin_everything_by_hash() -> None:
    """Each requirement of a lock is an exact version with at least one hash."""
    for name in ("requirements.lock", "requirements-model.lock", "tools/docs/requirements.txt"):
        text = (ROOT / name).read_text()
        entries = re.split(r"\n(?=\S)", text.strip())
        assert entries
        for entry in entries:
            assert re.match(r"[a-z0-9.-]+==\S+", entry), entry
            assert "--hash=sha256:" in entry, entry


def test_the_lock_has_what_the_package_needs() -> None:
    """Every requirement of pyproject.toml is in the lock, at a version that it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", lock, re.MULTILINE))
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            continue
        name = canonicalize_name(requirement.name)
        assert name in pins, text
        assert requirement.specifier.contains(pins[name], prereleases=True), text
