"""`python -m tools.docs`: write the generated parts of docs/ anew."""

from __future__ import annotations

from tools.docs.pages import PAGES, ROOT, regenerated


def main() -> None:
    """Write each page that has generated parts, and name those that changed."""
    for name in PAGES:
        path = ROOT / name
        if (text := regenerated(name)) != path.read_text():
            path.write_text(text)
            print(f"{name} is written anew")


main()
