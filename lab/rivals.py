"""Who is measured beside openvmnet, each at the host of a world, each with a namespace in the guest's place.

- kernel: a bridge in a host's own namespace, forwarding and masquerade: what root can have, and the yardstick.
- kernel nested: the same where the network has a namespace of its own, as ours has: bridge, forwarding and masquerade
  there, then the host's forwarding and masquerade.
- slirp4netns, pasta: an ordinary user's network stacks, in a user and network namespace that this user made. They serve
  one namespace; for several guests one puts a bridge behind them, and the guest on it has Ethernet's MTU ("bridge").
  Without it they serve the guest's namespace itself, with the MTU of 65,520 that their manuals advise ("direct").

All run as the world's unprivileged user but the kernel's two. The guests have the world's congestion control.

Each but pasta behind a bridge publishes PUBLISHED ports of its guest's; `published()` tells where.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from lab.netguest import PluggedNetwork
from lab.netns import Namespace, link
from lab.rows import OURS, Bench
from lab.world import HOST, ROUTER, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

KERNEL_GATEWAY = "10.99.0.1"  # the kernel contender's bridge
_KERNEL_HOST, KERNEL_GUEST, _SLIRP_GUEST = "198.18.0.2", "10.99.0.2", "10.0.2.100"
PUBLISHED = 17  # ports
_PUBLISHED = {
    OURS: (HOST, 7100),
    "kernel": (_KERNEL_HOST, 7100),
    "slirp4netns bridge": (HOST, 7200),
    "slirp4netns direct": (HOST, 7300),
    "pasta direct": (HOST, 7400),
}
_NFT_MASQUERADE = """
table ip lab_nat {
  chain postrouting { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }
}
"""


def client(bench: Bench, who: str) -> Namespace:
    """The guest namespace of contender `who`, set up when first asked for."""
    makers: dict[str, Callable[[World], AbstractContextManager[Namespace]]] = {
        "kernel": _kernel,
        "kernel nested": _kernel_nested,
        "slirp4netns bridge": _slirp_bridge,
        "slirp4netns direct": _slirp_direct,
        "pasta bridge": _pasta_bridge,
        "pasta direct": _pasta_direct,
    }
    if who == OURS:
        network: PluggedNetwork = bench.once("network", lambda: PluggedNetwork(bench.world))
        guest: Namespace = bench.once("guest", lambda: contextlib.nullcontext(network.plug()))
        return guest
    made: Namespace = bench.once(who, lambda: makers[who](bench.world))
    return made


def published(who: str) -> tuple[str, int]:
    """Where contender `who` publishes: the address and the first port, which is the guest's as well."""
    return _PUBLISHED[who]


@contextlib.contextmanager
def _kernel(world: World) -> Iterator[Namespace]:
    # A host of its own: in the others' host, the masquerade's connection tracking would slow their sockets down.
    guest, host = world.namespace("kernel-guest"), world.namespace("kernel-host")
    link(host, "eth0", world.router, "kernel0")
    world.router.batch("addr add 198.18.0.1/24 dev kernel0")
    host.batch(f"addr add {_KERNEL_HOST}/24 dev eth0", "route add default via 198.18.0.1")
    _masquerade(host)
    _bridged(guest, host)
    yield guest


@contextlib.contextmanager
def _kernel_nested(world: World) -> Iterator[Namespace]:
    guest, inside, host = (world.namespace(f"nested-{name}") for name in ("guest", "inside", "host"))
    link(host, "eth0", world.router, "nested0")
    world.router.batch("addr add 198.18.1.1/24 dev nested0")
    host.batch("addr add 198.18.1.2/24 dev eth0", "route add default via 198.18.1.1")
    link(inside, "eth0", host, "inside0")
    host.batch("addr add 198.18.2.1/24 dev inside0")
    inside.batch("addr add 198.18.2.2/24 dev eth0", "route add default via 198.18.2.1")
    _masquerade(host)
    _masquerade(inside)
    _bridged(guest, inside)
    yield guest


def _masquerade(host: Namespace) -> None:
    host.sysctl("net.ipv4.ip_forward", 1)
    host.run(["nft", "-f", "-"], input=_NFT_MASQUERADE)


def _bridged(guest: Namespace, host: Namespace) -> None:
    host.batch("link add br0 type bridge", f"addr add {KERNEL_GATEWAY}/24 dev br0", "link set br0 up")
    link(guest, "eth0", host, "port0")
    host.batch("link set port0 master br0")
    guest.batch(f"addr add {KERNEL_GUEST}/24 dev eth0", f"route add default via {KERNEL_GATEWAY}")


@contextlib.contextmanager
def _sandbox(world: World, name: str) -> Iterator[tuple[Namespace, int]]:
    """A user and network namespace of the world's user: its network side, and a process in it."""
    command = ["unshare", "--user", "--map-root-user", "--net", "sleep", "100000"]
    process = world.product(command, stdin=subprocess.DEVNULL)
    _until(lambda: _program(process.pid) == "sleep", "unshare did not run", process)
    inside = Namespace.adopt(f"{world.tag}-{name}", process.pid)
    world.namespaces.append(inside)
    inside.batch("link set lo up")
    inside.sysctl("net.ipv4.tcp_congestion_control", world.congestion)
    try:
        yield inside, process.pid
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _stack(world: World, command: list[str], inside: Namespace, device: str) -> Iterator[None]:
    """Run a network stack on the host; ready when its `device` is there, with an address where it sets one."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not installed; run scripts/setup bench")
    with (world.directory / f"{command[0]}.log").open("ab") as log:
        process = world.product(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    wants_address = "--configure" in command or "--config-net" in command
    sign = " inet " if wants_address else device

    def ready() -> bool:
        return (
            sign
            in inside.run(["ip", "-o", "addr" if wants_address else "link", "show", "dev", device], check=False).stdout
        )

    try:
        _until(ready, f"{command[0]} made no {device}", process)
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _behind_bridge(
    world: World, inside: Namespace, device: str, address: str, gateway: str, mtu: int = 1500
) -> Iterator[Namespace]:
    guest = world.namespace(f"{inside.name.rpartition('-')[2]}-guest")
    for table in ("iptables", "ip6tables", "arptables"):
        inside.sysctl(f"net.bridge.bridge-nf-call-{table}", 0, missing_ok=True)
    inside.batch(
        "link add br0 type bridge", "link set br0 up", f"link set {device} master br0", f"link set {device} up"
    )
    link(guest, "eth0", inside, "port0", mtu=mtu)
    inside.batch("link set port0 master br0")
    guest.batch(f"addr add {address}/24 dev eth0", f"route add default via {gateway}")
    yield guest


@contextlib.contextmanager
def _slirp_bridge(world: World) -> Iterator[Namespace]:
    with _sandbox(world, "slirpb") as (inside, pid):
        api = world.runtime / "slirpb.sock"
        command = ["slirp4netns", "--mtu=1500", f"--api-socket={api}", str(pid), "tap0"]
        with (
            _stack(world, command, inside, "tap0"),
            _behind_bridge(world, inside, "tap0", _SLIRP_GUEST, "10.0.2.2") as guest,
        ):
            _slirp_publish(api, published("slirp4netns bridge")[1])
            yield guest


@contextlib.contextmanager
def _slirp_direct(world: World) -> Iterator[Namespace]:
    with contextlib.ExitStack() as stack:
        inside, pid = stack.enter_context(_sandbox(world, "slirpd"))
        api = world.runtime / "slirpd.sock"
        command = ["slirp4netns", "--configure", "--mtu=65520", f"--api-socket={api}", str(pid), "tap0"]
        stack.enter_context(_stack(world, command, inside, "tap0"))
        _slirp_publish(api, published("slirp4netns direct")[1])
        yield inside


def _slirp_publish(api: Path, first: int) -> None:
    for port in range(first, first + PUBLISHED):
        arguments = {"proto": "tcp", "host_port": port, "guest_addr": _SLIRP_GUEST, "guest_port": port}
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(api))
            sock.sendall(json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode())
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(4096)
        if b"error" in answer:
            raise RuntimeError(f"slirp4netns published no port {port}: {answer.decode()}")


def _pasta_ports(tcp: str = "none") -> list[str]:
    return ["-t", tcp, "-u", "none", "-T", "none", "-U", "none"]  # it forwards every listener unless told not to


@contextlib.contextmanager
def _pasta_bridge(world: World) -> Iterator[Namespace]:
    with _sandbox(world, "pastab") as (inside, pid):
        command = ["pasta", "--foreground", "--mtu", "1500", *_pasta_ports(), str(pid)]
        with (
            _stack(world, command, inside, "eth0"),
            _behind_bridge(world, inside, "eth0", HOST, ROUTER) as guest,
        ):
            yield guest


@contextlib.contextmanager
def _pasta_direct(world: World) -> Iterator[Namespace]:
    with contextlib.ExitStack() as stack:
        inside, pid = stack.enter_context(_sandbox(world, "pastad"))
        first = published("pasta direct")[1]
        ports = _pasta_ports(f"{first}-{first + PUBLISHED - 1}")
        command = ["pasta", "--foreground", "--config-net", *ports, str(pid)]
        stack.enter_context(_stack(world, command, inside, "eth0"))
        yield inside


def _program(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
    return ""


def _until(
    condition: Callable[[], bool], otherwise: str, process: subprocess.Popen[Any], timeout: float = 10.0
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"{otherwise} (exit status {process.poll()})")
        time.sleep(0.02)
