"""Protocols that nothing carries to the outside, through a whole network: the guest is told."""

from __future__ import annotations

import json
import socket
import struct
import time

import pytest

from lab.world import SERVER, SERVER6

pytestmark = pytest.mark.kernel
# What is no multiple of the checksum's, so that the kernel does not take it for one that is right.
PAYLOAD = b"a payload without a checksum"
IP_IN_IP, IP6_IN_IP, GRE, ESP, OSPF, SCTP = 4, 41, 47, 50, 89, 132


def unsupported(world) -> int:
    shown = json.loads(world.product_run(["vmnet", "show", "uplink", "--json"]).stdout)
    return shown["counters"]["firewall_unsupported"]


@pytest.mark.parametrize("protocol", [IP_IN_IP, IP6_IN_IP, GRE, ESP, OSPF, SCTP])
def test_the_guest_is_told_by_the_gateway(world, guest, network, protocol):
    before = unsupported(world)
    with (
        guest.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as errors,
        guest.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as sender,
    ):
        errors.settimeout(3)
        sender.sendto(PAYLOAD, (SERVER, 0))
        packet, (source, _) = errors.recvfrom(4096)
    assert (source, packet[20], packet[21]) == (network.gateway, 3, 2)  # protocol unreachable
    quoted = packet[28:]
    assert (quoted[9], socket.inet_ntoa(quoted[16:20]), quoted[20:]) == (protocol, SERVER, PAYLOAD)
    assert unsupported(world) == before + 1


@pytest.mark.parametrize("protocol", [IP_IN_IP, GRE, OSPF, SCTP])
def test_the_same_by_ipv6(world, guest, network, protocol):
    before = unsupported(world)
    with (
        guest.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as errors,
        guest.socket(socket.AF_INET6, socket.SOCK_RAW, protocol) as sender,
    ):
        errors.settimeout(0.2)
        sender.sendto(PAYLOAD, (SERVER6, 0))
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            try:
                message, (source, *_) = errors.recvfrom(4096)
            except TimeoutError:
                continue
            if message[0] == 1:
                break
        else:
            pytest.fail("no error came")
    assert (source, message[1]) == (network.gateway6, 1)  # administratively prohibited
    (length,) = struct.unpack_from("!H", message, 12)
    assert (length, message[14], message[48:]) == (len(PAYLOAD), protocol, PAYLOAD)
    assert unsupported(world) == before + 1
