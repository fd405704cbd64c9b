"""aimock, a mock of many providers that runs on node, here for Ollama's protocol.

Installed by npm into a cache folder outside the repository, once for each version.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSION = "1.43.0"


def missing() -> str | None:
    """Say what is not there to run it with."""
    absent = [name for name in ("node", "npm") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def installed() -> Path:
    """Return where it is installed, installing it first if need be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm-tests"
    home = cache / f"aimock-{VERSION}"
    if not home.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Another test process may do the same: whoever renames first wins.
        with tempfile.TemporaryDirectory(dir=cache) as work:
            (Path(work) / "package.json").write_text("{}")
            command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
            subprocess.run(
                [*command, f"@copilotkit/aimock@{VERSION}"],
                cwd=work,
                check=True,
                capture_output=True,
                timeout=300,
            )
            try:
                (Path(work) / "node_modules").rename(home)
            except OSError:
                assert home.exists()
    return home / "@copilotkit" / "aimock"


@contextmanager
def running(fixtures: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    """Run it with these fixtures and yield its URL."""
    (folder / "fixtures.json").write_text(json.dumps({"fixtures": fixtures}))
    command = ["node", str(installed() / "dist" / "cli.js"), "--port", "0", "--chunk-size", "4"]
    # A pause between pieces, so that one is on its way before the next is cut off.
    command += ["--latency", "10"]
    with subprocess.Popen(
        [*command, "--fixtures", str(folder / "fixtures.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        output = process.stdout
        assert output is not None
        try:
            said = []
            for line in output:
                said.append(line)
                match = re.search(r"http://[\d.]+:(\d+)", line)
                if match:
                    break
            else:
                raise AssertionError(f"aimock did not start: {''.join(said)}")
            yield match[0]
        finally:
            process.terminate()
            output.close()
