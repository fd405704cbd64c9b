"""Metadata services and special ranges are refused in every form, when an endpoint is saved."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.common.addresses import METADATA_NAMES, is_public, literal_address, refused_address
from slm.endpoints import EndpointPolicy, origin, refused_endpoint
from tests.support.http import Caller, agent

METADATA = (
    "169.254.169.254 169.254.170.2 169.254.170.23 169.254.42.42 169.254.0.23 168.63.129.16 "
    "100.100.100.200 192.0.0.192 fd00:ec2::254 fd00:ec2::23 fd20:ce::254 fd00:c1::a9fe:a9fe "
    "fd00:42::42 fd00:a9fe:a9fe::1 fd00:100::100:200 fe80::a9fe:a9fe"
)
IPV4_METADATA = [address for address in METADATA.split(" ") if ":" not in address]
SPECIAL = "fec0::1 fec0:0:0:ffff::1 feff::1 :: ff02::1 0.0.0.0 0.1.2.3 224.0.0.1 255.255.255.255"
ALLOWED = "127.0.0.1 10.0.0.7 192.168.1.4 ::1 fd12::1 8.8.8.8 2606:4700::1111 64:ff9b::808:808"


def _forms(address: str) -> dict[str, str]:
    """Return the IPv6 addresses that stand for, or hold, an IPv4 one."""
    four = ipaddress.IPv4Address(address)
    high, low = f"{int(four) >> 16:x}", f"{int(four) & 0xFFFF:x}"
    a, b, c, d = four.packed
    client = int(four) ^ 0xFFFFFFFF
    return {
        "mapped": f"::ffff:{four}",
        "compatible": f"::{four}",
        "translated": f"::ffff:0:{four}",
        "NAT64": f"64:ff9b::{four}",
        "local NAT64, /96": f"64:ff9b:1::{four}",
        "local NAT64, /96, further": f"64:ff9b:1:fffe:1:2:{high}:{low}",
        "local NAT64, /64": f"64:ff9b:1:7:{a:x}:{b << 8 | c:x}:{d << 8:x}:0",
        "local NAT64, /56": f"64:ff9b:1:{7 << 8 | a:x}:{b:x}:{c << 8 | d:x}:0:0",
        "local NAT64, /48": f"64:ff9b:1:{high}:{c:x}:{d << 8:x}:0:0",
        "6to4": f"2002:{high}:{low}::1",
        "Teredo": f"2001:0:4136:e378:8000:63bf:{client >> 16:x}:{client & 0xFFFF:x}",
        "Teredo's server": f"2001:0:{high}:{low}::1",
        "ISATAP": f"2001:db8::5efe:{high}:{low}",
        "ISATAP, global": f"2001:db8::200:5efe:{high}:{low}",
    }


FORMS = list(_forms("0.0.0.0"))


@pytest.mark.parametrize("address", METADATA.split(" "))
def test_every_clouds_metadata_is_refused(address: str) -> None:
    """EC2, EKS, GCE, Azure, Oracle, Alibaba, Tencent, Scaleway, Akamai and OpenStack."""
    parsed = ipaddress.ip_address(address)
    assert "metadata" in (refused_address(parsed) or "")
    # Nor does a deployment's own list let one through.
    assert EndpointPolicy(True, ("0.0.0.0/0", "::/0", "x")).refused_address(parsed, "x")
    host = f"[{address}]" if ":" in address else address
    assert refused_endpoint(f"http://{host}:80/v1")


@pytest.mark.parametrize("form", FORMS)
def test_an_address_inside_another_is_judged(form: str) -> None:
    """Mapped, compatible, translated, NAT64, 6to4, Teredo and ISATAP forms hold an IPv4 address."""
    for address in IPV4_METADATA:
        held = _forms(address)[form]
        assert refused_address(ipaddress.ip_address(held)), held
        assert refused_endpoint(f"http://[{held}]/"), held
    private = ipaddress.ip_address(_forms("10.0.0.7")[form])
    assert refused_address(private) is None
    assert EndpointPolicy(strict=True).refused_address(private)


def test_special_ranges() -> None:
    """Site-local, unspecified, multicast and broadcast addresses are no host's."""
    for address in SPECIAL.split(" "):
        assert refused_address(ipaddress.ip_address(address)), address
    for address in ALLOWED.split(" "):
        assert refused_address(ipaddress.ip_address(address)) is None, address
    scoped = ipaddress.ip_address("fd00:ec2::254%eth0")
    assert refused_address(scoped) == refused_address(ipaddress.ip_address("fd00:ec2::254"))


@given(four=st.ip_addresses(v=4), form=st.sampled_from(FORMS))
def test_no_form_is_more_than_what_it_holds(four: ipaddress.IPv4Address, form: str) -> None:
    """Where the IPv4 address is refused or not public, no IPv6 address that holds it is."""
    held = ipaddress.ip_address(_forms(str(four))[form])
    metadata = "metadata" in (refused_address(four) or "")
    assert not metadata or refused_address(held)
    assert is_public(four) or not is_public(held)


@given(address=st.ip_addresses(v=6))
def test_a_key_for_one_address_is_not_for_what_it_holds(address: ipaddress.IPv6Address) -> None:
    """Judging an address by what it holds makes no two of them one origin, nor any loopback."""
    if address.ipv4_mapped is None:
        assert literal_address(f"[{address}]") == address
        assert origin("openai", f"http://[{address}]") == f"http://[{address}]:80"


async def test_they_are_refused_when_saved(ask: Caller) -> None:
    """422 for each address, in brackets or not, and for the names of metadata services."""
    hosts = [f"[{a}]" if ":" in a else a for a in METADATA.split(" ")]
    hosts += [f"[{a}]" for a in _forms("169.254.169.254").values()]
    hosts += [*METADATA_NAMES, "Metadata.Google.Internal", "[fec0::1]"]
    for host in hosts:
        made = await ask("POST", "/api/agents", agent("a", llm_endpoint=f"http://{host}/v1"))
        assert (made.status, made.code) == (422, "invalid-request"), host
