"""The command `slm`: one file a command group. The only room that sees both server and client.

The base install of the package has the command but not what it is made of, so `main` says how to
get that; everything else is imported inside it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and end the process with its exit code (see `slm --help`)."""
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
        # Loading takes a second on a busy machine; nobody who gives up wants a traceback of it.
        sys.exit(130)
    sys.exit(run())
