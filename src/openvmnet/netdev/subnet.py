"""The addresses of a network, as the options name them.

The first address is the gateway, the addresses after it up to the last are the DHCP pool, and any other address of the
subnet is free for static use. Without them a network takes one of `candidates`: the 64 networks of 24 bits that macOS
chooses from in shared mode, and the 64 in host mode. QEMU itself looks at no value; here each is validated, and the
sentence names the option, the value and what would be right.
"""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, NetmaskValueError
from typing import TYPE_CHECKING, NoReturn

import msgspec

from openvmnet.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TRIPLE = ("start-address", "end-address", "subnet-mask")
_PRIVATE = (IPv4Network("10.0.0.0/8"), IPv4Network("172.16.0.0/12"), IPv4Network("192.168.0.0/16"))
_UNIQUE_LOCAL = IPv6Network("fd00::/8")
_DEFAULT_THIRD = {"shared": range(64, 128), "host": range(128, 192)}


class Subnet(msgspec.Struct, frozen=True):
    """Addresses of a network: the gateway, the DHCP pool from `first` to `last` (both in it), and the mask's length.

    The pool directly follows the gateway. Built by `from_options` or `candidates`, which validate.
    """

    gateway: IPv4Address
    first: IPv4Address
    last: IPv4Address
    prefixlen: int

    @property
    def network(self) -> IPv4Network:
        """The subnet itself, host bits cleared."""
        return IPv4Network((int(self.gateway), self.prefixlen), strict=False)

    @property
    def mask(self) -> IPv4Address:
        """The subnet mask."""
        return self.network.netmask

    @property
    def pool(self) -> str:
        """The addresses that DHCP gives, in words."""
        return f"{self.first} to {self.last}"

    def gives(self, address: IPv4Address) -> bool:
        """Whether DHCP may give this address: it is in the pool, which the gateway is not."""
        return self.first <= address <= self.last

    def why_not(self, address: IPv4Address) -> str:
        """What an address is that DHCP may not give, in words."""
        return "is the gateway's" if address == self.gateway else "is not in the DHCP pool"

    def overlaps(self, other: Subnet | IPv4Network) -> bool:
        """Whether any address lies in both."""
        return self.network.overlaps(other.network if isinstance(other, Subnet) else other)

    @classmethod
    def from_options(cls, start: str | None, end: str | None, mask: str | None) -> Subnet | None:
        """The subnet that `start-address`, `end-address` and `subnet-mask` mean, or None if none of them is given.

        Raises OptionError unless all three are given and name a gateway and a pool inside one private subnet.
        """
        given = dict(zip(_TRIPLE, (start, end, mask), strict=True))
        if start is None and end is None and mask is None:
            return None
        if start is None or end is None or mask is None:
            absent = [name for name, value in given.items() if value is None]
            raise OptionError(
                f"'start-address', 'end-address', 'subnet-mask' should be provided together: "
                f"{_join([repr(name) for name in absent])} {'is' if len(absent) == 1 else 'are'} missing",
                option=absent[0],
                value="",
            )
        first, last = _address("start-address", start), _address("end-address", end)
        length = _prefixlen(mask)
        subnet = IPv4Network((int(first), length), strict=False)
        if not _private(subnet):
            need = next(net.prefixlen for net in _PRIVATE if first in net)
            _wrong(
                "subnet-mask",
                mask,
                f"a mask of /{need} to /30 with start-address {first}, or the subnet leaves RFC 1918",
            )
        if last not in subnet:
            _wrong("end-address", end, f"an address of {subnet}, the subnet of start-address {first}")
        _host("start-address", first, subnet)
        _host("end-address", last, subnet)
        if last <= first:
            _wrong("end-address", end, f"an address after start-address {first}")
        return cls(first, first + 1, last, length)


def candidates(mode: str = "shared") -> Iterator[Subnet]:
    """The subnets a network without addresses may take, in order.

    192.168.64.0/24 to 192.168.127.0/24 in mode `shared`, 192.168.128.0/24 to 192.168.191.0/24 in mode `host`.
    """
    for third in _DEFAULT_THIRD[mode]:
        base = IPv4Address(f"192.168.{third}.0")
        yield Subnet(base + 1, base + 2, base + 254, 24)


def _address(option: str, value: str) -> IPv4Address:
    try:
        address = IPv4Address(value)
    except AddressValueError:
        _wrong(option, value, "an IPv4 address such as 192.168.64.1")
    if not any(address in net for net in _PRIVATE):
        _wrong(option, value, "a private address of RFC 1918 (in 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16)")
    return address


def _prefixlen(value: str) -> int:
    # IPv4Network also takes a bare length and a host mask (0.0.0.255); subnet-mask is a dotted mask and nothing else.
    try:
        bits = int(IPv4Address(value))
        length = IPv4Network((0, value)).prefixlen
    except (AddressValueError, NetmaskValueError):
        bits, length = 0, 0
    if not 8 <= length <= 30 or bits >> 31 == 0:
        _wrong("subnet-mask", value, "a contiguous mask from 255.0.0.0 (/8) to 255.255.255.252 (/30)")
    return length


def _private(subnet: IPv4Network) -> bool:
    return any(subnet.subnet_of(net) for net in _PRIVATE)


def _host(option: str, address: IPv4Address, subnet: IPv4Network) -> None:
    for special, what in ((subnet.network_address, "network"), (subnet.broadcast_address, "broadcast")):
        if address == special:
            first, last = subnet.network_address + 1, subnet.broadcast_address - 1
            _wrong(option, str(address), f"a host's address of {subnet} ({first} to {last})", f"the {what} address ")


def unique_local(value: str) -> IPv6Network:
    """The /64 that `nat66-prefix` means. Raises OptionError unless it is a unique local prefix (RFC 4193)."""
    text, _, length = value.partition("/")
    try:
        prefix = IPv6Address(text)
    except AddressValueError:
        prefix = None
    right = prefix is not None and prefix in _UNIQUE_LOCAL and int(prefix) & ((1 << 64) - 1) == 0 and "%" not in text
    if prefix is None or not right or (length != "64" and "/" in value):
        _wrong("nat66-prefix", value, "a unique local IPv6 prefix (fd00::/8) of 64 bits such as fd12:3456:789a:1::")
    return IPv6Network((int(prefix), 64))


def reservable(value: str, subnet: Subnet | None) -> IPv4Address:
    """The address that `address` means. Raises OptionError unless it is one of the pool, where that is known."""
    address = _address("address", value)
    if subnet is not None and not subnet.gives(address):
        what = "the gateway's " if address == subnet.gateway else ""
        _wrong("address", value, f"an address of the DHCP pool, {subnet.pool}", what)
    return address


def _wrong(option: str, value: str, right: str, what: str = "") -> NoReturn:
    raise OptionError(f"Parameter '{option}' expects {right}, not {what}'{value}'", option=option, value=value)


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
