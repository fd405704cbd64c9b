"""Which IP addresses no request may go to, in every form in which one can embed another.

Pure rules; knows no URL and resolves no name.

The list of metadata services is of November 2026. Its sources: the instance metadata pages of AWS
EC2, Amazon EKS (Pod Identity), Google Compute Engine, Azure (168.63.129.16), Oracle Cloud, Alibaba
Cloud, Tencent Cloud, Scaleway, Akamai and IBM Cloud, and cloud-init's documentation of its data
sources. The embedded forms: RFC 4291 (mapped, compatible), 2765 (translated), 6052 and 8215
(NAT64), 3056 (6to4), 4380 (Teredo), 5214 (ISATAP); RFC 3879 deprecates site-local addresses.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

METADATA_NAMES: Final = frozenset(
    {
        "metadata",
        "metadata.google.internal",
        "metadata.goog",
        "metadata.tencentyun.com",
        "api.metadata.cloud.ibm.com",
        "instance-data",
        "instance-data.ec2.internal",
    }
)
"""Names of metadata services; most resolve to 169.254.169.254."""

# Only those outside the link-local ranges, which contain all the others.
_METADATA: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "fd00:ec2::/32",  # AWS: instance metadata ::254, EKS Pod Identity ::23, DNS, NTP
        "fd20:ce::254/128",  # Google Cloud
        "fd00:c1::a9fe:a9fe/128",  # Oracle Cloud
        "192.0.0.192/32",  # Oracle Cloud, Classic
        "168.63.129.16/32",  # Azure
        "100.100.100.200/32",  # Alibaba Cloud
        "fd00:100::100:200/128",  # Alibaba Cloud
        "fd00:42::42/128",  # Scaleway
        "fd00:a9fe:a9fe::1/128",  # Akamai
    )
)
_THIS_NETWORK: Final = ipaddress.IPv4Network("0.0.0.0/8")
_BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64: Final = ipaddress.IPv6Network("64:ff9b:1::/48")
_LAST_32_BITS: Final = tuple(
    ipaddress.IPv6Network(text) for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96")
)
_LOOPBACK: Final = ipaddress.IPv6Address("::1")
_UNSPECIFIED: Final = ipaddress.IPv6Address("::")
_ISATAP: Final = (0x00005EFE, 0x02005EFE)


def literal_address(host: str) -> IPAddress | None:
    """Return the address that `host` spells, in any form a resolver accepts, or None for a name.

    `http://2852039166/` and `http://0xA9FEA9FE/` also reach 169.254.169.254. For an IPv4-mapped
    address, returns the IPv4 address, which is the one that answers.
    """
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def refused_address(address: IPAddress) -> str | None:
    """Return why a request may never go to this address, or None if it may.

    Loopback and private ranges are allowed, because that is where an Ollama server runs.
    """
    for meant in _meant(address):
        reason = _metadata(meant) or _no_host(meant)
        if reason is not None:
            return reason
    # Only that network knows where the IPv4 address is embedded; most matches are coincidence.
    return next(filter(None, map(_metadata, _in_local_nat64(address))), None)


def is_public(address: IPAddress) -> bool:
    """Return whether the address, and each that it embeds, is public."""
    return all(
        meant.is_global and (meant.version == 4 or meant in _GLOBAL_UNICAST)
        for meant in _meant(address)
    )


def held_addresses(address: IPAddress) -> tuple[IPAddress, ...]:
    """Return the addresses by which this one is judged: the embedded ones, itself, or both."""
    return _meant(address)


def _metadata(address: IPAddress) -> str | None:
    if address.is_link_local:
        return "is a link-local or cloud metadata address"
    if any(address.version == known.version and address in known for known in _METADATA):
        return "is a cloud metadata address"
    return None


def _no_host(address: IPAddress) -> str | None:
    if address.is_multicast or address.is_unspecified or address == _BROADCAST:
        return "is not the address of a host"
    if isinstance(address, ipaddress.IPv4Address):
        return "is not the address of a host" if address in _THIS_NETWORK else None
    return "is a site-local address, which are no longer in use" if address.is_site_local else None


def _meant(address: IPAddress) -> tuple[IPAddress, ...]:
    if isinstance(address, ipaddress.IPv4Address):
        return (address,)
    if address.scope_id is not None:
        address = ipaddress.IPv6Address(int(address))
    if address in (_LOOPBACK, _UNSPECIFIED):
        return (address,)
    number = int(address)
    last = ipaddress.IPv4Address(number & 0xFFFFFFFF)
    if address in _NAT64 or any(address in network for network in _LAST_32_BITS):
        return (last,)
    if address.sixtofour is not None:
        return (address, address.sixtofour)
    if address.teredo is not None:
        return (address, *address.teredo)
    if number >> 32 & 0xFFFFFFFF in _ISATAP:
        return (address, last)
    return (address,)


def _in_local_nat64(address: IPAddress) -> tuple[IPAddress, ...]:
    """Return the IPv4 address at each position where RFC 6052 section 2.2 may put it."""
    if isinstance(address, ipaddress.IPv4Address) or address not in _LOCAL_NAT64:
        return ()
    number = int(address)
    # Bits 64 to 71 are always skipped.
    packed = (number >> 64 << 56) | (number & ((1 << 56) - 1))
    found = [packed >> shift & 0xFFFFFFFF for shift in (40, 32, 24)]
    return tuple(ipaddress.IPv4Address(value) for value in (*found, number & 0xFFFFFFFF))
