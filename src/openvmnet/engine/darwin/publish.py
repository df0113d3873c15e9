"""A netdev's published ports (`hostfwd`), as rules of vmnet's.

vmnet publishes on all real interfaces of the Mac and in shared mode only, so a rule cannot name an address of the
host's. It has to name one of the guest's: where the option does not, the rule is added when bootpd's file has a lease
for the VM's MAC on this network, and again when that is another one; an `address` that is kept for the VM is the
guest's whether or not bootpd writes a lease for it. `refresh` looks for it; whoever has the interface
calls it every few seconds, and the file is read only when it has changed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

import msgspec

from openvmnet.engine.darwin import leases, ports
from openvmnet.errors import HostError, Stopped, VmnetError
from openvmnet.netdev import Host, hostfwd

if TYPE_CHECKING:
    from openvmnet.engine.darwin.ports import Rules
    from openvmnet.netdev import Bridged, Forward, Shared

_LOG = logging.getLogger(__name__)


def forwards(options: Shared | Host | Bridged) -> tuple[Forward, ...]:
    """The rules of a netdev. Raises OptionError for what vmnet cannot do."""
    found = options.forwards
    for forward in found:
        if isinstance(options, Host):
            hostfwd.refuse(forward, "vmnet publishes ports of vmnet-shared only, not of vmnet-host")
        if forward.host is not None:
            hostfwd.refuse(
                forward,
                f"on macOS a port is published on all of the Mac's real interfaces: leave {forward.host} out, as in "
                f"'{forward.protocol}::{forward.host_port}-...'",
            )
    kept = options.reservation
    if kept is None:
        return found
    return tuple(one if one.guest is not None else msgspec.structs.replace(one, guest=kept) for one in found)


def refuse_leased(found: tuple[Forward, ...]) -> None:
    """Raise OptionError for a rule whose guest is only known by lease, where nobody would look for that."""
    for forward in found:
        if forward.guest is None:
            hostfwd.refuse(
                forward,
                "on macOS a program's own interface publishes to an address that the rule names, as in "
                f"'{forward.protocol}::{forward.host_port}-192.168.64.2:{forward.guest_port}'",
            )


class Publisher:
    """The rules of one interface. `mac` is the VM's; `network` what the interface is on, None where it has no IPv4."""

    def __init__(self, rules: Rules, found: tuple[Forward, ...], mac: str | None, network: IPv4Network | None) -> None:
        self._rules = rules
        self._named = [one for one in found if one.guest is not None]
        self._leased = [one for one in found if one.guest is None]
        self._mac = mac
        self._network = network
        self._added: dict[Forward, ports.Forward] = {}
        self._failed: dict[Forward, str] = {}  # the address for which it was said
        self._stamp = 0
        self._ends = 0.0  # when the lease that was found is over

    def begin(self) -> None:
        """Add the rules that name their guest. Raises HostError in QEMU's words."""
        for forward in self._named:
            try:
                self._rules.add(_rule(forward, str(forward.guest)))
            except HostError as error:
                raise _failure(forward, error) from error

    def refresh(self) -> None:
        """Have the other rules lead to the VM's address as it is now; what fails is said once, and tried again."""
        if not self._leased or self._mac is None:
            return
        stamp, now = leases.stamp(), time.time()
        if stamp == self._stamp and now < self._ends and not self._failed:
            return
        mine = [one for one in leases.read() if self._network is None or one.address in self._network]
        lease = leases.address_of(self._mac, mine, now)
        self._stamp = stamp
        self._ends = now + leases.AGAIN if lease is None else float(lease.expires)
        if lease is None:
            return  # an old rule stays: bootpd writes a renewal late rather than early
        for forward in self._leased:
            self._lead(forward, str(lease.address))

    def _lead(self, forward: Forward, address: str) -> None:
        rule, before = _rule(forward, address), self._added.get(forward)
        if before == rule:
            return
        try:
            if before is not None:
                with contextlib.suppress(HostError):  # if it is still there, the next call says so
                    self._rules.remove(before)
            self._rules.add(rule)
        except Stopped:
            return  # the VM has gone
        except VmnetError as error:
            if self._failed.get(forward) != address:
                self._failed[forward] = address
                _LOG.warning("%s", _failure(forward, error))
            return
        self._failed.pop(forward, None)
        self._added[forward] = rule


def network_of(start: str | None, mask: str | None) -> IPv4Network | None:
    """The network of an interface, by what vmnet says of it."""
    try:
        return None if start is None else IPv4Network(f"{start}/{mask}", strict=False)
    except ValueError:
        return None


def _rule(forward: Forward, address: str) -> ports.Forward:
    return ports.Forward(forward.protocol, forward.host_port, address, forward.guest_port)


def _failure(forward: Forward, error: VmnetError) -> HostError:
    return HostError(
        hostfwd.refusal(forward, error.message), hint="vmnet ls; another VM may have that port", status=error.status
    )
