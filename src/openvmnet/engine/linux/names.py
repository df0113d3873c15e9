"""The names and numbers that the rules, the links and the sockets of a network's namespace share."""

from __future__ import annotations

BRIDGE = "vmnet0"
UPLINK = "up0"
TO_SOCKET, TO_PYTHON = 1, 2  # marks of packets: to a socket here, to the slow path
PORT_MARK = 0x1000  # and a port's number: the mark of what came from there
PORT_PREFIX = "vm"  # TAPs of guests are vm1, vm2, ...
LISTENER = 1  # the pump's port on 127.0.0.1 and ::1 of the namespace, where nobody else binds


def is_port(link: str) -> bool:
    """Whether `link` is a guest's."""
    return link.startswith(PORT_PREFIX) and link.removeprefix(PORT_PREFIX).isdigit()


def number(link: str) -> int:
    """The number of a guest's link."""
    return int(link.removeprefix(PORT_PREFIX))


def mark(link: str) -> int:
    """What the packets of a guest's link are marked with."""
    return PORT_MARK + number(link)


def limit(rate: int, unit: str = "second", burst: int | None = None) -> str:
    """What nft matches beyond `rate` packets a `unit`, of which `burst` (as many as the rate) may come at once."""
    return f"limit rate over {rate}/{unit} burst {rate if burst is None else burst} packets"
