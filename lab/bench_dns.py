"""Rows: DNS queries per second, beside dnsmasq, each server alone in a namespace and dnsperf in another, over veth.

Three mixes: 1,000 names that a server has forwarded once and keeps (TTL 300 s); the names of guests; and names that are
new each time, which have to be forwarded and all come from one upstream server, dnsmasq again, in a third namespace.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

from lab.netns import Namespace, link
from lab.paths import CHECKOUT
from lab.rows import OURS, Bench, Sampler, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SERVER, _UPSTREAM = "192.168.64.1", "198.18.53.1"
_RIVAL = "dnsmasq"
_NAMES = 1000
_fresh = itertools.count()


class _Setting(NamedTuple):
    client: Namespace
    server: Namespace
    directory: Path


@contextlib.contextmanager
def _setting(bench: Bench) -> Iterator[_Setting]:
    client, server, upstream = (bench.world.namespace(f"dns-{name}") for name in ("client", "server", "upstream"))
    link(client, "eth0", server, "vmnet0")
    link(server, "eth0", upstream, "eth0")
    client.batch("addr add 192.168.64.2/24 dev eth0")
    server.batch(f"addr add {_SERVER}/24 dev vmnet0", "addr add 198.18.53.2/24 dev eth0")
    upstream.batch(f"addr add {_UPSTREAM}/24 dev eth0")
    directory = bench.world.directory / "bench-dns"
    directory.mkdir(exist_ok=True)
    (directory / "resolv.conf").write_text(f"nameserver {_UPSTREAM}\n")
    with _dnsmasq(upstream, _UPSTREAM, "--address=/example.test/192.0.2.7", "--local-ttl=300", "--cache-size=0"):
        yield _Setting(client, server, directory)


@contextlib.contextmanager
def _dnsmasq(namespace: Namespace, address: str, *options: str) -> Iterator[None]:
    command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file="]
    command += ["--user=root", "--bind-interfaces", f"--listen-address={address}", *options]
    process = namespace.popen(command, stderr=subprocess.DEVNULL)
    try:
        _await(namespace, address)
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _theirs(setting: _Setting) -> Iterator[None]:
    names = [f"--host-record=vm{number}.vmnet.internal,192.168.64.{number}" for number in range(2, 255)]
    options = [f"--server={_UPSTREAM}", "--cache-size=10000", "--dns-forward-max=1024", "--local-ttl=10", *names]
    with _dnsmasq(setting.server, _SERVER, *options):
        yield


@contextlib.contextmanager
def _ours(setting: _Setting) -> Iterator[None]:
    command = [sys.executable, "-m", "lab.name_server", _SERVER, str(setting.directory / "resolv.conf")]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    process = setting.server.popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        _await(setting.server, _SERVER)
        yield
    finally:
        process.communicate()


def _await(namespace: Namespace, address: str) -> None:
    command = ["dig", "+time=1", "+tries=20", f"@{address}", "a.example.test"]
    for _ in range(100):
        if namespace.run(command, check=False).returncode == 0:
            return
    raise RuntimeError(f"the name server at {address} does not answer")


def _perf(setting: _Setting, queries: Path, seconds: float) -> float:
    command = ["dnsperf", "-s", _SERVER, "-d", str(queries), "-l", f"{seconds:g}", "-c", "8"]
    said = setting.client.run(command, timeout=seconds + 30).stdout
    found = re.search(r"Queries per second: +([\d.]+)", said)
    lost = re.search(r"Queries lost: +(\d+)", said)
    codes = re.search(r"Response codes: +(.*)", said)
    if not found or not lost or not codes or not codes[1].startswith("NOERROR") or "100.00%" not in codes[1]:
        raise RuntimeError(f"dnsperf: {said}")
    if int(lost[1]) > 0.001 * float(found[1]) * seconds:
        raise RuntimeError(f"{lost[1]} queries were lost")
    return float(found[1])


def _both(setting: _Setting, measure: Callable[[], float]) -> dict[str, Sampler]:
    def ours() -> float:
        with _ours(setting):
            return measure()

    def theirs() -> float:
        with _theirs(setting):
            return measure()

    return {OURS: ours, _RIVAL: theirs}


@row("dns-cached", "DNS, 1,000 forwarded names in the cache", unit="queries/s", aims={_RIVAL: 1})
def _cached(bench: Bench) -> Iterator[dict[str, Sampler]]:
    setting = bench.once("dns", lambda: _setting(bench))
    queries = setting.directory / "cached"
    queries.write_text("".join(f"n{number}.example.test A\n" for number in range(_NAMES)))

    def measure() -> float:
        _perf(setting, queries, 0.5)
        return _perf(setting, queries, bench.seconds)

    yield _both(setting, measure)


@row("dns-local", "DNS, the names of 250 guests", unit="queries/s", aims={_RIVAL: 1})
def _local(bench: Bench) -> Iterator[dict[str, Sampler]]:
    setting = bench.once("dns", lambda: _setting(bench))
    queries = setting.directory / "local"
    queries.write_text("".join(f"vm{number}.vmnet.internal A\n" for number in range(2, 252)))
    yield _both(setting, lambda: _perf(setting, queries, bench.seconds))


@row("dns-forward", "DNS, every name new and forwarded", unit="queries/s")
def _forwarded(bench: Bench) -> Iterator[dict[str, Sampler]]:
    setting = bench.once("dns", lambda: _setting(bench))
    queries = setting.directory / "forward"

    def measure() -> float:
        serial = next(_fresh)
        queries.write_text("".join(f"f{serial}-{number}.example.test A\n" for number in range(300_000)))
        return _perf(setting, queries, bench.seconds)

    yield _both(setting, measure)
