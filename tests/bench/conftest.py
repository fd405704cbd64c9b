"""The bench is not in the source archive, and its tests are not collected where it is absent."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("benchmarks") else ["test_*.py"]
