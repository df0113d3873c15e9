"""A hostile guest: `python -m lab.flood KIND INTERFACE GATEWAY SECONDS`, as fast as one processor sends.

    syn       SYNs from made-up ports to an open port outside
    spoof     SYNs from made-up addresses of the subnet
    udp       datagrams, each the first of a flow
    stream    datagrams of one flow
    dhcp      DISCOVERs, each from a new MAC
    arp       ARP requests with made-up senders
    dns       queries for names that nobody has
    asker     the same from made-up addresses of the subnet
    broken    frames of random octets behind a valid Ethernet header
    syn6, spoof6, udp6, broken6    the same over IPv6 (lab/flood6.py)
    ndp6, echo6    neighbour solicitations, and echo requests to the gateway, of made-up senders
Prints how many frames it sent.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

from lab.world import SERVER
from openvmnet.kernel.mmsg import Batch
from openvmnet.wire import ip

if TYPE_CHECKING:
    from collections.abc import Callable

_FRAMES = 4096
_NEW = {"dns", "asker"}  # of which the same again is nothing new
_BATCH = 64
_BROADCAST = b"\xff" * 6
_IPV4, _ARP = b"\x08\x00", b"\x08\x06"


class Flood:
    """Frames of each kind, from interface `name` of this namespace towards gateway address `gateway`."""

    def __init__(self, name: str, gateway: str) -> None:
        self.gateway = socket.inet_aton(gateway)
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.sock.bind((name, 0))
        self.mac: bytes = self.sock.getsockname()[4]
        self.address = self.gateway[:3] + b"\xc8"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((gateway, 9))
            self.address = socket.inet_aton(probe.getsockname()[0])
            probe.send(b"")  # the gateway answers ARP, so the kernel learns its MAC
        self.gateway_mac = self._resolve(gateway)

    def syn(self, _: int) -> bytes:
        """A SYN from a port of its own."""
        return self._ip(ip.build(self.address, socket.inet_aton(SERVER), ip.TCP, self._segment(self.address)))

    def spoof(self, _: int) -> bytes:
        """A SYN from an address of somebody's."""
        source = self._somebody()
        return self._ip(ip.build(source, socket.inet_aton(SERVER), ip.TCP, self._segment(source)))

    def udp(self, _: int) -> bytes:
        """A first datagram."""
        ports = random.randrange(1024, 65536), random.randrange(1024, 65536)
        return self._ip(ip.build_udp(self.address, socket.inet_aton(SERVER), *ports, b"x" * 64))

    def stream(self, _: int) -> bytes:
        """One more datagram of the same flow."""
        return self._ip(ip.build_udp(self.address, socket.inet_aton(SERVER), 4000, 9, b"x" * 1400))

    def dhcp(self, _: int) -> bytes:
        """A DISCOVER of a new client."""
        mac = b"\x02" + os.urandom(5)
        fixed = struct.pack("!BBBBIHH16s16s192x", 1, 1, 6, 0, random.getrandbits(32), 0, 0x8000, b"", mac)
        payload = fixed + b"\x63\x82\x53\x63" + b"\x35\x01\x01" + b"\xff"
        packet = ip.build_udp(bytes(4), b"\xff" * 4, 68, 67, payload)
        return _BROADCAST + mac + _IPV4 + packet

    def arp(self, _: int) -> bytes:
        """A question of somebody who is not there."""
        sender = b"\x02" + os.urandom(5) + self.gateway[:3] + bytes([random.randrange(2, 255)])
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + sender + bytes(6) + self.gateway
        return _BROADCAST + self.mac + _ARP + body

    def dns(self, _: int) -> bytes:
        """A question for a name that the cache does not have."""
        return self._question(self.address)

    def asker(self, _: int) -> bytes:
        """The same, of somebody."""
        return self._question(self._somebody())

    def _question(self, source: bytes) -> bytes:
        name = os.urandom(6).hex().encode()
        question = bytes([len(name)]) + name + b"\x07example\x04test\0" + b"\0\1\0\1"
        query = struct.pack("!HHHHHH", random.getrandbits(16), 0x0100, 1, 0, 0, 0) + question
        return self._ip(ip.build_udp(source, self.gateway, random.randrange(1024, 65536), 53, query))

    def broken(self, _: int) -> bytes:
        """Anything."""
        kind = random.choice([_IPV4, _ARP, b"\x86\xdd", b"\x81\x00", os.urandom(2)])
        return random.choice([self.gateway_mac, _BROADCAST]) + self.mac + kind + os.urandom(random.randrange(0, 1400))

    def run(self, make: Callable[[int], bytes], seconds: float, *, fresh: bool) -> int:
        """Send for `seconds`, `fresh` frames each time or the same over and over; how many went."""
        batches = [Batch(_BATCH, 1514, names=False) for _ in range(_FRAMES // _BATCH)]
        for batch in batches:
            _fill(batch, make)
        sent, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            for batch in batches:
                sent += batch.send(self.sock.fileno(), _BATCH)
                if fresh:
                    _fill(batch, make)
        return sent

    def _somebody(self) -> bytes:
        return self.gateway[:3] + bytes([random.randrange(2, 255)])

    def _ip(self, packet: bytes) -> bytes:
        return self.gateway_mac + self.mac + _IPV4 + packet

    def _segment(self, source: bytes) -> bytes:
        port, sequence = random.randrange(1024, 65536), random.getrandbits(32)
        head = struct.pack("!HHIIBBHHH", port, 7, sequence, 0, 0x50, ip.SYN, 64240, 0, 0)
        total = ip.checksum(source + socket.inet_aton(SERVER) + struct.pack("!BBH", 0, ip.TCP, len(head)) + head)
        return head[:16] + total.to_bytes(2, "big") + head[18:]

    @staticmethod
    def _resolve(gateway: str) -> bytes:
        for _ in range(100):
            with open("/proc/net/arp") as table:
                for line in table:
                    words = line.split()
                    if words[0] == gateway and words[3] != "00:00:00:00:00:00":
                        return bytes.fromhex(words[3].replace(":", ""))
            time.sleep(0.02)
        raise RuntimeError(f"{gateway} does not answer ARP")


def _fill(batch: Batch, make: Callable[[int], bytes]) -> None:
    for i in range(_BATCH):
        batch.set_payload(i, make(i))


def main(argv: list[str]) -> None:
    """The command line above."""
    kind, interface, gateway, seconds = argv
    if kind.endswith("6"):
        from lab.flood6 import Flood6

        flood: Flood = Flood6(interface, gateway)
    else:
        flood = Flood(interface, gateway)
    print(flood.run(getattr(flood, kind), float(seconds), fresh=kind in _NEW))


if __name__ == "__main__":
    main(sys.argv[1:])
