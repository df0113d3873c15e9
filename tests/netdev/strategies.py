"""Netdevs as hypothesis draws them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address

from hypothesis import strategies as st

from openvmnet.netdev import Forward, Shared

PRIVATE = [IPv4Network("10.0.0.0/8"), IPv4Network("172.16.0.0/12"), IPv4Network("192.168.0.0/16")]
IDS = st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,40}", fullmatch=True)


@st.composite
def triples(draw: st.DrawFn) -> tuple[str, str, str]:
    """A valid start-address, end-address and subnet-mask."""
    block = draw(st.sampled_from(PRIVATE))
    length = draw(st.integers(block.prefixlen, 30))
    network = IPv4Network((int(draw(st.ip_addresses(v=4, network=block))), length), strict=False)
    size = network.num_addresses
    start = draw(st.integers(1, size - 3))
    end = draw(st.integers(start + 1, size - 2))
    return str(network[start]), str(network[end]), str(network.netmask)


def forwards() -> st.SearchStrategy[Forward]:
    """Published ports as they can be written."""
    hosts = st.none() | st.ip_addresses().filter(lambda one: not one.is_multicast and not _zoned(one))
    guests = st.none() | st.sampled_from([IPv4Address("192.168.64.2"), IPv6Address("fd00::2")])
    ports = st.integers(1, 65535)
    return st.builds(Forward, st.sampled_from(["tcp", "udp"]), hosts, ports, guests, ports)


def _zoned(address: IPv4Address | IPv6Address) -> bool:
    return isinstance(address, IPv6Address) and address.scope_id is not None


@st.composite
def published(draw: st.DrawFn) -> tuple[str, ...]:
    """Rules of one netdev: no port of the host's twice."""
    key = st.lists(forwards(), max_size=4, unique_by=lambda one: (one.protocol, one.host, one.host_port))
    return tuple(str(forward) for forward in draw(key))


@st.composite
def options(draw: st.DrawFn) -> Shared:
    start, end, mask = draw(st.one_of(st.just((None, None, None)), triples()))
    prefix = draw(st.none() | st.sampled_from(["fd00::", "fd12:3456:789a:1::", "fdff:ffff:ffff:ffff::/64"]))
    mtu = draw(st.none() | st.integers(1280, 65520))
    address = draw(addresses(start, end))
    return Shared(draw(IDS), draw(st.booleans()), start, end, mask, prefix, mtu, address, hostfwd=draw(published()))


@st.composite
def addresses(draw: st.DrawFn, start: str | None, end: str | None) -> str | None:
    """A valid address: one of the pool where the pool is known."""
    if start is None or end is None:
        within = st.sampled_from(PRIVATE).flatmap(lambda block: st.ip_addresses(v=4, network=block))
    else:
        within = st.integers(int(IPv4Address(start)) + 1, int(IPv4Address(end))).map(IPv4Address)
    return draw(st.none() | within.map(str))
