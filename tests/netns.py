"""What the tests of the uplink share: work done inside a namespace, and a look at the network process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.netguest import PluggedNetwork
    from lab.netns import Namespace
    from lab.world import World

_T = TypeVar("_T")


def real_root(why: str) -> pytest.MarkDecorator:
    """A test that an ordinary user's lab cannot do: there, root is root of a user namespace only."""
    pretended = os.getuid() != 0 or os.environ.get("OPENVMNET_LAB_UID", "0") != "0"
    return pytest.mark.skipif(pretended, reason=f"{why} takes real root")


@contextlib.contextmanager
def ping_sockets() -> Iterator[None]:
    """The lab's own namespace allows ping sockets meanwhile."""
    setting = Path("/proc/sys/net/ipv4/ping_group_range")
    before = setting.read_text()
    setting.write_text("0 2147483647" if os.environ.get("OPENVMNET_LAB_UID", "0") == "0" else "0 0")
    yield
    with contextlib.suppress(OSError):  # an ordinary user's lab has one group, and cannot say "no group"
        setting.write_text(before)


def inside(namespace: Namespace, action: Callable[[], _T]) -> _T:
    """What `action()` gives, run by a thread that has joined `namespace`; sockets it makes live there."""
    result: list[_T] = []
    namespace._inside(lambda: result.append(action()))
    return result[0]


def family(address: str) -> int:
    """The address family of `address`."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def dial(namespace: Namespace, where: tuple[str, int], *, timeout: float = 5.0, port: int = 0) -> socket.socket:
    """A TCP connection from `namespace`, from local port `port` if given."""
    sock = namespace.socket(family(where[0]))
    sock.settimeout(timeout)
    if port:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        sock.bind(("", port))
    try:
        sock.connect(where)
    except OSError:
        sock.close()
        raise
    return sock


def listen(namespace: Namespace, where: tuple[str, int], *, backlog: int = 4096) -> socket.socket:
    """A TCP listener in `namespace`."""
    sock = namespace.socket(family(where[0]))
    sock.settimeout(5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(where)
    sock.listen(backlog)
    return sock


def pair(guest: Namespace, outside: Namespace, where: tuple[str, int]) -> tuple[socket.socket, socket.socket]:
    """One connection: (the guest's end, the outside's end)."""
    with listen(outside, where) as listener:
        one = dial(guest, where)
        other, _ = listener.accept()
    other.settimeout(5)
    return one, other


def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly `count` octets, or what came before the end."""
    data = bytearray()
    while len(data) < count and (part := sock.recv(min(1 << 20, count - len(data)))):
        data += part
    return bytes(data)


def readable(sock: socket.socket, seconds: float) -> bool:
    """Whether anything comes within `seconds`."""
    return bool(select.select([sock], [], [], seconds)[0])


def view(network: PluggedNetwork, world: World) -> dict[str, Any]:
    """What `vmnet show --json` says."""
    shown: dict[str, Any] = json.loads(world.product_run(["vmnet", "show", network.name, "--json"]).stdout)
    return shown


def flows(network: PluggedNetwork, world: World) -> dict[str, int]:
    """Flows by kind."""
    return dict(view(network, world)["flows"])


def descriptors(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """A process's resident memory, in octets, without what it shares with files."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def eventually(condition: Callable[[], object], seconds: float = 3.0) -> bool:
    """Whether `condition` comes to hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
