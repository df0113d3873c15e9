"""openvmnet's name server by itself: `python -m lab.name_server ADDRESS RESOLV_CONF [SECONDS]`.

Serves port 53 of ADDRESS, in the namespace that it is started in, for a network 192.168.64.0/24 whose guests vm2 to
vm254 have the addresses of those numbers; `printf 'vm7 192.168.64.70\n'` to its standard input changes one, and
`stats` prints the counters as a line of JSON. It ends with its standard input. With SECONDS, profiles itself that long.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import socket
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

from openvmnet.kernel import loop
from openvmnet.service.dns import DnsService
from openvmnet.service.dns_zone import Zone

if TYPE_CHECKING:
    from openvmnet.kernel.loop import Lane

SUBNET = IPv4Network("192.168.64.0/24")
GATEWAY = SUBNET[1]
DOMAIN = "vmnet.internal"


class Names:
    """The guests' names, as a lease book has them."""

    def __init__(self) -> None:
        self.addresses = {f"vm{number}": SUBNET[number] for number in range(2, 255)}
        self.changes = 0

    def set(self, name: str, address: str) -> None:
        """Give a name another address."""
        self.addresses[name] = IPv4Address(address)
        self.changes += 1

    def name_of(self, address: IPv4Address) -> str | None:
        """The name of an address."""
        return next((name for name, one in self.addresses.items() if one == address), None)

    def generation(self) -> int:
        """How often names have changed."""
        return self.changes


def zone(names: Names) -> Zone:
    """The zone of these names."""
    return Zone(
        domain=DOMAIN,
        subnet=SUBNET,
        gateway=GATEWAY,
        forward=names.addresses.get,
        reverse=names.name_of,
        generation=names.generation,
    )


def sockets(address: str, port: int) -> tuple[socket.socket, socket.socket]:
    """The service's two sockets: UDP, and TCP listening."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, port))
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tcp.bind((address, port))
    tcp.listen(128)
    return udp, tcp


async def _main(lane: Lane) -> None:
    names = Names()
    service = DnsService(lane, *sockets(sys.argv[1], 53), zone=zone(names), resolv_conf=Path(sys.argv[2]))
    service.start()
    ended = asyncio.Event()

    def on_input() -> None:
        words = sys.stdin.readline().split()
        if words == ["stats"]:
            print(json.dumps(service.stats), flush=True)
        elif len(words) == 2:
            names.set(*words)
            print("ok", flush=True)
        else:
            ended.set()

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), on_input)
    print("ready", flush=True)
    await ended.wait()
    service.close()


async def _profiled(lane: Lane) -> None:
    profile = cProfile.Profile()
    task = asyncio.create_task(_main(lane))
    await asyncio.sleep(1)
    profile.enable()
    await asyncio.sleep(float(sys.argv[3]))
    profile.disable()
    profile.create_stats()
    profile.print_stats("tottime")
    await task


if __name__ == "__main__":
    loop.run(_profiled if len(sys.argv) > 3 else _main)
