"""Rows: the command itself, and what the network process asks of the kernel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from lab.bench_small import environment, exchange_server
from lab.netguest import PluggedNetwork
from lab.rivals import client
from lab.rows import OURS, Bench, Sampler, row
from lab.world import SERVER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.world import World

_CONNECTIONS = 16  # under way at once


def _run(world: World, name: str) -> float:
    """Seconds from the start of `vmnet run` to that of the program it becomes, which tells the time and ends."""
    program = [sys.executable, "-S", "-E", "-c", "import time; print(time.clock_gettime(time.CLOCK_MONOTONIC))"]
    command = ["vmnet", "run", "--name", name, "--linger", "0", "--", *program, "-netdev", "vmnet-shared,id=n0"]
    begin = time.clock_gettime(time.CLOCK_MONOTONIC)
    told: float = float(world.product_run(command).stdout)
    return told - begin


@row("start", "vmnet run to the VM's exec, the network's start included", unit="s", better="lower", aims={"0.4 s": 1})
def _start(bench: Bench) -> Iterator[dict[str, Sampler]]:
    def sample() -> float:
        seconds = _run(bench.world, "started")
        while any("openvmnet.daemon started" in one.command for one in bench.world.leftovers()):
            time.sleep(0.02)
        return seconds

    yield {OURS: sample, "0.4 s": lambda: 0.4}


@row("join", "vmnet run to the VM's exec, joining a network", unit="s", better="lower", aims={"0.2 s": 1})
def _join(bench: Bench) -> Iterator[dict[str, Sampler]]:
    with PluggedNetwork(bench.world, "joined"):
        yield {OURS: lambda: _run(bench.world, "joined"), "0.2 s": lambda: 0.2}


@row("syscalls", "system calls of the network process per TCP connection (connect, a byte each way, close)",
     unit="calls", better="lower")  # fmt: skip
def _syscalls(bench: Bench) -> Iterator[dict[str, Sampler]]:
    guest = client(bench, OURS)
    network = bench.kept["network"]

    def sample() -> float:
        with tempfile.NamedTemporaryFile("r") as table:
            trace = subprocess.Popen(
                ["strace", "-c", "-f", "-o", table.name, "-p", str(network.pid)], stderr=subprocess.DEVNULL
            )
            time.sleep(0.5)
            command = [sys.executable, "-m", "lab.exchange", "connect", SERVER, "7000", "16", f"{bench.seconds:g}"]
            done = guest.run([*command, str(_CONNECTIONS)], env=environment(), timeout=60)
            trace.terminate()
            trace.wait()
            counted = re.search(r"^100\.00 +\S+ +\S+ +(\d+) .*total$", table.read(), re.MULTILINE)
            if counted is None:
                raise RuntimeError("strace counted nothing")
            calls = int(counted[1])
            return float(calls / (json.loads(done.stdout)["per_second"] * bench.seconds))

    with exchange_server(bench.world.internet):
        yield {OURS: sample}
