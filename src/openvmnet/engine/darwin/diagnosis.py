"""Why vmnet refused: its status says little, so the causes that are known are looked for.

How it works. FAILURE (1001) comes for a missing right, an address outside RFC 1918, a subnet that the other mode holds,
what a crash left, too many interfaces, and more; MEM_FAILURE (1002) on macOS 26 mostly for a missing entitlement; and
NOT_AUTHORIZED (1010) is not what a missing right gives. So the number decides nothing. Each check looks at the Mac for
one cause and gives a sentence with a cure, or nothing; they are put in the order in which one hides the other, and the
first found is the error. Where none is found, the error says what was looked for.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

import msgspec

from openvmnet.engine.darwin import entitlement
from openvmnet.engine.darwin.framework import INTERFACES
from openvmnet.engine.darwin.mac import Mac
from openvmnet.errors import Conflict, Exhausted, HostError, MissingFeature, OptionError, VmnetError
from openvmnet.netdev import Bridged, Host, Shared
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openvmnet.engine.darwin.handle import StartFailed
    from openvmnet.engine.darwin.mac import Link

    Options = Shared | Host | Bridged

_NAT = "/Library/Preferences/SystemConfiguration/com.apple.nat.plist"
_LEFT = "restart the Mac, or: sudo ifconfig {name} destroy"


class Cause(msgspec.Struct, frozen=True):
    """One thing that keeps vmnet from starting an interface: a sentence, its cure, and the error that it is."""

    sentence: str
    cure: str | None
    error: type[VmnetError] = HostError


def explain(failed: StartFailed, options: Options, mac: Mac | None = None) -> VmnetError:
    """The error to raise for a start that vmnet refused: the first cause that is found, with vmnet's status."""
    mac = mac or Mac()
    found = next(causes(options, mac, failed.status), None)
    if found is None:
        looked = "this Mac's rights, Internet Sharing, the subnet and the number of interfaces give no reason"
        return HostError(f"{failed.message}; {looked}", hint="vmnet doctor", status=failed.status)
    error = _make(found)
    error.status = failed.status
    return error


def _make(cause: Cause) -> VmnetError:
    if cause.error is OptionError:
        return OptionError(cause.sentence, option="start-address", value="", hint=cause.cure)
    return cause.error(cause.sentence, hint=cause.cure)


def causes(options: Options, mac: Mac, status: Status = Status.FAILURE) -> Iterator[Cause]:
    """The causes that are found, in the order in which one hides the other."""
    checks: tuple[Callable[[Options, Mac, list[Link]], Cause | None], ...] = (
        _permission,
        _private,
        _sharing,
        _limit,
        _held,
        _stale,
        _clash,
    )
    links = mac.links()
    for check in checks:
        cause = check(options, mac, links)
        if cause is not None:
            yield cause
    if status is Status.SHARING_SERVICE_BUSY:
        yield Cause(
            "conflict, sharing service is in use: another program holds the service that vmnet shares addresses with",
            "quit other virtual machine programs (VMware Fusion, Docker), and turn Internet Sharing off",
            Conflict,
        )


def about_subnets(options: Options, mac: Mac) -> Iterator[Cause]:
    """Those of the causes that are about the host's other networks, and about what a crash left."""
    links = mac.links()
    for check in (_stale, _clash):
        cause = check(options, mac, links)
        if cause is not None:
            yield cause


def clash_of(start: str, mask: str, mac: Mac | None = None) -> Cause | None:
    """What a subnet that vmnet chose collides with: macOS 26 takes 192.168.2.0/24, which is many a home's own."""
    mac = mac or Mac()
    gateway, network = IPv4Address(start), IPv4Network(f"{start}/{mask}", strict=False)
    for link in mac.links():
        for address, other in link.networks:
            if not link.bridge and network.overlaps(other) and address != gateway:
                return Cause(
                    f"vmnet chose {network}, and this Mac is on it itself: {link.name} has {address}/{other.prefixlen}",
                    "give start-address, end-address and subnet-mask of another network",
                    Conflict,
                )
    return None


def _permission(_options: Options, mac: Mac, _links: list[Link]) -> Cause | None:
    if entitlement.permitted(mac):
        return None
    # vmnet run is told before it starts a relay, and uses the copy by itself, so this is a program of the user's own.
    refusal = entitlement.refusal(mac, entitlement.PROGRAM)
    cure = refusal.hint
    if entitlement.signed_counts(mac) and entitlement.copy_path().exists():
        cure = entitlement.PROGRAM
    return Cause(refusal.message, cure, MissingFeature)


def _private(options: Options, _mac: Mac, _links: list[Link]) -> Cause | None:
    """Addresses that vmnet takes none of: what `validate` finds, for whoever came here without it."""
    try:
        options.validate()
    except OptionError as error:
        return Cause(error.message, error.hint, OptionError)
    return None


def sharing(mac: Mac) -> bool:
    """Whether Internet Sharing is on."""
    nat = mac.plist(_NAT).get("NAT")
    return isinstance(nat, dict) and nat.get("Enabled") in (1, True)


def _sharing(options: Options, mac: Mac, _links: list[Link]) -> Cause | None:
    if isinstance(options, Bridged) or not sharing(mac):
        return None
    return Cause(
        "Internet Sharing is on, and vmnet shares its service",
        "turn it off: System Settings > General > Sharing > Internet Sharing",
        Conflict,
    )


def _limit(_options: Options, _mac: Mac, links: list[Link]) -> Cause | None:
    count = sum(link.name.startswith("vmenet") for link in links)
    if count < INTERFACES:
        return None
    return Cause(
        f"this Mac has {count} vmnet interfaces, and macOS has no more than {INTERFACES}",
        "stop a virtual machine",
        Exhausted,
    )


def _overlapping(options: Options, links: list[Link]) -> Iterator[tuple[Link, str]]:
    """The host's interfaces whose network overlaps what was asked for."""
    subnet = None if isinstance(options, Bridged) else options.subnet
    if subnet is None:
        return
    for link in links:
        for address, network in link.networks:
            if subnet.overlaps(network):
                yield link, f"{address}/{network.prefixlen}"


def _held(options: Options, _mac: Mac, links: list[Link]) -> Cause | None:
    for link, address in _overlapping(options, links):
        if link.bridge and link.members:
            members = ", ".join(link.members)
            return Cause(
                f"{link.name} has {address} already, with {members} on it: a subnet belongs to one mode, and to one "
                "choice of addresses",
                "take the same mode and addresses as the others there, or another subnet",
                Conflict,
            )
    return None


def _stale(_options: Options, _mac: Mac, links: list[Link]) -> Cause | None:
    for link in links:
        if link.bridge and link.networks and not link.members:
            address = link.networks[0][0]
            return Cause(
                f"{link.name} has the address {address} and nobody on it: a crash left it",
                _LEFT.format(name=link.name),
            )
    return None


def _clash(options: Options, _mac: Mac, links: list[Link]) -> Cause | None:
    for link, address in _overlapping(options, links):
        if not link.bridge:
            return Cause(
                f"this Mac is on that subnet itself: {link.name} has {address}",
                "take another start-address, end-address and subnet-mask",
                Conflict,
            )
    return None
