"""IPv4 packets beside scapy's: what we write it reads the same, and what it writes we read the same."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import ip

scapy = pytest.importorskip("scapy.layers.inet", reason="scapy is not installed")
IP, TCP, UDP, ICMP = scapy.IP, scapy.TCP, scapy.UDP, scapy.ICMP

addresses = st.ip_addresses(v=4).map(str)
ports = st.integers(1, 65535)


def packed(address: str) -> bytes:
    return socket.inet_aton(address)


def rebuilt(packet: bytes):
    """What scapy writes when it has to find lengths and checksums by itself."""
    parsed = IP(packet)
    layer = parsed
    while layer:
        for name in ("len", "chksum"):
            if name in layer.fields and not (isinstance(layer, ICMP) and name == "len"):
                del layer.fields[name]
        layer = layer.payload
    return bytes(parsed)


@settings(max_examples=60)
@given(addresses, addresses, ports, ports, st.binary(max_size=600))
def test_udp(src, dst, sport, dport, payload):
    packet = ip.build_udp(packed(src), packed(dst), sport, dport, payload)
    # Ports that scapy knows would be dissected further; the oracle is for this layer.
    theirs = bytes(IP(src=src, dst=dst, ttl=64, flags="DF", id=0) / UDP(sport=sport, dport=dport) / payload)
    assert packet == theirs


@settings(max_examples=60)
@given(addresses, addresses, ports, ports, st.integers(0, 0xFFFFFFFF), st.binary(max_size=60))
def test_a_reset_to_scapys_syn(src, dst, sport, dport, sequence, data):
    syn = bytes(
        IP(src=src, dst=dst, options=scapy.IPOption_NOP())
        / TCP(sport=sport, dport=dport, seq=sequence, flags="S", options=[("MSS", 1460), ("SAckOK", b"")])
        / data
    )
    header = ip.parse(syn)
    reset = IP(ip.build_reset(syn, header))
    assert (reset.src, reset.dst, reset.proto) == (dst, src, 6)
    tcp = reset[TCP]
    assert (tcp.sport, tcp.dport, str(tcp.flags), tcp.seq) == (dport, sport, "RA", 0)
    assert tcp.ack == (sequence + 1) % 2**32
    assert rebuilt(bytes(reset)) == bytes(reset)


@settings(max_examples=60)
@given(addresses, addresses, st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=600), st.integers(1, 255))
def test_echo(src, dst, identifier, sequence, data, ttl):
    theirs = (
        IP(src=src, dst=dst, ttl=ttl, id=identifier ^ sequence)
        / ICMP(type="echo-reply", id=identifier, seq=sequence)
        / data
    )
    assert ip.build_echo_reply(packed(src), packed(dst), identifier, sequence, data, ttl=ttl) == bytes(theirs)


@settings(max_examples=60)
@given(addresses, addresses, addresses, ports, st.integers(68, 1500), st.binary(max_size=1400))
def test_fragmentation_needed(src, dst, router, port, mtu, payload):
    about = bytes(IP(src=src, dst=dst, flags="DF") / UDP(sport=port, dport=port) / payload)
    error = ip.build_error(packed(router), about, ip.UNREACHABLE, ip.FRAGMENTATION_NEEDED, rest=mtu)
    theirs = IP(error)
    assert (theirs.src, theirs.dst) == (router, src)
    assert (theirs[ICMP].type, theirs[ICMP].code, theirs[ICMP].nexthopmtu) == (3, 4, mtu)
    quoted = theirs[scapy.IPerror]
    assert (quoted.src, quoted.dst, quoted.proto) == (src, dst, 17)
    assert theirs[scapy.UDPerror].sport == port
    del theirs[ICMP].chksum
    del theirs.chksum
    assert bytes(theirs) == error


@settings(max_examples=100)
@given(
    addresses, addresses, st.integers(0, 255), st.integers(0, 255), st.booleans(), st.booleans(), st.integers(0, 8191),
    st.integers(0, 10), st.binary(max_size=100),
)  # fmt: skip
def test_parsing_scapys_headers(src, dst, protocol, ttl, dont, more, offset, options, payload):
    flags = ("DF" if dont else "") + ("+" if dont and more else "") + ("MF" if more else "")
    packet = bytes(
        IP(
            src=src, dst=dst, proto=protocol, ttl=ttl, flags=flags or 0, frag=offset,
            options=[scapy.IPOption_NOP() for _ in range(4 * options)],
        )
        / payload
    )  # fmt: skip
    if more or offset:
        with pytest.raises(Malformed):
            ip.parse(packet)
        return
    length = 20 + 4 * options
    expected = ip.Header(packed(src), packed(dst), protocol, ttl, dont, length, length + len(payload), 1)
    assert ip.parse(packet) == expected
