"""Rows: TCP throughput of a namespace guest to the outside, and from guest to guest over the bridge."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from typing import TYPE_CHECKING

from lab.netguest import PluggedNetwork
from lab.netns import Namespace, link
from lab.rivals import client
from lab.rows import OURS, Bench, Sampler, row
from lab.world import IPERF_PORTS, SERVER, SERVER6

if TYPE_CHECKING:
    from collections.abc import Iterator

_RIVALS = ("kernel", "kernel nested", "slirp4netns bridge", "slirp4netns direct", "pasta bridge", "pasta direct")


def iperf(guest: Namespace, seconds: float, *options: str, server: str = SERVER, port: int = IPERF_PORTS[0]) -> float:
    """Gbit/s that arrived; the first half second, in which TCP finds its window, is left out by iperf3."""
    command = ["iperf3", "-c", server, "-p", str(port), "-t", f"{seconds:g}", "-O", "0.5", "-i", "0", "-J"]
    done = guest.run([*command, *options], check=False, timeout=seconds + 30)
    report = json.loads(done.stdout)
    if "error" in report:
        raise RuntimeError(report["error"])
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9


@contextlib.contextmanager
def iperf_server(where: Namespace, port: int = IPERF_PORTS[0]) -> Iterator[None]:
    """iperf3's server in a namespace; it listens."""
    command = ["iperf3", "-s", "-p", str(port)]
    server = where.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not where.run(["ss", "-Hltn", "sport", "=", str(port)]).stdout:
            time.sleep(0.01)
        yield
    finally:
        server.kill()
        server.wait()


def _outside(bench: Bench, *options: str) -> dict[str, Sampler]:
    def sampler(who: str) -> Sampler:
        return lambda: iperf(client(bench, who), bench.seconds, *options)

    return {who: sampler(who) for who in (OURS, *_RIVALS)}


@row("tcp-1-up", "TCP, 1 stream, guest to outside", unit="Gbit/s", aims={"kernel": 0.95, "kernel nested": 0.95})
def _one_up(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _outside(bench)


@row("tcp-1-down", "TCP, 1 stream, outside to guest", unit="Gbit/s", aims={"kernel": 0.95, "kernel nested": 0.95})
def _one_down(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _outside(bench, "-R")


@row("tcp-8-up", "TCP, 8 streams, guest to outside", unit="Gbit/s", aims={"kernel": 0.8, "kernel nested": 0.8})
def _eight_up(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _outside(bench, "-P", "8")


@row("tcp-8-down", "TCP, 8 streams, outside to guest", unit="Gbit/s", aims={"kernel": 0.8, "kernel nested": 0.8})
def _eight_down(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _outside(bench, "-P", "8", "-R")


def _beside_ipv4(bench: Bench, *options: str) -> dict[str, Sampler]:
    guest = client(bench, OURS)
    return {
        OURS: lambda: iperf(guest, bench.seconds, *options, server=SERVER6),
        "openvmnet IPv4": lambda: iperf(guest, bench.seconds, *options),
    }


@row("tcp6-1-up", "TCP over IPv6, 1 stream, guest to outside", unit="Gbit/s", aims={"openvmnet IPv4": 0.9})
def _one_up6(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _beside_ipv4(bench)


@row("tcp6-1-down", "TCP over IPv6, 1 stream, outside to guest", unit="Gbit/s", aims={"openvmnet IPv4": 0.9})
def _one_down6(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _beside_ipv4(bench, "-R")


# ethtool's names: of a NIC that takes and gives frames as they are, and of the TAP behind it (drivers/net/tun.c).
_NIC = [word for name in ("tx", "sg", "tso", "gso", "gro") for word in (name, "off")]
_TAP = ["tx", "off", "tso", "off", "sg", "on", "gro", "off"]


@row("mtu-native-up", "guest without offloads and with the host's own CPU, TCP up, MTU 65,520", unit="Gbit/s",
     aims={"MTU 1,500": 3})  # fmt: skip
def _mtu_up(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _by_mtu(bench)


@row("mtu-native-down", "guest without offloads and with the host's own CPU, TCP down, MTU 65,520", unit="Gbit/s",
     aims={"MTU 1,500": 3})  # fmt: skip
def _mtu_down(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _by_mtu(bench, "-R")


def _by_mtu(bench: Bench, *options: str) -> dict[str, Sampler]:
    """What a guest whose NIC takes frames as they are gains by larger ones; `mtu-up` has one with an emulated CPU."""

    def sampler(mtu: int) -> Sampler:
        return lambda: iperf(bench.once(f"plain guest {mtu}", lambda: _plain(bench, mtu)), bench.seconds, *options)

    return {OURS: sampler(65520), "MTU 1,500": sampler(1500)}


@contextlib.contextmanager
def _plain(bench: Bench, mtu: int) -> Iterator[Namespace]:
    with PluggedNetwork(bench.world, f"plain{mtu}", options=f",mtu={mtu}") as network:
        guest = network.plug()
        guest.run(["ethtool", "-K", "eth0", *_NIC])
        command = [*network.inside, "ethtool", "-K", "vm900", *_TAP]
        subprocess.run(command, check=True, timeout=30, stdout=subprocess.DEVNULL)  # it names what changed with it
        yield guest


@row("vm-to-vm", "TCP, 1 stream, guest to guest", unit="Gbit/s", aims={"bare bridge": 0.95})
def _neighbours(bench: Bench) -> Iterator[dict[str, Sampler]]:
    """Two guests of one network, beside two namespaces on a bridge with nothing else."""
    one = client(bench, OURS)
    network = bench.kept["network"]
    other = network.plug()
    address = other.run(["ip", "-4", "-o", "addr", "show", "eth0"]).stdout.split()[3].partition("/")[0]
    bare, left, right = (bench.world.namespace(name) for name in ("bare", "left", "right"))
    bare.batch("link add br0 type bridge", "link set br0 up")
    for guest, last in ((left, 1), (right, 2)):
        link(guest, "eth0", bare, f"port{last}")
        bare.batch(f"link set port{last} master br0")
        guest.batch(f"addr add 10.98.0.{last}/24 dev eth0")
    with iperf_server(other), iperf_server(right):
        yield {
            OURS: lambda: iperf(one, bench.seconds, server=address),
            "bare bridge": lambda: iperf(left, bench.seconds, server="10.98.0.2"),
        }
