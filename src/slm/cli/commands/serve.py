"""`slm serve`: runs the server until Ctrl-C or SIGTERM, and writes the file that commands use.

Parses options into settings and prints where things are; `slm.server` does everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Annotated

import typer

from slm.cli import output
from slm.cli.target import URL_FILE
from slm.errors import SLMError, StartupError

logger = logging.getLogger(__name__)

_TLS = "TLS"


def serve(
    host: Annotated[
        str | None,
        typer.Option(
            help="The address to listen on. \\[env var: SLM_HOST; default: 127.0.0.1]",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="The port; 0 picks a free one. \\[env var: SLM_PORT; default: 8760]",
            min=0,
            max=65535,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Where slm.db, the encryption key and the first tokens are; made if need be. "
            "\\[env var: SLM_DATA_DIR; default: slm-data]",
            show_default=False,
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            "--database-url",
            metavar="URL",
            help="postgresql://… or sqlite:///…; put a password in the variable, since "
            "arguments are seen by everyone on the machine. "
            "\\[env var: SLM_DATABASE_URL; default: slm.db in the data directory]",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            metavar="FILE",
            help="The certificate chain, in PEM. \\[env var: SLM_TLS_CERT]",
            rich_help_panel=_TLS,
            show_default=False,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key",
            metavar="FILE",
            help="Its private key, in PEM. \\[env var: SLM_TLS_KEY]",
            rich_help_panel=_TLS,
            show_default=False,
        ),
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-client-ca",
            metavar="FILE",
            help="Whoever connects must show a certificate that one of these has signed, in PEM. "
            "\\[env var: SLM_TLS_CLIENT_CA]",
            rich_help_panel=_TLS,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run the server until Ctrl-C or SIGTERM.

    In an empty data directory it creates its database, the default agent, an encryption key and two
    tokens: admin.token for you, backend.token for the backends. It prints where they are, never
    what they hold. When it is ready it prints: SLM ready at URL. On SIGHUP it reloads the TLS
    certificate.

    [bold]Examples[/]
      slm serve
      slm serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
      SLM_DATABASE_URL=postgresql://slm:…@db/slm SLM_ENCRYPTION_KEYS=… slm serve
    """
    # Imported here: the other commands need neither FastAPI nor SQLAlchemy, and start faster.
    from slm.server.serve import serve as run_server
    from slm.server.settings import load_settings
    from slm.server.settings_source import ignored_variables

    settings = load_settings(
        host=host,
        port=port,
        data_dir=data,
        database_url=database_url,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
    )
    _log_to_stderr(settings.log_level)
    if ignored := ignored_variables():
        logger.warning(ignored)
    left: list[str] = []

    def ready(url: str) -> None:
        left.append(url)
        _leave_url(settings.data_dir, url)
        output.say(f"SLM ready at {url}")

    try:
        asyncio.run(run_server(settings, on_ready=ready, on_note=output.say))
    except SLMError:
        raise
    except Exception:
        # Operators find bugs in the log, where they don't bother the user of a command.
        logger.critical("the server failed", exc_info=True)
        raise typer.Exit(1) from None
    finally:
        for url in left:
            _take_url_back(settings.data_dir, url)


def _log_to_stderr(level: str) -> None:
    """Log our own messages; only warnings of libraries, as SQL and URLs may hold secrets."""
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form)
    logging.getLogger("slm").setLevel(level.upper())


def _leave_url(data_dir: Path, url: str) -> None:
    file = data_dir / URL_FILE
    from slm.server.encryption.secret_files import replace_private

    try:
        # Readable only by us: a command sends its token to the address in it.
        replace_private(file, f"{_from_here(url)}\n")
    except StartupError as error:
        output.warning(f"{error} Commands need --url {url}.")


def _take_url_back(data_dir: Path, url: str) -> None:
    """Remove the file, unless another server has since written it in the same directory."""
    file = data_dir / URL_FILE
    with contextlib.suppress(OSError):
        if file.read_text().strip() == _from_here(url):
            file.unlink()


def _from_here(url: str) -> str:
    """Return the address as reachable from this machine; "all addresses" is only for listening."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
