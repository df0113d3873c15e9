"""A hostile guest's frames of IPv6, for lab/flood.py."""

from __future__ import annotations

import os
import random
import socket
import struct

from lab.flood import Flood
from lab.world import SERVER6
from openvmnet.wire import ip, ip6

_IPV6 = b"\x86\xdd"
_SERVER = socket.inet_pton(socket.AF_INET6, SERVER6)


class Flood6(Flood):
    """Frames of each kind of IPv6, from interface `name` of this namespace towards the gateway."""

    def __init__(self, name: str, gateway: str) -> None:
        super().__init__(name, gateway)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect((SERVER6, 9))
            self.address = socket.inet_pton(socket.AF_INET6, probe.getsockname()[0])
        self.prefix = self.address[:8]

    def syn6(self, _: int) -> bytes:
        """A SYN from a port of its own."""
        return self._syn(self.address)

    def spoof6(self, _: int) -> bytes:
        """A SYN from an address that nobody has had before."""
        return self._syn(self.prefix + os.urandom(8))

    def udp6(self, _: int) -> bytes:
        """A first datagram."""
        ports = random.randrange(1024, 65536), random.randrange(1024, 65536)
        return self._ip6(ip6.build_udp(self.address, _SERVER, *ports, b"x" * 64))

    def ndp6(self, _: int) -> bytes:
        """A question for a neighbour, of somebody who is not there."""
        sender, target = self.prefix + os.urandom(8), self.prefix + os.urandom(8)
        group = bytes.fromhex("ff0200000000000000000001ff") + target[13:]
        body = struct.pack("!BBHI", 135, 0, 0, 0) + target + b"\1\1" + self.mac
        packet = ip6.build_icmp(sender, group, body, ttl=255)
        return b"\x33\x33\xff" + target[13:] + self.mac + _IPV6 + packet

    def echo6(self, _: int) -> bytes:
        """An echo request to the gateway, of somebody who is not there."""
        gateway = self.prefix + (1).to_bytes(8, "big")
        return self._ip6(ip6.build_echo_request(self.prefix + os.urandom(8), gateway, 1, 1, b""))

    def broken6(self, _: int) -> bytes:
        """Chains of headers of random octets."""
        kinds = [random.choice([0, 43, 44, 51, 60, 58, 17, 6, random.randrange(256)]) for _ in range(4)]
        body = b"".join(bytes([kind, random.randrange(3)]) + os.urandom(random.choice([6, 14])) for kind in kinds[1:])
        packet = ip6.build(self.address, random.choice([_SERVER, self.prefix + bytes(7) + b"\1"]), kinds[0], body)
        return self._ip6(packet)

    def _ip6(self, packet: bytes) -> bytes:
        return self.gateway_mac + self.mac + _IPV6 + packet

    def _syn(self, source: bytes) -> bytes:
        port, sequence = random.randrange(1024, 65536), random.getrandbits(32)
        head = struct.pack("!HHIIBBHHH", port, 7, sequence, 0, 0x50, ip.SYN, 64240, 0, 0)
        total = ip.checksum(source + _SERVER + struct.pack("!II", len(head), ip.TCP) + head)
        return self._ip6(ip6.build(source, _SERVER, ip.TCP, head[:16] + total.to_bytes(2, "big") + head[18:]))
