"""The built wheel, in environments that hold exactly what it says it needs.

Nothing is downloaded: an environment is made by linking the packages that the wheel requires, and
what those require, out of the one that runs the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source tree as a release builds it."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    target = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (built,) = target.glob("*.tar.gz")
    with tarfile.open(built) as packed:
        packed.extractall(target, filter="data")
    (folder,) = (path for path in target.iterdir() if path.is_dir())
    return folder


def needed(requirements: Iterable[str], extras: frozenset[str]) -> dict[str, Distribution]:
    """Return the distributions that the requirements name, and those that they need in turn."""
    found: dict[str, Distribution] = {}
    done: set[tuple[str, str]] = set()
    pending = [(text, extras) for text in requirements]
    while pending:
        text, wanted = pending.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in wanted | {""}
        ):
            continue
        name = requirement.name.lower()
        if (name, str(requirement)) in done:
            continue
        done.add((name, str(requirement)))
        if name == "autobot-slm":
            continue
        found[name] = dist = distribution(name)
        pending += [(inner, frozenset(requirement.extras)) for inner in dist.requires or []]
    return found


def environment(path: Path, wheel: Path, *extras: str) -> Path:
    """Make an environment with the wheel and what it requires with these extras; its python."""
    venv.create(path, symlinks=True)
    python = path / "bin" / "python"
    answer = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    site = Path(answer.stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (metadata,) = site.glob("autobot_slm-*.dist-info/METADATA")
    requires = re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(), re.MULTILINE)
    for dist in needed(requires, frozenset(extras)).values():
        for top in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(dist.locate_file(top))))
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this python away from the source tree and without the tests' own settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLM_", "PYTHON"))}
    return subprocess.run(
        [python, "-I", *arguments],
        cwd=python.parent,
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Types, migrations and the license are in it; tests, docs and secrets are not."""
    names = zipfile.ZipFile(wheel).namelist()
    assert "slm/py.typed" in names
    assert any(re.fullmatch(r"slm/server/db/migrations/versions/\w+\.py", name) for name in names)
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"slm", "autobot_slm"}


def test_the_description_has_no_link_that_leads_nowhere(wheel: Path) -> None:
    """On the package index only absolute links work, so there is no other one."""
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (n for n in packed.namelist() if n.endswith("dist-info/METADATA"))
        head, _, text = packed.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert text.startswith("# SLM")
    assert len(text) > 2000
    targets = re.findall(r"\]\(([^)]*)\)|(?:href|src)=\"([^\"]*)\"", text)
    assert not [one or other for one, other in targets if not re.match(r"https?:|#", one or other)]


def test_the_source_distribution_is_whole(archive: Path, tmp_path: Path) -> None:
    """It has what a contributor reads and runs, and the same wheel can be built from it."""
    names = {path.name for path in archive.iterdir()}
    assert names >= {"CONTRIBUTING.md", "SECURITY.md", "README.md", "CHANGELOG.md", "LICENSE"}
    assert names >= {"Makefile", "src", "tests", "docs", "benchmarks", "requirements.lock"}
    assert not names & {".venv", ".git", "slm-data", "dist"}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=archive, check=True, capture_output=True, timeout=60)
    (built,) = tmp_path.glob("*.whl")
    assert "slm/py.typed" in zipfile.ZipFile(built).namelist()


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    """No file of src/slm is left out."""
    source = ROOT / "src"
    wanted = {
        str(path.relative_to(source))
        for path in (source / "slm").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_the_base_install_needs_three_packages(wheel: Path) -> None:
    """Without an extra: aiohttp, cryptography and pydantic, and what those need themselves."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("dist-info/METADATA"))
        metadata = archive.read(name).decode()
    requires = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    base = [Requirement(text).name for text in requires if "extra ==" not in text]
    assert sorted(base) == ["aiohttp", "cryptography", "pydantic"]
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert extras >= {"server", "postgres", "openai", "anthropic", "ollama", "all", "dev"}


def test_the_base_install_is_the_sdk_alone(wheel: Path, tmp_path: Path) -> None:
    """With aiohttp, pydantic and cryptography alone, `import slm` works and knows no server."""
    python = environment(tmp_path / "env", wheel)
    script = (
        "import sys, slm; slm.SLMClient; slm.LLMInterface; print(slm.__file__); "
        "print(sorted({'fastapi', 'sqlalchemy', 'openai', 'typer', 'rich'} & set(sys.modules)))"
    )
    done = run(python, "-c", script)
    assert done.returncode == 0, done.stderr
    where, loaded = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert loaded == "[]"
    for missing in ("fastapi", "typer", "openai"):
        assert run(python, "-c", f"import {missing}").returncode != 0


def test_the_base_install_takes_every_provider(wheel: Path, tmp_path: Path) -> None:
    """No SDK is missed: an openai backend does not refuse the default agent on ollama."""
    python = environment(tmp_path / "env", wheel)
    script = (
        "from slm import ResolvedConfig, Step; from slm.endpoints import EndpointPolicy; "
        "from slm.llm.validator import Check; check = Check(EndpointPolicy()); "
        "print([check(ResolvedConfig(agent_id='a', step=Step.AGENT, llm_provider=name, "
        "llm_model='m')) for name in ('ollama', 'openai', 'anthropic')])"
    )
    done = run(python, "-c", script)
    assert done.stdout == "[None, None, None]\n", done.stderr


def test_the_base_install_says_how_to_get_the_command_line(wheel: Path, tmp_path: Path) -> None:
    """`slm` without its extra is one sentence that names the extra, not a traceback."""
    python = environment(tmp_path / "env", wheel)
    done = run(python, "-m", "slm", "agents", "list")
    assert done.returncode == 1
    assert "pip install 'autobot-slm[server]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_server_extra_is_enough_to_serve(wheel: Path, tmp_path: Path) -> None:
    """The wheel with [server] starts on an empty directory, migrations and all."""
    python = environment(tmp_path / "env", wheel, "server")
    data = tmp_path / "data"
    process = subprocess.Popen(
        [python, "-I", "-m", "slm", "serve", "--port", "0", "--data", str(data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("SLM ready at "):
                break
        else:
            pytest.fail("".join(lines))
        listed = run(python, "-m", "slm", "agents", "list", "--json", "--data", str(data))
        assert listed.returncode == 0, listed.stderr
        assert '"agent_id": "default"' in listed.stdout
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
