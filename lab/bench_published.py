"""Rows: ports of a guest's that are published on the host (`hostfwd`), used by clients beyond the host.

pasta is here without a bridge alone: it sends to whichever MAC spoke last, and that is often the bridge's own.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lab.bench_small import PORTS, WIDTH, exchange, exchange_server
from lab.bench_tcp import iperf, iperf_server
from lab.netguest import PluggedNetwork
from lab.rivals import KERNEL_GUEST, PUBLISHED, client, published
from lab.rows import OURS, Bench, Sampler, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.netns import Namespace
    from lab.world import World

_RIVALS = ("kernel", "slirp4netns bridge", "slirp4netns direct", "pasta direct")
_GUEST = "192.168.90.201"
_ADDRESSES = "start-address=192.168.90.1,end-address=192.168.90.99,subnet-mask=255.255.255.0"
_NFT_PUBLISH = """
table ip lab_published {{
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    iifname "eth0" tcp dport {first}-{last} dnat to {guest}
  }}
}}
"""


@row("hostfwd-in", "TCP, 1 stream, outside to a published port", unit="Gbit/s")
def _in(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _streams(bench)


@row("hostfwd-out", "TCP, 1 stream, published port to outside", unit="Gbit/s")
def _out(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _streams(bench, "-R")


@row("hostfwd-connect", "TCP connections to a published port: connect, one byte each way, close; 16 at once",
     unit="per s", aims={"slirp4netns bridge": 1})  # fmt: skip
def _connect(bench: Bench) -> Iterator[dict[str, Sampler]]:
    def sample(server: str, port: int) -> float:
        return exchange(bench.world.internet, "connect", PORTS, bench.seconds, WIDTH, server=server, port=port)

    yield _samplers(bench, sample)


def _streams(bench: Bench, *options: str) -> dict[str, Sampler]:
    def sample(server: str, port: int) -> float:
        return iperf(bench.world.internet, bench.seconds, *options, server=server, port=port + PORTS)

    return _samplers(bench, sample)


def _samplers(bench: Bench, sample: Callable[[str, int], float]) -> dict[str, Sampler]:
    def sampler(who: str) -> Sampler:
        def take() -> float:
            bench.once(f"published {who}", lambda: _served(bench, who))
            return sample(*published(who))

        return take

    return {who: sampler(who) for who in (OURS, *_RIVALS)}


@contextlib.contextmanager
def _served(bench: Bench, who: str) -> Iterator[None]:
    """Contender `who`'s guest serves its ports: the first PORTS with lab.exchange, the last one with iperf3."""
    guest, first = _guest(bench, who), published(who)[1]
    with exchange_server(guest, "0.0.0.0", first), iperf_server(guest, first + PORTS):
        yield


def _guest(bench: Bench, who: str) -> Namespace:
    if who == OURS:
        network: PluggedNetwork = bench.once("published network", lambda: _network(bench.world))
        guest: Namespace = bench.once("published guest", lambda: contextlib.nullcontext(network.plug()))
        return guest
    guest = client(bench, who)
    if who == "kernel":
        bench.once("published by the kernel", lambda: _dnat(bench.world))
    return guest


def _network(world: World) -> PluggedNetwork:
    first = published(OURS)[1]
    rules = "".join(f",hostfwd=tcp::{port}-{_GUEST}:{port}" for port in range(first, first + PUBLISHED))
    return PluggedNetwork(world, "published", options=f",{_ADDRESSES}{rules}")


@contextlib.contextmanager
def _dnat(world: World) -> Iterator[None]:
    first = published("kernel")[1]
    text = _NFT_PUBLISH.format(first=first, last=first + PUBLISHED - 1, guest=KERNEL_GUEST)
    host = next(one for one in world.namespaces if one.name.endswith("-kernel-host"))
    host.run(["nft", "-f", "-"], input=text)
    yield
    host.run(["nft", "delete", "table", "ip", "lab_published"])
