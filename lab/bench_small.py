"""Rows: what costs per packet and per connection: connections, single exchanges, datagrams, memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

from lab.paths import CHECKOUT
from lab.rivals import client
from lab.rows import OURS, Bench, Sampler, row
from lab.world import IPERF_PORTS, SERVER

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from lab.netns import Namespace

_RIVALS = ("kernel", "slirp4netns bridge", "slirp4netns direct", "pasta bridge", "pasta direct")
_PORT, PORTS = 7000, 16  # lab.exchange says why several
WIDTH = 16  # connections under way at once
_DATAGRAM = 1400  # octets


def _all(bench: Bench, sample: Callable[[Namespace], float]) -> dict[str, Sampler]:
    def sampler(who: str) -> Sampler:
        return lambda: sample(client(bench, who))

    return {who: sampler(who) for who in (OURS, *_RIVALS)}


@contextlib.contextmanager
def exchange_server(where: Namespace, address: str = SERVER, port: int = _PORT) -> Iterator[None]:
    """lab.exchange's server in a namespace, such as the world's internet."""
    command = [sys.executable, "-m", "lab.exchange", "server", address, str(port), str(PORTS)]
    process = where.popen(command, env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the exchange server did not start")
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def exchange(client: Namespace, what: str, *numbers: float, server: str = SERVER, port: int = _PORT) -> float:
    """Exchanges a second of lab.exchange's clients."""
    command = [sys.executable, "-m", "lab.exchange", what, server, str(port), *(f"{number:g}" for number in numbers)]
    report = json.loads(client.run(command, env=environment(), timeout=60).stdout)
    if report["errors"]:
        raise RuntimeError(f"{report['errors']} connections failed")
    return float(report["per_second"])


def environment() -> dict[str, str]:
    """What `python -m lab...` needs in another namespace."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT)}


@row("connect", "TCP connections: connect, one byte each way, close; 16 at once", unit="per s",
     aims={"slirp4netns bridge": 1, "pasta bridge": 1})  # fmt: skip
def _connect(bench: Bench) -> Iterator[dict[str, Sampler]]:
    with exchange_server(bench.world.internet):
        yield _all(bench, lambda guest: exchange(guest, "connect", PORTS, bench.seconds, WIDTH))


@row("request", "TCP, one byte each way, one after the other", unit="per s",
     aims={"slirp4netns bridge": 1, "pasta bridge": 1})  # fmt: skip
def _request(bench: Bench) -> Iterator[dict[str, Sampler]]:
    with exchange_server(bench.world.internet):
        yield _all(bench, lambda guest: exchange(guest, "request", bench.seconds))


def _datagrams(guest: Namespace, seconds: float, bits: float) -> tuple[float, float]:
    """Datagrams of 1,400 octets that arrived in a second, and the share in per cent of those sent that did not."""
    command = ["iperf3", "-c", SERVER, "-p", str(IPERF_PORTS[2]), "-u", "-b", f"{bits:.0f}", "-l", str(_DATAGRAM)]
    command += ["-t", f"{seconds:g}", "-i", "0", "-J"]
    report = json.loads(guest.run(command, check=False, timeout=seconds + 30).stdout)
    if "error" in report:
        raise RuntimeError(report["error"])
    total = report["end"]["sum"]
    return (total["packets"] - total["lost_packets"]) / total["seconds"], float(total["lost_percent"])


@row("udp-rate", "UDP, 1,400-octet datagrams that arrive, guest to outside", unit="per s")
def _udp_rate(bench: Bench) -> Iterator[dict[str, Sampler]]:
    rates: dict[str, list[float]] = bench.kept.setdefault("udp rates", {})

    def sampler(who: str) -> Sampler:
        def sample() -> float:
            rates.setdefault(who, []).append(_datagrams(client(bench, who), bench.seconds, 0)[0])
            return rates[who][-1]

        return sample

    yield {who: sampler(who) for who in (OURS, *_RIVALS)}


@row("udp-loss", "UDP, loss at 90 % of each one's own rate", unit="%", better="lower")
def _udp_loss(bench: Bench) -> Iterator[dict[str, Sampler]]:
    rates: dict[str, list[float]] = bench.kept.setdefault("udp rates", {})

    def sampler(who: str) -> Sampler:
        def sample() -> float:
            guest = client(bench, who)
            if who not in rates:
                rates[who] = [_datagrams(guest, bench.seconds, 0)[0]]
            return _datagrams(guest, bench.seconds, 0.9 * statistics.median(rates[who]) * _DATAGRAM * 8)[1]

        return sample

    yield {who: sampler(who) for who in (OURS, *_RIVALS)}


@row("udp-loss-equal", "UDP, loss at one rate for all, 90 % of what slirp4netns bridge takes", unit="%", better="lower")
def _udp_loss_equal(bench: Bench) -> Iterator[dict[str, Sampler]]:
    rates: dict[str, list[float]] = bench.kept.setdefault("udp rates", {})
    slow = "slirp4netns bridge"

    def sampler(who: str) -> Sampler:
        def sample() -> float:
            if slow not in rates:
                rates[slow] = [_datagrams(client(bench, slow), bench.seconds, 0)[0]]
            bits = 0.9 * statistics.median(rates[slow]) * _DATAGRAM * 8
            return _datagrams(client(bench, who), bench.seconds, bits)[1]

        return sample

    yield {who: sampler(who) for who in (OURS, *_RIVALS)}


def _memory(pids: list[int]) -> float:
    """Megabytes of processes' proportional set size: pages that several share are counted once."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            found = re.search(r"^Pss: +(\d+) kB", file.read(), re.MULTILINE)
        total += int(found[1]) if found else 0
    return total * 1024 / 1e6


@row("memory", "memory of network process and agent at rest", unit="MB", better="lower", aims={"60 MB": 1})
def _rest(bench: Bench) -> Iterator[dict[str, Sampler]]:
    client(bench, OURS)
    network = bench.kept["network"]
    yield {OURS: lambda: _memory([network.pid, network.agent]), "60 MB": lambda: 60.0}


@row("memory-flows", "memory of 1,000 idle TCP flows more", unit="MB", better="lower")
def _flows(bench: Bench) -> Iterator[dict[str, Sampler]]:
    guest = client(bench, OURS)
    network = bench.kept["network"]
    held: list[socket.socket] = []

    def sample() -> float:
        before = _memory([network.pid, network.agent])
        for _ in range(1000):
            sock = guest.socket()
            held.append(sock)
            sock.connect((SERVER, 7))
        return _memory([network.pid, network.agent]) - before

    try:
        yield {OURS: sample}
    finally:
        for sock in held:
            sock.close()
