"""Rows: what a guest keeps of its throughput, and of its connections, while its neighbour floods the network
(lab/flood.py).

The flood takes a processor of the same machine, wherever it goes. So the figure stands beside that of the same guest
while the same flood goes to a bare bridge of somebody else's, with as many ports: what is lost to the flood as such,
and not to a busy machine, is the difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

from lab.bench_small import PORTS, exchange, exchange_server
from lab.bench_tcp import iperf
from lab.netguest import PluggedNetwork
from lab.netns import Namespace, link
from lab.paths import CHECKOUT
from lab.rivals import KERNEL_GATEWAY, client
from lab.rows import OURS, Bench, Sampler, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.world import World

_KINDS = {
    "syn": "SYNs",
    "spoof": "SYNs from made-up addresses",
    "udp": "first datagrams of flows",
    "stream": "datagrams of one flow",
    "dhcp": "DHCP DISCOVERs of new MACs",
    "arp": "ARP requests",
    "dns": "DNS queries for new names",
    "asker": "DNS queries for new names from made-up addresses",
    "broken": "broken frames",
}
_LEAD = 0.7  # s that a flood has before its effect is measured
_ELSEWHERE = "the flood elsewhere"
_FORWARDED = "the flood by kernel forwarding"
_GATEWAY = "192.168.64.1"


class _Setting:
    """A network with a good and a bad guest, and a bad guest on a bridge of its own."""

    def __init__(self, world: World) -> None:
        self.network = PluggedNetwork(world, "flooded", ports=2)
        self.good, self.bad = self.network.plug(), self.network.plug()
        self.elsewhere, bridge, third = (world.namespace(f"flood-{name}") for name in ("guest", "bridge", "third"))
        link(self.elsewhere, "eth0", bridge, "port0")
        link(third, "eth0", bridge, "port1")
        bridge.batch("link add br0 type bridge", f"addr add {_GATEWAY}/24 dev br0", "link set br0 up")
        bridge.batch("link set port0 master br0", "link set port1 master br0")
        self.elsewhere.batch("addr add 192.168.64.99/24 dev eth0")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.network.close()


def _setting(bench: Bench) -> _Setting:
    made: _Setting = bench.once("flood", lambda: _Setting(bench.world))
    return made


def _under(flooder: Namespace, gateway: str, kind: str, seconds: float, measure: Callable[[], float]) -> float:
    command = [sys.executable, "-m", "lab.flood", kind, "eth0", gateway, f"{seconds + 2 * _LEAD}"]
    environment = os.environ | {"PYTHONPATH": f"{CHECKOUT}"}
    process = flooder.popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(_LEAD)
    try:
        return measure()
    finally:
        sent, errors = process.communicate(timeout=30)
        if process.returncode or not int(sent):
            raise RuntimeError(f"the flood did not run: {errors[-300:]}")


def _register(kind: str, what: str) -> None:
    # Datagrams of one flow are traffic, which has to be carried wherever it goes: there the kernel is the measure.
    rival = _FORWARDED if kind == "stream" else _ELSEWHERE

    @row(f"flood-{kind}", f"TCP, 1 stream, while a neighbour floods {what}", unit="Gbit/s", aims={rival: 0.8})
    def _flooded(bench: Bench) -> Iterator[dict[str, Sampler]]:
        setting = _setting(bench)

        def throughput() -> float:
            return iperf(setting.good, bench.seconds)

        samplers = _samplers(bench, setting, kind, throughput)
        if rival == _FORWARDED:
            flooder = client(bench, "kernel")
            samplers[rival] = lambda: _under(flooder, KERNEL_GATEWAY, kind, bench.seconds, throughput)
        yield samplers

    @row(
        f"flood-{kind}-connect", f"TCP connections, one after the other, while a neighbour floods {what}", unit="per s"
    )
    def _connecting(bench: Bench) -> Iterator[dict[str, Sampler]]:
        setting = _setting(bench)
        with exchange_server(bench.world.internet):
            yield _samplers(bench, setting, kind, lambda: exchange(setting.good, "connect", PORTS, bench.seconds, 1))


def _samplers(bench: Bench, setting: _Setting, kind: str, measure: Callable[[], float]) -> dict[str, Sampler]:
    """`measure()` while the flood goes here, and elsewhere."""
    gateway, seconds = setting.network.gateway, bench.seconds
    return {
        OURS: lambda: _under(setting.bad, gateway, kind, seconds, measure),
        _ELSEWHERE: lambda: _under(setting.elsewhere, _GATEWAY, kind, seconds, measure),
    }


for _kind, _what in _KINDS.items():
    _register(_kind, _what)
