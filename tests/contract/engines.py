"""Engines that the contract's tests run over: each gives a link, and the wire behind it.

An engine is a context manager `ENGINES[name](directory) -> Rig`. One that this host cannot have skips.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

import pytest

from openvmnet.contract.interface import LinkRequest, Parameters
from openvmnet.errors import HostError, LinkError, Stopped
from openvmnet.netdev import Shared
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from openvmnet.contract.interface import Frame, Link
    from openvmnet.engine.linux.namespace import Namespace

PARAMETERS = Parameters(mtu=1500, max_packet_size=1514, interface_id=uuid4(), mac_address="52:54:00:00:00:01")
ETHERTYPE = b"\x88\xb5"  # for experiments (IEEE 802)


def frame(number: int, size: int = 60) -> bytes:
    """A frame that bears a number, to everyone."""
    return (b"\xff" * 6 + b"\x52\x54\x00\x00\x00\x01" + ETHERTYPE + number.to_bytes(4, "big")).ljust(size, b"\0")


def number(data: bytes) -> int:
    """The number that a frame bears."""
    return int.from_bytes(data[14:18], "big")


class Rig(Protocol):
    """A link and the other end of its wire."""

    broken: Status  # what a write says after `break_writes`

    def link(self) -> Link:
        """A new link on the wire, the only one."""

    def send(self, frames: Sequence[bytes]) -> None:
        """Put frames on the wire towards the link."""

    def received(self, count: int, seconds: float = 5.0) -> list[bytes]:
        """The next frames that came from the link: `count`, or fewer when the time is over."""

    def break_writes(self) -> None:
        """Make the machine fail at each write from now on."""


class MemoryLink:
    """A link whose wire is two queues; readable by a pipe that holds an octet while frames wait."""

    def __init__(self) -> None:
        self.parameters = PARAMETERS
        self.tap = None
        self.inbox: deque[bytes] = deque()
        self.outbox: deque[bytes] = deque()
        self.failing = False
        self.batches: list[int] = []  # how many frames each read gave
        self._lock = threading.RLock()
        self._read, self._write = os.pipe()
        self._open = True
        self._raised = False

    def fileno(self) -> int:
        return self._read

    def put(self, frames: Sequence[bytes]) -> None:
        with self._lock:
            if self._open:
                self.inbox.extend(frames)
                self._settle()

    def read(self, limit: int) -> list[bytes]:
        with self._lock:
            if not self._open:
                raise Stopped("closed")
            frames = [self.inbox.popleft() for _ in range(min(limit, len(self.inbox)))]
            self.batches.append(len(frames))
            self._settle()
            return frames

    def write(self, frames: Sequence[Frame]) -> None:
        with self._lock:
            if not self._open:
                raise Stopped("closed")
            if self.failing:
                raise LinkError("write error", sent=0, status=Status.BUFFER_EXHAUSTED)
            self.outbox.extend(bytes(each) for each in frames)

    def _settle(self) -> None:
        if bool(self.inbox) != self._raised:
            self._raised = not self._raised
            if self._raised:
                os.write(self._write, b"\0")
            else:
                os.read(self._read, 1)

    def close(self) -> None:
        with self._lock:
            if not self._open:
                return
            self._open = False
            self.inbox.clear()
            self._settle()
            os.close(self._write)

    forked = close

    def __del__(self) -> None:
        self.close()
        os.close(self._read)


class MemoryRig:
    broken = Status.BUFFER_EXHAUSTED

    def __init__(self) -> None:
        self.made: MemoryLink | None = None

    def link(self) -> MemoryLink:
        self.made = MemoryLink()
        return self.made

    def send(self, frames: Sequence[bytes]) -> None:
        assert self.made is not None
        self.made.put(frames)

    def received(self, count: int, seconds: float = 5.0) -> list[bytes]:
        assert self.made is not None
        deadline = time.monotonic() + seconds
        while len(self.made.outbox) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        return [self.made.outbox.popleft() for _ in range(min(count, len(self.made.outbox)))]

    def break_writes(self) -> None:
        assert self.made is not None
        self.made.failing = True


class TapRig:
    """Two TAPs in a bridge without addresses, in a namespace where nothing else is: what one sends the other gets."""

    broken = Status.SETUP_INCOMPLETE

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        (self._far,) = namespace.request("bare-tap", name="vm2").fds
        self._far_poll = select.poll()
        self._far_poll.register(self._far, select.POLLIN)

    def link(self) -> Link:
        from openvmnet.engine.linux.tap import TapLink

        return TapLink(self._open("bare-tap"), PARAMETERS)

    def _open(self, op: str) -> int:
        deadline = time.monotonic() + 2
        while True:  # a callback that runs may hold the interface before for a moment
            try:
                (fd,) = self._namespace.request(op, name="vm1").fds
                break
            except HostError:
                if time.monotonic() > deadline:
                    raise
        self.ip("".join(f"link set vm{n} master br0 txqueuelen 20000 up\n" for n in (1, 2)))
        return int(fd)

    def ip(self, text: str) -> None:
        done = self._namespace.request("run", argv=["ip", "-batch", "-"], input=text).values
        assert done["status"] == 0, done["stderr"]

    def send(self, frames: Sequence[bytes]) -> None:
        for each in frames:
            os.write(self._far, each)

    def received(self, count: int, seconds: float = 5.0) -> list[bytes]:
        frames: list[bytes] = []
        deadline = time.monotonic() + seconds
        while len(frames) < count and (left := deadline - time.monotonic()) > 0:
            if self._far_poll.poll(left * 1000):
                frames.append(os.read(self._far, 2000))
        return frames

    def break_writes(self) -> None:
        self.ip("link set vm1 down\n")

    def close(self) -> None:
        os.close(self._far)


class HeadedTapRig(TapRig):
    """The near TAP has a virtio_net_hdr on each frame, as one that was opened for QEMU."""

    def link(self) -> Link:
        from openvmnet.engine.linux.tap import HeadedTapLink

        return HeadedTapLink(self._open("tap"), PARAMETERS, os.open(os.devnull, os.O_RDONLY))


@contextlib.contextmanager
def memory(_: Path) -> Iterator[Rig]:
    yield MemoryRig()


def tap(directory: Path) -> AbstractContextManager[Rig]:
    return _taps(directory, TapRig)


def headed_tap(directory: Path) -> AbstractContextManager[Rig]:
    return _taps(directory, HeadedTapRig)


@contextlib.contextmanager
def _taps(directory: Path, kind: type[TapRig]) -> Iterator[Rig]:
    from openvmnet.engine.linux import namespace

    path = directory / "agent"
    try:
        agent = namespace.fork_agent(path)
    except HostError as error:
        pytest.skip(str(error))
    made = namespace.Namespace(path)
    try:
        try:
            (probe,) = made.request("bare-tap", name="probe").fds
        except HostError as error:
            pytest.skip(str(error))
        os.close(probe)
        made.request("sysctl", values={"net.ipv6.conf.default.disable_ipv6": "1"})
        rig = kind(made)
        rig.ip("link add br0 type bridge mcast_snooping 0 forward_delay 0\nlink set br0 up\n")
        try:
            yield rig
        finally:
            rig.close()
    finally:
        made.quit()
        os.waitpid(agent, 0)


class VmnetRig:
    """The macOS engine over the stand-in for vmnet.framework, whose wire is two queues in memory."""

    broken = Status.FAILURE

    def __init__(self) -> None:
        from lab import standin
        from openvmnet.engine.darwin.framework import Framework

        self.control = standin.Standin(standin.library(1200))  # one that has the documented limits
        self._framework = Framework(str(self.control.path))

    def link(self) -> Link:
        from openvmnet.engine.darwin.interface import open_link

        self.control.memory()
        request = LinkRequest(Shared(id="n0"), PARAMETERS.interface_id)
        return open_link(request, self._framework)

    def send(self, frames: Sequence[bytes]) -> None:
        for each in frames:
            self.control.send(each)

    def received(self, count: int, seconds: float = 5.0) -> list[bytes]:
        frames: list[bytes] = []
        deadline = time.monotonic() + seconds
        while len(frames) < count and time.monotonic() < deadline:
            if (each := self.control.receive()) is None:
                time.sleep(0.001)
            else:
                frames.append(each)
        return frames

    def break_writes(self) -> None:
        self.control.set("vmnet_write", self.broken)


@contextlib.contextmanager
def vmnet(_: Path) -> Iterator[Rig]:
    from lab import standin

    if standin.compiler() is None:
        pytest.skip("the stand-in for vmnet.framework needs a C compiler (package gcc)")
    rig = VmnetRig()
    try:
        yield rig
    finally:
        rig.control.set("vmnet_write", 0)


ENGINES: dict[str, Callable[[Path], AbstractContextManager[Rig]]] = {
    "memory": memory,
    "tap": tap,
    "headed tap": headed_tap,
    "vmnet": vmnet,
}
