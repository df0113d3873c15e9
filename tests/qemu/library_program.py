"""A program with the library, as the tests start it on the lab's host: `python -c THIS JSON`, the answer is JSON too.

It is a guest by hand: DHCP, ARP and ICMP over an interface, frame by frame; scapy writes and reads the frames.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

logging.getLogger("scapy").setLevel(logging.ERROR)

from scapy.layers.dhcp import BOOTP, DHCP  # noqa: E402 - scapy talks while it is imported
from scapy.layers.inet import ICMP, IP, UDP  # noqa: E402 - as above
from scapy.layers.l2 import ARP, Ether  # noqa: E402 - as above

import openvmnet  # noqa: E402 - as above

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet import Interface


class Guest:
    """A host's stack, as small as can be."""

    def __init__(self, interface: Interface) -> None:
        self.interface = interface
        self.mac = interface.parameters.mac_address or "52:54:00:de:ad:01"
        self.address = ""
        self.broken: list[str] = []  # frames whose checksums do not hold

    def send(self, packet: Any) -> None:
        self.interface.write([bytes(packet)])

    def until(self, found: Callable[[Any], object], seconds: float = 5.0) -> Any:
        """The first frame for which `found` holds; who asks for the address and who pings is answered meanwhile."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.interface.wait(left)
            for data in self.interface.read():
                packet = Ether(data)
                self.check(packet)
                self.answer(packet)
                if found(packet):
                    return packet
        return None

    def check(self, packet: Any) -> None:
        if IP in packet and packet.haslayer(UDP) and packet[UDP].chksum:
            fresh = Ether(bytes(packet))
            del fresh[UDP].chksum
            if Ether(bytes(fresh))[UDP].chksum != packet[UDP].chksum:
                self.broken.append(packet.summary())
        if len(packet) > self.interface.parameters.max_packet_size:
            self.broken.append(f"{len(packet)} octets: {packet.summary()}")

    def answer(self, packet: Any) -> None:
        if ARP in packet and packet[ARP].op == 1 and packet[ARP].pdst == self.address:
            asker = packet[ARP]
            reply = ARP(op=2, hwsrc=self.mac, psrc=self.address, hwdst=asker.hwsrc, pdst=asker.psrc)
            self.send(Ether(src=self.mac, dst=asker.hwsrc) / reply)
        if ICMP in packet and packet[ICMP].type == 8 and packet[IP].dst == self.address:
            echo = ICMP(type=0, id=packet[ICMP].id, seq=packet[ICMP].seq) / bytes(packet[ICMP].payload)
            self.send(Ether(src=self.mac, dst=packet.src) / IP(src=self.address, dst=packet[IP].src) / echo)

    def dhcp(self) -> str:
        """An address by DISCOVER, OFFER, REQUEST, ACK."""
        raw = bytes.fromhex(self.mac.replace(":", ""))

        def ask(*options: Any) -> Any:
            head = Ether(src=self.mac, dst="ff:ff:ff:ff:ff:ff") / IP(src="0.0.0.0", dst="255.255.255.255")
            boot = BOOTP(chaddr=raw, xid=77, flags=0x8000)
            self.send(head / UDP(sport=68, dport=67) / boot / DHCP(options=[*options, "end"]))
            return self.until(lambda packet: BOOTP in packet and packet[BOOTP].xid == 77 and packet[BOOTP].op == 2)

        offer = ask(("message-type", "discover"))
        server = next(value for name, value in (o for o in offer[DHCP].options if len(o) == 2) if name == "server_id")
        want = offer[BOOTP].yiaddr
        ack = ask(("message-type", "request"), ("requested_addr", want), ("server_id", server))
        self.address = ack[BOOTP].yiaddr
        return self.address

    def arp(self, address: str) -> str | None:
        self.send(Ether(src=self.mac, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=self.mac, psrc=self.address, pdst=address))
        answer = self.until(lambda packet: ARP in packet and packet[ARP].op == 2 and packet[ARP].psrc == address, 2)
        return None if answer is None else answer[ARP].hwsrc

    def ping(self, address: str) -> bool:
        mac = self.arp(address)
        if mac is None:
            return False
        self.send(Ether(src=self.mac, dst=mac) / IP(src=self.address, dst=address) / ICMP(id=5, seq=6) / bytes(1400))
        return self.until(lambda packet: ICMP in packet and packet[ICMP].type == 0 and packet[ICMP].id == 5) is not None


def be_a_guest(interface: Interface, asked: dict[str, Any]) -> dict[str, Any]:
    guest = Guest(interface)
    found: dict[str, Any] = {"address": guest.dhcp(), "mac": guest.mac}
    for address in asked.get("ping", []):
        found[address] = guest.ping(address)
    print(json.dumps(found), flush=True)
    guest.until(lambda _: False, asked.get("stay", 0.0))
    return {"broken": guest.broken}


def serve(interface: Interface, asked: dict[str, Any]) -> dict[str, Any]:
    """Answer one UDP datagram to port 53 in capitals, to where it came from."""
    guest = Guest(interface)
    print(json.dumps({"address": guest.dhcp()}), flush=True)
    asker = guest.until(lambda packet: UDP in packet and packet[UDP].dport == 53, asked["seconds"])
    back = IP(src=guest.address, dst=asker[IP].src) / UDP(sport=53, dport=asker[UDP].sport)
    guest.send(Ether(src=guest.mac, dst=asker.src) / back / bytes(asker[UDP].payload).upper())
    return {"from": asker[IP].src}


def flood(interface: Interface, asked: dict[str, Any]) -> dict[str, Any]:
    """Broadcasts for some seconds, a hundred each hundredth of a second."""
    data = bytes(Ether(src=Guest(interface).mac, dst="ff:ff:ff:ff:ff:ff", type=0x88B5) / bytes(100))
    deadline, sent = time.monotonic() + asked["seconds"], 0
    while time.monotonic() < deadline:
        interface.write([data] * 100)
        sent += 100
        time.sleep(0.01)
    return {"sent": sent}


def fail() -> None:
    """Every way in which a start fails on a real network; the statuses and sentences."""
    taken = openvmnet.Shared(start_address="192.168.90.1", end_address="192.168.90.9", subnet_mask="255.255.255.0")
    other = openvmnet.Shared(start_address="192.168.90.1", end_address="192.168.90.99", subnet_mask="255.255.255.0")
    found = []
    with openvmnet.start(taken, name="taken", linger=0):
        for options, name in ((other, "taken"), (other, "another"), (openvmnet.Bridged(ifname="none"), None)):
            found.append(_failure(options, name))
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd")))
        for spare in range(1, 5):  # at each descriptor that a start needs
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, limit[1]))
            try:
                found.append(_failure(taken, "taken"))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        print(json.dumps({"failures": found}), flush=True)
        sys.stdin.readline()


def _failure(options: Any, name: str | None) -> list[Any]:
    try:
        openvmnet.start(options, name=name, linger=0).stop()
    except openvmnet.VmnetError as error:
        return [type(error).__name__, int(error.status), error.message]
    return ["", 1000, ""]


def main(asked: dict[str, Any]) -> None:
    if asked["do"] == "interfaces":
        print(json.dumps({"interfaces": openvmnet.interfaces()}))
        return
    if asked["do"] == "fail":
        fail()
        return
    options = openvmnet.netdev.parse(asked.get("options", "vmnet-shared,id=n0"))
    work = {"be a guest": be_a_guest, "flood": flood, "serve": serve}[asked["do"]]
    with openvmnet.start(options, **asked.get("start", {})) as interface:
        print(json.dumps(work(interface, asked)), flush=True)


main(json.loads(sys.argv[1]))
