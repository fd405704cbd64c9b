"""Makes the package index's description out of README.md, where relative links lead nowhere.

With `Source` in [project.urls] they become absolute; without it the path stays behind the words.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def description(readme: str, source: str | None) -> str:
    """Return the text of README.md without a link or an image that only a checkout has."""

    def replaced(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        if source is not None:
            kind = "raw" if image else "blob"
            return f"{image}[{words}]({source.rstrip('/')}/{kind}/HEAD/{target})"
        path = target.partition("#")[0]
        if image:
            return f"*({words}: {path} in the source distribution)*"
        return words if path in words else f"{words} ({path})"

    return _LINK.sub(replaced, readme)


class CustomMetadataHook(MetadataHookInterface):
    """What hatchling asks for the metadata that pyproject.toml leaves open."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": description(readme, source),
        }
