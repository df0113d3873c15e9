"""Networks as objects, macOS 26: what an interface's own description cannot say.

How it works. A configuration is filled in, a network is created from it, and interfaces are started on the network.
Both are CoreFoundation objects: whoever made one releases it. A network reserves its subnet as long as it lives, and
dies with the process that made it; its reservations and published ports go when its last interface stops. The
interface id and "allocate no MAC" are ignored here: the MAC is another one each time.

Only through these there are DHCP reservations, a choice of the outside interface, and DHCP, DNS, router
advertisements or NAT switched off. Before macOS 26 reservations are lines of /etc/bootptab (see `bootptab`), and the
services cannot be switched off but with a private network (`net-uuid`), which has none of them.

Two traps. The rule for a published port takes the internal port first, the interface's own the external one. And the
"subnet" wants the gateway's address: with the subnet's own address, and DHCP on, the start fails without a word.
"""

from __future__ import annotations

import ctypes
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Self

import msgspec

from openvmnet.engine.darwin import patience
from openvmnet.engine.darwin.description import Extras, describe_offloads
from openvmnet.engine.darwin.handle import Handle, StartFailed
from openvmnet.engine.darwin.ports import PROTOCOLS, Forward
from openvmnet.errors import HostError, OptionError, Stopped
from openvmnet.netdev import Subnet
from openvmnet.status import Status

if TYPE_CHECKING:
    from openvmnet.engine.darwin.framework import Framework, Mode
    from openvmnet.engine.darwin.xpc import Scalar

_CONFIGURATION = "vmnet_network_configuration_"
_MAC = 6


class Reservation(msgspec.Struct, frozen=True):
    """The address that DHCP gives to the guest with this MAC."""

    mac: str
    address: IPv4Address


class Settings(msgspec.Struct, frozen=True):
    """A network's configuration; None leaves the choice to vmnet: a /24 of 192.168/16, a random ULA, MTU 1500."""

    subnet: Subnet | None = None
    prefix: IPv6Network | None = None
    mtu: int | None = None
    external_interface: str | None = None
    reservations: tuple[Reservation, ...] = ()
    forwards: tuple[Forward, ...] = ()
    nat44: bool = True
    nat66: bool = True
    dhcp: bool = True
    dns_proxy: bool = True
    router_advertisement: bool = True


class Network:
    """A network object of vmnet's; a context manager that releases it, which interfaces on it survive."""

    def __init__(
        self, framework: Framework, mode: Mode, settings: Settings, *, timeout: float = patience.START
    ) -> None:
        self.framework = framework
        self.mode = mode
        self.settings = settings
        self._pointer: int | None = None
        self._pointer = patience.within(timeout, "vmnet_network_create", self._build, discard=self._drop)

    @classmethod
    def of_serialization(cls, framework: Framework, mode: Mode, serialization: int) -> Network:
        """The network that an XPC object from `serialize` names, of this process or of one that sent it over XPC."""
        network = cls.__new__(cls)
        network.framework, network.mode, network.settings = framework, mode, Settings()
        name = "vmnet_network_create_with_serialization"
        network._pointer = patience.within(
            patience.ASK, name, lambda: network._create(name, serialization), discard=network._drop
        )
        return network

    @property
    def pointer(self) -> int:
        """vmnet_network_ref. Raises Stopped after `release`."""
        if self._pointer is None:
            raise Stopped("the network is released")
        return self._pointer

    @property
    def subnet(self) -> IPv4Network:
        """The subnet that it has."""
        subnet, mask = (ctypes.c_uint8 * 4)(), (ctypes.c_uint8 * 4)()
        self.framework.call(
            "vmnet_network_get_ipv4_subnet", self.pointer, ctypes.addressof(subnet), ctypes.addressof(mask)
        )
        return IPv4Network((bytes(subnet), str(IPv4Address(bytes(mask)))), strict=False)

    @property
    def prefix(self) -> IPv6Network:
        """The IPv6 prefix that it has."""
        prefix, length = (ctypes.c_uint8 * 16)(), ctypes.c_uint8()
        self.framework.call(
            "vmnet_network_get_ipv6_prefix", self.pointer, ctypes.addressof(prefix), ctypes.addressof(length)
        )
        return IPv6Network((bytes(prefix), length.value), strict=False)

    def start(self, extras: Extras, *, isolated: bool = False, timeout: float = patience.START) -> Handle:
        """An interface on the network. Raises as `Handle` does."""
        desc: dict[str, Scalar] = {"vmnet_allocate_mac_address": extras.allocate_mac_address}
        if isolated:
            desc["vmnet_enable_isolation"] = True
        desc |= describe_offloads(extras)
        return Handle(self.framework, desc, network=self.pointer, timeout=timeout)

    def serialize(self) -> int:
        """An XPC object that names the network, to be sent over XPC; the caller's to release (xpc_release)."""
        return self._create("vmnet_network_copy_serialization", self.pointer)

    def release(self) -> None:
        """Give the network back; the second time does nothing."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._drop(pointer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _drop(self, pointer: int) -> None:
        self.framework.foundation.function("CFRelease")(pointer)

    def _build(self) -> int:
        """On a thread of its own: the configuration has to outlive the call, however long that takes."""
        configuration = self._create("vmnet_network_configuration_create", int(self.mode))
        try:
            self._configure(configuration)
            return self._create("vmnet_network_create", configuration)
        finally:
            self._drop(configuration)

    def _create(self, name: str, argument: int) -> int:
        """Call a function that gives an object, or NULL and a status."""
        status = ctypes.c_uint32()
        made: int | None = self.framework.call(name, argument, ctypes.addressof(status))
        if not made:
            raise StartFailed(f"{name}: {Status.of(status.value).text}", status=Status.of(status.value))
        return made

    def _configure(self, configuration: int) -> None:
        settings = self.settings
        if settings.external_interface is not None:
            self._set("set_external_interface", configuration, settings.external_interface.encode())
        if settings.subnet is not None:
            gateway, mask = _octets(settings.subnet.gateway.packed), _octets(settings.subnet.mask.packed)
            self._set("set_ipv4_subnet", configuration, ctypes.addressof(gateway), ctypes.addressof(mask))
        if settings.prefix is not None:
            prefix = _octets(settings.prefix.network_address.packed)
            self._set("set_ipv6_prefix", configuration, ctypes.addressof(prefix), settings.prefix.prefixlen)
        if settings.mtu is not None:
            self._set("set_mtu", configuration, settings.mtu)
        for reservation in settings.reservations:
            mac, address = _octets(_mac(reservation.mac)), _octets(reservation.address.packed)
            self._set("add_dhcp_reservation", configuration, ctypes.addressof(mac), ctypes.addressof(address))
        for forward in settings.forwards:
            forward.validate()
            address = _octets(forward.ip.packed)
            self._set(
                "add_port_forwarding_rule",
                configuration,
                PROTOCOLS[forward.protocol],
                forward.family,
                forward.internal,
                forward.external,
                ctypes.addressof(address),
            )
        for name in ("nat44", "nat66", "dhcp", "dns_proxy", "router_advertisement"):
            if not getattr(settings, name):
                self.framework.call(f"{_CONFIGURATION}disable_{name}", configuration)

    def _set(self, what: str, configuration: int, *arguments: object) -> None:
        status = Status.of(self.framework.call(f"{_CONFIGURATION}{what}", configuration, *arguments))
        if status is not Status.SUCCESS:
            raise HostError(f"{_CONFIGURATION}{what}: {status.text}", status=status)


def _octets(packed: bytes) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * len(packed))(*packed)


def _mac(text: str) -> bytes:
    try:
        octets = bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        octets = b""
    if len(octets) != _MAC:
        raise OptionError(f"a MAC is six bytes such as 52:54:00:12:34:56, not '{text}'", option="mac", value=text)
    return octets
