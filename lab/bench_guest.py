"""Rows: TCP throughput of a real QEMU guest with an emulated CPU, beside QEMU's own user network and beside passt.

Here the guest's CPU is the limit, so what costs the guest more (small frames, checksums, no offload) shows.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

from lab.guest import Guest, qemu, virtio
from lab.rows import OURS, Bench, Sampler, row
from lab.world import IPERF_PORTS, SERVER, World

if TYPE_CHECKING:
    from collections.abc import Iterator

_OFFLOADS = (
    *("csum", "gso", "host_tso4", "host_tso6", "host_ecn", "host_ufo"),
    *("guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo"),
)


@row("qemu-up", "QEMU guest, TCP, 1 stream, up", unit="Gbit/s", aims={"-netdev user": 4, "passt": 1})
def _up(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _samplers(bench)


@row("qemu-down", "QEMU guest, TCP, 1 stream, down", unit="Gbit/s", aims={"-netdev user": 4, "passt": 1})
def _down(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _samplers(bench, "-R")


@row("mtu-up", "QEMU guest without offloads, TCP up, MTU 65,520", unit="Gbit/s", aims={"MTU 1,500": 3})
def _mtu_up(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _by_mtu(bench)


@row("mtu-down", "QEMU guest without offloads, TCP down, MTU 65,520", unit="Gbit/s", aims={"MTU 1,500": 3})
def _mtu_down(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield _by_mtu(bench, "-R")


def _by_mtu(bench: Bench, *options: str) -> dict[str, Sampler]:
    def sampler(mtu: int) -> Sampler:
        name = f"mtu{mtu}"
        return lambda: _iperf(bench.once(name, lambda: _plain(bench.world, name, mtu)), bench.seconds, *options)

    return {OURS: sampler(65520), "MTU 1,500": sampler(1500)}


@contextlib.contextmanager
def _plain(world: World, name: str, mtu: int) -> Iterator[Guest]:
    """A guest without offloads, its NIC's as well as its kernel's own (GRO, GSO): each frame is the guest's work."""
    off = "".join(f",{feature}=off" for feature in _OFFLOADS)
    netdev, nic = virtio(f"vmnet-shared,mtu={mtu}")[1::2]
    argv = ["vmnet", "run", "--name", name, "--", *qemu("-netdev", netdev, "-device", nic + off)]
    with world.guest(argv, name=name) as guest:
        guest.wait_boot()
        guest.run(f"echo {world.congestion} >/proc/sys/net/ipv4/tcp_congestion_control")
        guest.dhcp()
        guest.run("ethtool -K eth0 gro off gso off")
        yield guest


def _samplers(bench: Bench, *options: str) -> dict[str, Sampler]:
    def sampler(who: str) -> Sampler:
        return lambda: _iperf(_guest(bench, who), bench.seconds, *options)

    return {who: sampler(who) for who in (OURS, "-netdev user", "passt")}


def _guest(bench: Bench, who: str) -> Guest:
    made: Guest = bench.once(f"qemu {who}", lambda: _booted(bench.world, who))
    return made


@contextlib.contextmanager
def _booted(world: World, who: str) -> Iterator[Guest]:
    with contextlib.ExitStack() as stack:
        if who == OURS:
            argv = ["vmnet", "run", "--name", "qemu", "--", *qemu(*virtio("vmnet-shared"))]
        elif who == "passt":
            path = stack.enter_context(_passt(world))
            argv = qemu(*virtio(f"stream,server=off,addr.type=unix,addr.path={path}"))
        else:
            argv = qemu(*virtio("user"))
        guest = stack.enter_context(world.guest(argv, name=who))
        guest.wait_boot()
        guest.run(f"echo {world.congestion} >/proc/sys/net/ipv4/tcp_congestion_control")
        guest.dhcp()
        yield guest


@contextlib.contextmanager
def _passt(world: World) -> Iterator[str]:
    if shutil.which("passt") is None:
        raise RuntimeError("passt is not installed; run scripts/setup bench")
    path = world.runtime / "passt.sock"
    with (world.directory / "passt.log").open("ab") as log:
        process = world.product(
            ["passt", "--foreground", "--socket", str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 5
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"passt does not listen: {(world.directory / 'passt.log').read_text()[-300:]}")
            time.sleep(0.02)
        yield str(path)
    finally:
        process.kill()
        process.wait()


def _iperf(guest: Guest, seconds: float, *options: str) -> float:
    command = f"iperf3 -c {SERVER} -p {IPERF_PORTS[1]} -t {seconds:g} -O 0.5 -i 0 -J {' '.join(options)}"
    report = json.loads(guest.run(command, timeout=seconds + 30).out)
    if "error" in report:
        raise RuntimeError(report["error"])
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9
