"""`slm certs dev`: a private CA with a server and a client certificate, for trying TLS.

Knows no server. The CA's key is never written, so that no one can sign anything else with it.
"""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from slm.cli import output
from slm.errors import ConfigurationError

app = typer.Typer(help="Test certificates for TLS.", no_args_is_help=True, rich_markup_mode="rich")

_FILES: Final = ("ca.pem", "server.pem", "server-key.pem", "client.pem", "client-key.pem")


@app.callback()
def _root() -> None:
    """Test certificates for TLS."""


@app.command()
def dev(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder; created if it does not exist.")
    ],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="A name or address of the server. Repeatable."),
    ] = None,
    client: Annotated[
        str, typer.Option("--client", help="The name in the client's certificate.")
    ] = "backend",
    days: Annotated[int, typer.Option(help="How long they are valid.", min=1, max=825)] = 30,
) -> None:
    """Make a private CA, a certificate for a server and one for a client.

    To try TLS and mutual TLS on your own machines; in production use your own CA. The CA's key is
    not kept, so it cannot sign any further certificate.

    [bold]Example[/]
      slm certs dev certs --host localhost --host 127.0.0.1
      slm serve --tls-cert certs/server.pem --tls-key certs/server-key.pem
      SLM_URL=https://localhost:8760 SLM_CA_FILE=certs/ca.pem slm agents list
    """
    hosts = host or ["localhost", "127.0.0.1", "::1"]
    there = [name for name in _FILES if (directory / name).exists()]
    if there:
        raise ConfigurationError(
            f"{directory / there[0]} is there already; no certificate is replaced"
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in make_certificates(hosts, client, days).items():
            _write(directory / name, content, private=name.endswith("-key.pem"))
    except OSError as error:
        raise ConfigurationError(
            f"{directory} cannot be written to: {error.strerror or error}"
        ) from None
    output.say(f"Valid for {days} days, for {', '.join(hosts)}, in {directory}:")
    output.say("  ca.pem                        for clients: SLM_CA_FILE, or ca_file= of SLMClient")
    output.say("  server.pem, server-key.pem    for slm serve --tls-cert … --tls-key …")
    output.say("  client.pem, client-key.pem    for a server with SLM_TLS_CLIENT_CA=…/ca.pem:")
    output.say(
        "                                SLM_CLIENT_CERT and SLM_CLIENT_KEY, or client_cert="
    )


def make_certificates(hosts: list[str], client: str, days: int) -> dict[str, bytes]:
    """Return the contents of the five files, by name.

    Args:
        hosts: the server's names and addresses.
        client: the name in the client's certificate.
        days: how long they are valid.

    Raises:
        ConfigurationError: a certificate cannot contain one of the names.
    """
    until = datetime.now(UTC) + timedelta(days=days)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("SLM development CA")
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    files = {"ca.pem": ca.public_bytes(serialization.Encoding.PEM)}
    for file, name, alternatives, purpose in (
        ("server", hosts[0], [_host(text) for text in hosts], ExtendedKeyUsageOID.SERVER_AUTH),
        ("client", client, [], ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_name(name), ca_name, key.public_key(), until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        certificate = builder.sign(ca_key, hashes.SHA256())
        files[f"{file}.pem"] = certificate.public_bytes(serialization.Encoding.PEM)
        files[f"{file}-key.pem"] = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    return files


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Clocks elsewhere that are slightly slow must still accept it.
        .not_valid_before(datetime.now(UTC) - timedelta(minutes=5))
        .not_valid_after(until)
    )


def _name(text: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
    except ValueError:
        raise ConfigurationError("a name in a certificate has 1 to 64 characters") from None


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        return x509.DNSName(text)
    except ValueError:
        raise ConfigurationError("--host takes a host name in ASCII, or an IP address") from None


def _write(path: Path, content: bytes, *, private: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600 if private else 0o644), "wb") as file:
        file.write(content)
