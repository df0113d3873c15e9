"""Published ports, as QEMU's `-netdev user` writes them: `hostfwd=[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport`.

An empty protocol is tcp, an empty host address every address of the host's (IPv4), an empty guest address whatever
the VM has by DHCP. An IPv6 address stands in brackets, on either side, whatever the other one is. A sentence begins
with QEMU's words (net/slirp.c); what would be right follows them.

QEMU takes an address in any form that inet_aton(3) knows, and ports in any base: here an address has four parts, and a
port is decimal, so that what was typed is what `vmnet show` shows. Port 0 on the host's side is QEMU's only from 8.0
on, where it chooses one and tells nobody but its monitor: it is refused.
"""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Literal, NoReturn

import msgspec

from openvmnet.errors import OptionError

Protocol = Literal["tcp", "udp"]
Address = IPv4Address | IPv6Address

MOST = 512  # rules of one netdev; a request for a port carries them all
HIGHEST = 65535

_PROTOCOLS: dict[str, Protocol] = {"": "tcp", "tcp": "tcp", "udp": "udp"}
_SYNTAX = "[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport, such as tcp::2222-:22"


class Forward(msgspec.Struct, frozen=True):
    """One published port; `host` None is every IPv4 address of the host's, `guest` None the VM's leased one."""

    protocol: Protocol
    host: Address | None
    host_port: int
    guest: Address | None
    guest_port: int

    def __str__(self) -> str:
        """As an option's value: `parse(str(forward)) == forward`."""
        host, guest = _text(self.host), _text(self.guest)
        return f"{self.protocol}:{host}:{self.host_port}-{guest}:{self.guest_port}"


def parse(rule: str) -> Forward:
    """Read one rule. Raises OptionError, which says what part of it is wrong."""
    protocol, rest = _part(rule, rule, ":", "No : separators")
    if protocol not in _PROTOCOLS:
        invalid(rule, "Bad protocol name", f"it expects tcp or udp, not '{protocol}'")
    host, rest = _address(rule, rest, "host", "Missing : separator")
    text, rest = _part(rule, rest, "-", "Bad host port separator")
    host_port = _port(rule, text, "host")
    guest, rest = _address(rule, rest, "guest", "Missing guest address")
    if isinstance(guest, Address) and (guest.is_unspecified or guest.is_multicast or guest.is_loopback):
        invalid(rule, "Bad guest address", f"{guest} is no address of a guest's")
    if isinstance(host, Address) and host.is_multicast:
        invalid(rule, "Bad host address", f"{host} is no address of a host's")
    return Forward(_PROTOCOLS[protocol], host, host_port, guest, _port(rule, rest, "guest"))


def parse_all(rules: tuple[str, ...]) -> tuple[Forward, ...]:
    """Read the rules of one netdev, which are different ports of the host's. Raises OptionError."""
    if len(rules) > MOST:
        raise OptionError(
            f"Parameter 'hostfwd' is there {len(rules)} times; a netdev takes {MOST}", option="hostfwd", value=rules[-1]
        )
    taken: dict[tuple[object, ...], str] = {}
    forwards = []
    for rule in rules:
        forward = parse(rule)
        key = (forward.protocol, forward.host, forward.host_port)
        if key in taken:
            refuse(rule, f"'{taken[key]}' has that port of the host's")
        taken[key] = rule
        forwards.append(forward)
    return tuple(forwards)


def refusal(rule: object, why: str) -> str:
    """QEMU's words for a rule that is read and cannot be had, and why."""
    return f"Could not set up host forwarding rule '{rule}': {why}"


def refuse(rule: object, why: str) -> NoReturn:
    """Raise OptionError with that."""
    raise OptionError(refusal(rule, why), option="hostfwd", value=str(rule))


def invalid(rule: str, reason: str, sentence: str) -> NoReturn:
    """Raise OptionError in QEMU's words, and with what would be right."""
    raise OptionError(f"Invalid host forwarding rule '{rule}' ({reason}): {sentence}", option="hostfwd", value=rule)


def _part(rule: str, text: str, separator: str, reason: str) -> tuple[str, str]:
    part, found, rest = text.partition(separator)
    if not found:
        invalid(rule, reason, f"it expects {_SYNTAX}")
    return part, rest


def _address(rule: str, text: str, side: Literal["host", "guest"], reason: str) -> tuple[Address | None, str]:
    """The address that `text` begins with, and what follows its colon."""
    if text.startswith("["):
        inside, found, rest = text[1:].partition("]:")
        if not found:
            invalid(rule, reason, f"it expects {_SYNTAX}, an IPv6 address in brackets")
        try:
            if "%" not in inside:
                return IPv6Address(inside), rest
        except AddressValueError:
            pass
        invalid(rule, f"Bad {side} address", f"it expects an IPv6 address without a zone, not '{inside}'")
    part, rest = _part(rule, text, ":", reason)
    if not part:
        return None, rest
    try:
        return IPv4Address(part), rest
    except AddressValueError:
        expected = "an IPv4 address such as 192.168.64.2, or an IPv6 address in brackets"
        invalid(rule, f"Bad {side} address", f"it expects {expected}, not '{part}'")


def _port(rule: str, text: str, side: Literal["host", "guest"]) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and not text.startswith("0") and int(text) <= HIGHEST:
        return int(text)
    invalid(rule, f"Bad {side} port", f"it expects a number from 1 to {HIGHEST}, not '{text}'")


def _text(address: Address | None) -> str:
    if address is None:
        return ""
    return f"[{address}]" if isinstance(address, IPv6Address) else str(address)
