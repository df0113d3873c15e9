"""A network's namespace with guests that are bare TAP descriptors: any frame can be sent, every frame is seen."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import select
import time
from typing import TYPE_CHECKING

from openvmnet.config import NetworkConfig, PortKind
from openvmnet.engine.linux import agent
from openvmnet.engine.linux.engine import LinuxEngine
from openvmnet.engine.linux.namespace import Namespace
from openvmnet.kernel.loop import Lane, LaneLoop
from openvmnet.netdev import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path
    from typing import Any

GATEWAY, GATEWAY_MAC = "192.168.64.1", "5a:00:00:00:00:01"
BROADCAST = "ff:ff:ff:ff:ff:ff"
SUBNET = Subnet(
    ipaddress.IPv4Address(GATEWAY),
    ipaddress.IPv4Address("192.168.64.2"),
    ipaddress.IPv4Address("192.168.64.254"),
    24,
)
CONFIG = NetworkConfig("engine", subnet=SUBNET)
PREFIX = ipaddress.IPv6Network("fd00:a:b:c::/64")
GATEWAY6, GATEWAY6_LOCAL = "fd00:a:b:c::1", "fe80::5800:ff:fe00:1"
CONFIG6 = NetworkConfig("engine", subnet=SUBNET, prefix=PREFIX)
_VNET_HEADER = bytes(10)  # struct virtio_net_hdr: no offload
_MARKER = b"\x88\xb5the marker"  # an EtherType for experiments (IEEE 802)


class TapGuest:
    """A VM's end of a port: addresses 192.168.64.(number + 1) and fd00:a:b:c::(number + 1)."""

    def __init__(self, number: int, link: str, fd: int) -> None:
        self.number = number
        self.link = link
        self.fd = fd
        self.mac = f"52:54:00:00:00:{number:02x}"
        self.ip = f"192.168.64.{number + 1}"
        self.ip6 = str(PREFIX[number + 1])
        self.local6 = f"fe80::5054:ff:fe00:{number:x}"

    def send(self, frame: object) -> None:
        """Put a frame (bytes, or scapy's) on the wire."""
        os.write(self.fd, _VNET_HEADER + bytes(frame))

    def frames(self, seconds: float = 0.2, *, until: Callable[[bytes], object] | None = None) -> list[bytes]:
        """What arrives within `seconds`, or until a frame for which `until` holds (it is the last one)."""
        found = []
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.fd], [], [], left)[0]:
                break
            with contextlib.suppress(BlockingIOError):
                frame = os.read(self.fd, 70000)[len(_VNET_HEADER) :]
                found.append(frame)
                if until is not None and until(frame):
                    break
        return found

    def marker(self, other: TapGuest) -> bytes:
        """A harmless frame to `other`."""
        return bytes.fromhex((other.mac + self.mac).replace(":", "")) + _MARKER + bytes(40)


class Net:
    """The engine with its namespace, driven step by step: `do()` runs a coroutine on its loop."""

    def __init__(self, directory: Path, config: NetworkConfig = CONFIG) -> None:
        self.config = config
        self.path = directory / "agent.sock"
        self.agent = agent.fork(str(self.path))
        self.lane = Lane()
        self.runner = asyncio.Runner(loop_factory=lambda: LaneLoop(self.lane))
        self.departed: list[str] = []
        self.gone: list[bool] = []
        self.guests: list[TapGuest] = []
        self.engine = self.do(self._up())

    async def _up(self) -> LinuxEngine:
        engine = LinuxEngine(Namespace(self.path), self.config, GATEWAY_MAC)
        await engine.up({})
        engine.watch(self.lane, self.departed.append, lambda: self.gone.append(True))
        return engine

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` to its end."""
        return self.runner.run(work)

    def turn(self, seconds: float = 0.05) -> None:
        """Let the loop run."""
        self.do(asyncio.sleep(seconds))

    def ip(self, text: str) -> str:
        """`ip -batch` inside."""
        return str(self.do(self.engine.namespace.run(["ip", "-batch", "-"], text)))

    def plug(self, *, isolated: bool = False) -> TapGuest:
        """One more guest; every port has learnt its MAC."""
        number = len(self.guests) + 1
        guest = TapGuest(number, *self.do(self.engine.plug(number, PortKind(isolated, offloads=True))))
        self.guests.append(guest)
        guest.send(bytes.fromhex((BROADCAST + guest.mac).replace(":", "")) + _MARKER + bytes(40))
        self.quiet()
        return guest

    def quiet(self) -> None:
        """Throw away what waits at the guests and at the TUN."""
        for guest in self.guests:
            guest.frames(0.005)
        self.packets(0.005)

    def packets(self, seconds: float = 0.2) -> list[bytes]:
        """What comes to Python through the TUN within `seconds`."""
        found = []
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and select.select([self.engine.tun], [], [], left)[0]:
            with contextlib.suppress(BlockingIOError):
                found.append(os.read(self.engine.tun, 70000))
        return found

    def passes(self, frame: object, source: TapGuest, sink: TapGuest) -> list[bytes]:
        """What `sink` gets when `source` sends `frame`, by the time a harmless frame behind it has arrived."""
        source.send(frame)
        source.send(source.marker(sink))
        mark = source.marker(sink)
        got = sink.frames(2.0, until=lambda data: data.startswith(mark[:30]))
        assert got, "the harmless frame did not arrive"
        assert got[-1].startswith(mark[:30]), "the harmless frame did not arrive"
        return got[:-1]

    def counters(self) -> dict[str, int]:
        """The firewall's."""
        return dict(self.do(self.engine.counters()))

    def close(self) -> None:
        """End everything, and wait for the agent."""
        for guest in self.guests:
            with contextlib.suppress(OSError):
                os.close(guest.fd)
        with contextlib.suppress(OSError):
            os.close(self.engine.tun)
        self.engine.listener.close()
        if self.engine.listener6 is not None:
            self.engine.listener6.close()
        self.engine.down()
        self.runner.close()
        os.waitpid(self.agent, 0)


@contextlib.contextmanager
def net(directory: Path, config: NetworkConfig = CONFIG) -> Iterator[Net]:
    """A `Net` in `directory`, ended at the end."""
    made = Net(directory, config)
    try:
        yield made
    finally:
        made.close()
