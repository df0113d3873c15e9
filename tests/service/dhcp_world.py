"""A network of its own for DHCP tests: `python -m tests.service.dhcp_world DIRECTORY [MAC ADDRESS]`, in new namespaces.

It makes a bridge with a veth to the namespace `client`, serves DHCP on the bridge, and writes one JSON line to standard
output per answer and when it is ready. It ends, and everything with it, when its standard input closes. ADDRESS is kept
for the client with MAC.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from openvmnet.kernel.loop import Lane, run
from openvmnet.service.dhcp import DhcpConfig, DhcpServer, Reply
from openvmnet.service.dhcp_socket import DhcpService
from openvmnet.service.leases import LeaseBook
from openvmnet.wire import dhcp4

GATEWAY_MAC = bytes.fromhex("525400000001")
PORT, STATIC_PORT = 7, 8
"""The marks that the firewall of this world gives to what comes from port1, the client's, and from port2."""

CONFIG = DhcpConfig(
    gateway=IPv4Address("192.168.64.1"),
    prefixlen=24,
    first=IPv4Address("192.168.64.2"),
    last=IPv4Address("192.168.64.254"),
    gateway_mac=GATEWAY_MAC,
    dns=(IPv4Address("192.168.64.1"),),
    search=("vmnet.internal", "example.org"),
    mtu=1400,
    routes=((IPv4Network("10.20.0.0/16"), IPv4Address("192.168.64.1")),),
)


def sh(*command: str, stdin: str = "") -> None:
    """Run a command that has to succeed."""
    subprocess.run(command, check=True, input=stdin.encode(), stdout=subprocess.DEVNULL)


def build(gateway: str = "192.168.64.1/24") -> None:
    """Bridge and client namespace, in a new network and mount namespace; the machine's own files are covered."""
    sh("mount", "-t", "tmpfs", "tmpfs", "/run")
    for directory in ("/var/lib/dhcp", "/var/lib/dhcpcd"):
        if os.path.isdir(directory):
            sh("mount", "-t", "tmpfs", "tmpfs", directory)
    resolv = os.path.realpath("/etc/resolv.conf")
    if os.path.exists(resolv):
        Path("/run/resolv.conf").touch()
        sh("mount", "--bind", "/run/resolv.conf", resolv)
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "link", "add", "vmnet0", "address", GATEWAY_MAC.hex(":"), "type", "bridge", "forward_delay", "0")
    sh("ip", "addr", "add", gateway, "dev", "vmnet0")
    sh("ip", "link", "set", "vmnet0", "up")
    sh("ip", "netns", "add", "client")
    sh("ip", "link", "add", "port1", "type", "veth", "peer", "name", "eth0", "netns", "client")
    sh("ip", "link", "set", "port1", "master", "vmnet0", "up")
    sh("ip", "-n", "client", "link", "set", "lo", "up")
    sh("ip", "-n", "client", "link", "set", "eth0", "address", "52:54:00:aa:bb:01")
    sh("ip", "-n", "client", "link", "set", "eth0", "up")
    sh(
        "nft",
        "-f",
        "-",
        stdin=f"""table bridge marks {{
            chain prerouting {{
                type filter hook prerouting priority -300;
                iifname "port1" meta mark set {PORT};
                iifname "port2" meta mark set {STATIC_PORT};
            }}
        }}""",
    )


def sockets() -> tuple[socket.socket, socket.socket, socket.socket]:
    """The three sockets of the service, on vmnet0."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"vmnet0")
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    udp.bind(("0.0.0.0", dhcp4.SERVER_PORT))
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.bind(("vmnet0", 0))
    arp = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
    arp.bind(("vmnet0", 0x0806))
    return udp, raw, arp


class Recorder(DhcpService):
    """Says what it sends, and how many seconds after the message that it answers it left."""

    def __init__(self, lane: Lane, server: DhcpServer) -> None:
        super().__init__(lane, *sockets(), server)
        self._came: dict[tuple[int, bytes], float] = {}
        handle = server.handle

        def timed(payload: bytes, **known: object) -> Reply | None:
            message = dhcp4.parse(payload)
            self._came[message.xid, message.chaddr] = time.monotonic()
            reply = handle(payload, **known)
            if reply is None:
                self._say(message, answered=False)
            return reply

        server.handle = timed

    def _send(self, reply: Reply) -> None:
        super()._send(reply)
        self._say(dhcp4.parse(reply.payload), raw=reply.raw)

    def _say(self, message: dhcp4.Message, **more: object) -> None:
        event = {
            "type": message.type(),
            "mac": message.chaddr.hex(":"),
            "ip": str(IPv4Address(message.yiaddr)),
            "took": time.monotonic() - self._came[message.xid, message.chaddr],
            "leases": [
                {"ip": str(lease.ip), "mac": lease.mac.hex(":"), "name": lease.hostname, "port": lease.port}
                for lease in self.server.leases
            ],
            "in_use": {str(IPv4Address(ip)): known.port for ip, known in self.server.pool._conflicts.items()},
        }
        print(json.dumps(event | more), flush=True)


async def serve(lane: Lane, directory: Path, kept: list[str]) -> None:
    """Serve until standard input closes."""
    book = LeaseBook(directory / "leases.json")
    server = DhcpServer(CONFIG, book)
    if kept:
        server.reserve(IPv4Address(kept[1]), bytes.fromhex(kept[0].replace(":", "")), PORT)
    service = Recorder(lane, server)
    service.start()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(done.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    await done.wait()
    service.close()


def main() -> None:
    build()
    run(lambda lane: serve(lane, Path(sys.argv[1]), sys.argv[2:]))


if __name__ == "__main__":
    main()
