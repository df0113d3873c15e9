"""Rows: DHCP, measured by Kea's perfdhcp beside dnsmasq, which probes no address here (--no-ping), as ours does not.

perfdhcp poses as a relay agent, which sends from the server's port: a guest of the product may not do that. So both
servers stand on a bare bridge, as root, with their leases in a file; ours without the limit of messages per port:
`python -m lab.bench_dhcp serve DEVICE FILE`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.netns import Namespace, link
from lab.paths import CHECKOUT
from lab.rows import OURS, Bench, Sampler, row
from openvmnet.kernel.loop import Lane, run
from openvmnet.service.dhcp import DhcpConfig, DhcpServer
from openvmnet.service.dhcp_socket import DhcpService
from openvmnet.service.leases import LeaseBook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.world import World

_NETWORK = IPv4Network("10.98.0.0/22")
_GATEWAY, _FIRST, _LAST = IPv4Address("10.98.0.1"), IPv4Address("10.98.0.10"), IPv4Address("10.98.3.250")
_TESTER = "10.98.0.2"  # perfdhcp wants an address of its own
_MAC = bytes.fromhex("5a00000000fe")
_CLIENTS = 500
_LADDER = (250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000)  # exchanges a second
_BEARABLE = 0.01  # of the messages unanswered
_COUNTS = re.compile(r"sent packets: (\d+)\s+received packets: (\d+)")
_DELAYS = re.compile(r"avg delay: ([\d.]+) ms")


def perfdhcp(guest: Namespace, rate: int, seconds: float, clients: int) -> tuple[float, float]:
    """Four-way exchanges, `rate` a second for `seconds` by so many clients: share of messages that got no answer, and
    mean milliseconds of an exchange (both answers together)."""
    command = ["perfdhcp", "-4", "-l", "eth0", "-r", str(rate), "-R", str(clients), "-p", f"{max(1, round(seconds))}"]
    # What is under way at the end would count as lost.
    command += ["-W", "500000"]
    report = guest.run(command, check=False, timeout=seconds + 30).stdout
    counts, delays = _COUNTS.findall(report), _DELAYS.findall(report)
    if len(counts) != 2 or len(delays) != 2:
        raise RuntimeError(f"perfdhcp did not finish: {report[-300:]}")
    sent = sum(int(count[0]) for count in counts)
    lost = sum(int(count[0]) - int(count[1]) for count in counts)
    return lost / sent, sum(map(float, delays))


@row("dhcp", "DHCP: one exchange, at 100 a second, none unanswered", unit="ms", better="lower")
def _exchange(bench: Bench) -> Iterator[dict[str, Sampler]]:
    def sampler(guest: Namespace) -> float:
        for _ in range(2):  # once more, where the machine was busy elsewhere
            lost, delay = perfdhcp(guest, 100, bench.seconds, _CLIENTS)
            if not lost:
                return delay
        raise RuntimeError(f"{lost:.2%} of the messages got no answer, twice")

    yield _contenders(bench, sampler)


@row("dhcp-rate", "DHCP: exchanges with at most 1 % of messages unanswered", unit="per s", aims={"dnsmasq": 1})
def _rate(bench: Bench) -> Iterator[dict[str, Sampler]]:
    def sampler(guest: Namespace) -> float:
        best = 0
        for rate in _LADDER:
            # The machine may have been busy elsewhere: a rate has failed when it fails twice.
            if all(perfdhcp(guest, rate, 1, _CLIENTS)[0] > _BEARABLE for _ in range(2)):
                break
            best = rate
        return float(best)

    yield _contenders(bench, sampler)


def _contenders(bench: Bench, sampler: Callable[[Namespace], float]) -> dict[str, Sampler]:
    samplers: dict[str, Sampler] = {}
    for who in (OURS, "dnsmasq"):
        guest: Namespace = bench.once(f"dhcp {who}", partial(_served, bench.world, who))
        samplers[who] = partial(sampler, guest)
    return samplers


@contextlib.contextmanager
def _served(world: World, who: str) -> Iterator[Namespace]:
    """A guest behind a bridge on which `who` serves DHCP, as root, leases kept in a file."""
    short = "".join(filter(str.isalpha, who))[:5]
    host, guest = world.namespace(f"dhcp-{short}"), world.namespace(f"dhcp-{short}-guest")
    host.batch("link add br0 type bridge", f"addr add {_GATEWAY}/{_NETWORK.prefixlen} dev br0", "link set br0 up")
    link(guest, "eth0", host, "port0")
    host.batch("link set port0 master br0")
    guest.batch(f"addr add {_TESTER}/{_NETWORK.prefixlen} dev eth0")
    leases = world.directory / f"{short}.leases"
    if who == OURS:
        command = [sys.executable, "-m", "lab.bench_dhcp", "serve", "br0", str(leases)]
    else:
        command = [
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=br0"),
            *("--bind-interfaces", "--no-ping", "--dhcp-authoritative", "--user=root", "--pid-file="),
            *(f"--dhcp-range={_FIRST},{_LAST},1d", f"--dhcp-leasefile={leases}", "--dhcp-lease-max=2000"),
        ]
    process = host.popen(
        command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _await_server(host, process)
        # The first answers wait for ARP, in the kernel's short queue.
        perfdhcp(guest, 50, 1, _CLIENTS)
        yield guest
    finally:
        process.kill()
        process.wait()


def _await_server(host: Namespace, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 10
    while ":67 " not in host.run(["ss", "-Hlun"]).stdout:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the DHCP server did not start (exit status {process.poll()})")
        time.sleep(0.02)


async def _serve(lane: Lane, device: str, leases: Path) -> None:
    config = DhcpConfig(
        gateway=_GATEWAY,
        prefixlen=_NETWORK.prefixlen,
        first=_FIRST,
        last=_LAST,
        gateway_mac=_MAC,
        dns=(_GATEWAY,),
        mtu=1500,
        rate=1_000_000,
    )
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    udp.bind(("0.0.0.0", 67))
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.bind((device, 0))
    DhcpService(lane, udp, raw, None, DhcpServer(config, LeaseBook(leases))).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "serve":
        raise SystemExit("usage: python -m lab.bench_dhcp serve DEVICE FILE")
    run(lambda lane: _serve(lane, sys.argv[2], Path(sys.argv[3])))
