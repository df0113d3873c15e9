"""Published ports: rules by which vmnet passes on what comes to the host from outside.

They apply to what arrives on a real interface of the Mac, not to the Mac's own connections: those reach a guest at its
address. There are two sets of calls, an older one for IPv4 only (10.15) and one for both families (11.0); the newer is
used where it is there. Ports are in host byte order, addresses in network order. Rules go with the interface.
"""

from __future__ import annotations

import ctypes
import functools
import socket
import threading
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Literal

import msgspec

from openvmnet.engine.darwin import patience
from openvmnet.engine.darwin.blocks import Block, Kind
from openvmnet.engine.darwin.symbols import InAddr
from openvmnet.errors import HostError, MissingFeature, OptionError, VmnetError
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.engine.darwin.framework import Framework
    from openvmnet.engine.darwin.handle import Handle

PROTOCOLS: dict[str, int] = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_BOTH = "vmnet_interface_add_ip_port_forwarding_rule"
_HIGHEST = 65535


class Forward(msgspec.Struct, frozen=True):
    """One published port: the host's `external` goes to `internal` of the guest at `address`, IPv4 or IPv6 text."""

    protocol: Literal["tcp", "udp"]
    external: int
    address: str
    internal: int

    def validate(self) -> None:
        """Raise OptionError for a port or an address that is none."""
        _ = self.ip
        for port in (self.external, self.internal):
            if not 0 < port <= _HIGHEST:
                raise OptionError(
                    f"a port is a number from 1 to {_HIGHEST}, not {port}", option="port", value=str(port)
                )

    @property
    def ip(self) -> IPv4Address | IPv6Address:
        """The address as one. Raises OptionError."""
        try:
            return ip_address(self.address)
        except ValueError:
            sentence = f"a port is published to an IPv4 or IPv6 address, not to '{self.address}'"
            raise OptionError(sentence, option="address", value=self.address) from None

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return socket.AF_INET if isinstance(self.ip, IPv4Address) else socket.AF_INET6


class Rules:
    """The rules of one interface, which is in shared mode."""

    def __init__(self, framework: Framework, handle: Handle) -> None:
        self._framework, self._handle = framework, handle

    def add(self, forward: Forward) -> None:
        """Publish a port. Raises HostError with vmnet's status, MissingFeature for IPv6 on macOS 10.15."""
        forward.validate()
        protocol = PROTOCOLS[forward.protocol]
        if self._framework.has(_BOTH):
            packed = ctypes.create_string_buffer(forward.ip.packed, len(forward.ip.packed))
            arguments = (forward.family, ctypes.addressof(packed), forward.internal)
            self._complete(_BOTH, protocol, forward.external, *arguments)
            return
        address = InAddr((ctypes.c_uint8 * 4)(*self._old(forward).packed))
        name = "vmnet_interface_add_port_forwarding_rule"
        self._complete(name, protocol, forward.external, address, forward.internal)

    def remove(self, forward: Forward) -> None:
        """Take a rule back: the one of its protocol, family and external port. Raises HostError."""
        protocol = PROTOCOLS[forward.protocol]
        if self._framework.has(_BOTH):
            name = "vmnet_interface_remove_ip_port_forwarding_rule"
            self._complete(name, protocol, forward.external, forward.family)
        else:
            self._old(forward)
            self._complete("vmnet_interface_remove_port_forwarding_rule", protocol, forward.external)

    def get(self) -> list[Forward]:
        """The rules that vmnet has for this interface."""
        if not self._framework.has(_BOTH):
            name = "vmnet_interface_get_port_forwarding_rules"
            return self._ask(name, (), functools.partial(self._details, None))
        found: list[Forward] = []
        for family in (int(socket.AF_INET), int(socket.AF_INET6)):
            name = "vmnet_interface_get_ip_port_forwarding_rules"
            found += self._ask(name, (family,), functools.partial(self._details, family))
        return found

    @staticmethod
    def _old(forward: Forward) -> IPv4Address:
        address = forward.ip
        if not isinstance(address, IPv4Address):
            raise MissingFeature(f"this macOS has no {_BOTH}: published ports to IPv6 addresses need macOS 11.0")
        return address

    def _complete(self, name: str, *arguments: object) -> None:
        """A call whose block is given a status."""
        outcome: list[int] = []
        done = threading.Event()

        def answer(status: int) -> None:
            outcome.append(status)
            done.set()

        self._await(name, arguments, Kind.COMPLETION, answer, done)
        if Status.of(outcome[0]) is not Status.SUCCESS:
            raise HostError(f"{name}: {Status.of(outcome[0]).text}", status=Status.of(outcome[0]))

    def _ask(self, name: str, arguments: tuple[object, ...], read: Callable[[int], Forward]) -> list[Forward]:
        """A call whose block is given a list of rules, which are valid inside it only."""
        rules: list[Forward] = []
        done = threading.Event()

        def answer(array: int | None) -> None:
            count = self._framework.system_call("xpc_array_get_count", array) if array else 0
            rules.extend(read(self._framework.system_call("xpc_array_get_value", array, at)) for at in range(count))
            done.set()

        self._await(name, arguments, Kind.RULES, answer, done)
        return rules

    def _await(
        self,
        name: str,
        arguments: tuple[object, ...],
        kind: Kind,
        answer: Callable[..., None],
        done: threading.Event,
    ) -> None:
        block = Block.take(self._framework, kind, answer)

        def call() -> None:
            self._handle.enter()
            try:
                status = Status.of(self._framework.call(name, self._handle.ref, *arguments, block.pointer))
            finally:
                self._handle.leave()
            if status is not Status.SUCCESS:
                raise HostError(f"{name}: {status.text}", status=status)
            done.wait()

        try:
            patience.within(patience.ASK, name, call)
        except patience.Late:
            raise  # the system may still call it
        except VmnetError:
            block.give_back()
            raise
        block.give_back()

    def _details(self, family: int | None, rule: int) -> Forward:
        protocol, external, internal = ctypes.c_uint8(), ctypes.c_uint16(), ctypes.c_uint16()
        address = (ctypes.c_uint8 * 16)()
        at = [ctypes.addressof(each) for each in (protocol, external, address, internal)]
        if family is None:
            name, arguments = "vmnet_port_forwarding_rule_get_details", (rule, *at)
        else:
            name, arguments = "vmnet_ip_port_forwarding_rule_get_details", (rule, *at[:2], family, *at[2:])
        status = Status.of(self._framework.call(name, *arguments))
        if status is not Status.SUCCESS:
            raise HostError(f"{name}: {status.text}", status=status)
        octets = bytes(address)[: 16 if family == socket.AF_INET6 else 4]
        kind: Literal["tcp", "udp"] = "tcp" if protocol.value == socket.IPPROTO_TCP else "udp"
        return Forward(kind, external.value, str(ip_address(octets)), internal.value)
