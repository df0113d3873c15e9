"""Rows: frames that a program moves through an interface, beside the same loop on the bare TAP.

Two TAPs in a bridge without addresses, in a namespace where nothing else is. Reading: the far one has sent a queue full
of frames, and the time is that of draining it. Writing: the bridge carries each frame to the far one's queue within the
call, which the time includes for everyone. `Python` is a loop over os.read or os.write with its names bound to locals,
that keeps the frames it reads in a list; `C` is lab/tap_loop.c (gcc -O2), which keeps nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from lab.rows import OURS, Bench, Sampler, row
from openvmnet.contract.interface import Interface, Parameters
from openvmnet.engine.linux.tap import TapLink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TUNSETIFF = 0x400454CA
_TAP_NO_PI = 0x1002
_QUEUE = 20000  # frames
_FRAMES = 15000  # of one turn, a little less than the far queue holds
_BATCH = 200
_MAC = "02:00:00:00:00:01"


class Wire:
    """Two TAPs, `near` and `far`, joined by a bridge: descriptors, non-blocking, frames bare."""

    def __init__(self, bench: Bench) -> None:
        self.namespace = bench.world.namespace("taps")
        self.namespace.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        self.namespace.batch("link add br0 type bridge mcast_snooping 0 forward_delay 0", "link set br0 up")
        self.fds: list[int] = []
        for name in ("near", "far"):
            self.namespace._inside(functools.partial(self._open, name))
            self.namespace.batch(f"link set {name} txqueuelen {_QUEUE} master br0 up")
        self.near, self.far = self.fds

    def _open(self, name: str) -> None:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_NO_PI))
        self.fds.append(fd)

    def fill(self, fd: int, size: int) -> None:
        """Send a turn's frames through `fd`."""
        data = _frame(size)
        for _ in range(_FRAMES):
            os.write(fd, data)

    def drain(self, fd: int) -> int:
        """Read what waits at `fd`; the number of frames."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while os.read(fd, 2000):
                count += 1
        return count


def _frame(size: int) -> bytes:
    return (b"\xff" * 6 + bytes.fromhex(_MAC.replace(":", "")) + b"\x88\xb5").ljust(size, b"x")


@contextlib.contextmanager
def _wire(bench: Bench) -> Iterator[tuple[Wire, Interface, str]]:
    wire = Wire(bench)
    parameters = Parameters(mtu=1500, max_packet_size=1514, interface_id=uuid4())
    try:
        with (
            tempfile.TemporaryDirectory() as directory,
            Interface(TapLink(os.dup(wire.near), parameters)) as interface,
        ):
            program = str(Path(directory) / "tap_loop")
            source = Path(__file__).with_name("tap_loop.c")
            subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", program, source], check=True, capture_output=True)
            yield wire, interface, program
    finally:
        for fd in wire.fds:
            os.close(fd)


def _library_read(interface: Interface) -> int:
    count = 0
    while frames := interface.read():
        count += len(frames)
    return count


def _python_read(fd: int) -> int:
    read, count = os.read, 0
    while True:
        frames: list[bytes] = []
        append = frames.append
        try:
            for _ in range(_BATCH):
                append(read(fd, 1514))
        except BlockingIOError:
            return count + len(frames)
        count += len(frames)


def _library_write(interface: Interface, frames: list[bytes]) -> int:
    for _ in range(_FRAMES // _BATCH):
        interface.write(frames)
    return _FRAMES


def _python_write(fd: int, frames: list[bytes]) -> int:
    write = os.write
    for _ in range(_FRAMES // _BATCH):
        for each in frames:
            write(fd, each)
    return _FRAMES


def _c(program: str, fd: int, *words: str, data: bytes = b"") -> tuple[int, float]:
    command = [program, words[0], str(fd), *words[1:]]
    done = subprocess.run(command, input=data, pass_fds=[fd], capture_output=True, check=True)
    count, seconds = done.stdout.split()
    return int(count), float(seconds)


def _rate(bench: Bench, prepare: Callable[[], object], turn: Callable[[], tuple[int, float]]) -> float:
    """Frames per second over turns that together take the sample's time, or a tenth of it at least."""
    frames, seconds, begin = 0, 0.0, time.monotonic()
    while frames == 0 or time.monotonic() - begin < bench.seconds:
        prepare()
        count, taken = turn()
        if count != _FRAMES:
            raise RuntimeError(f"{count} frames came of {_FRAMES}")
        frames += count
        seconds += taken
    return frames / seconds


def _timed(work: Callable[[], int]) -> tuple[int, float]:
    begin = time.perf_counter()
    count = work()
    return count, time.perf_counter() - begin


def _reads(bench: Bench, size: int) -> Iterator[dict[str, Sampler]]:
    wire, interface, program = bench.once("two taps", lambda: _wire(bench))

    def fill() -> None:
        wire.drain(wire.near)
        wire.fill(wire.far, size)

    yield {
        OURS: lambda: _rate(bench, fill, lambda: _timed(lambda: _library_read(interface))),
        "Python": lambda: _rate(bench, fill, lambda: _timed(lambda: _python_read(wire.near))),
        "C": lambda: _rate(bench, fill, lambda: _c(program, wire.near, "read", "1514")),
    }


def _writes(bench: Bench, size: int) -> Iterator[dict[str, Sampler]]:
    wire, interface, program = bench.once("two taps", lambda: _wire(bench))
    data = _frame(size)
    frames, words = [data] * _BATCH, ("write", str(size), str(_FRAMES))

    def empty() -> None:
        wire.drain(wire.far)

    yield {
        OURS: lambda: _rate(bench, empty, lambda: _timed(lambda: _library_write(interface, frames))),
        "Python": lambda: _rate(bench, empty, lambda: _timed(lambda: _python_write(wire.near, frames))),
        "C": lambda: _rate(bench, empty, lambda: _c(program, wire.near, *words, data=data)),
    }


_AIMS = {"Python": 0.8}


@row("library-read-64", "library, frames of 64 octets read from a full queue", unit="per s", aims=_AIMS)
def _read_64(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield from _reads(bench, 64)


@row("library-read-1514", "library, frames of 1,514 octets read from a full queue", unit="per s", aims=_AIMS)
def _read_1514(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield from _reads(bench, 1514)


@row("library-write-64", "library, frames of 64 octets written", unit="per s", aims=_AIMS)
def _write_64(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield from _writes(bench, 64)


@row("library-write-1514", "library, frames of 1,514 octets written", unit="per s", aims=_AIMS)
def _write_1514(bench: Bench) -> Iterator[dict[str, Sampler]]:
    yield from _writes(bench, 1514)
