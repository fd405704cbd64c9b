"""The `slm` command: one file per command group. The only package that sees server and client.

The base install has the command but not its dependencies, so `main` explains how to install them;
everything else is imported inside it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its exit code (see `slm --help`)."""
    try:
        from slm.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "slm").partition(".")[0] == "slm":
            raise
        print(
            "error: the command line comes with the server: pip install 'autobot-slm[server]'"
            f" (missing here: {error.name})",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        # Loading takes a second on a busy machine; no one who interrupts it wants a traceback.
        sys.exit(130)
    sys.exit(run())
