"""Which addresses a network gets.

Given ones are taken as they are, if nothing stands in the way. Without, a network gets what its name had the last time;
a new name gets the first of the candidates (192.168.64.0/24 to 192.168.127.0/24) that no route of the host, no running
network and no other remembered name has. What stands in the way of a subnet: a route of the host, since guests could
not reach what is behind it (any table: VPNs have their own), and another running network of the same user. Neither can
break anything but the reach of those guests, so `force` passes over both.
"""

from __future__ import annotations

import json
import subprocess
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

import msgspec

from openvmnet import netdev, state
from openvmnet.errors import Conflict, HostError
from openvmnet.netdev import Subnet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openvmnet.control import Spec


class Remembered(msgspec.Struct, frozen=True):
    """What is kept of a network between its runs: STATE/NAME/network.json."""

    subnet: Subnet


class Choice(msgspec.Struct, frozen=True):
    """The addresses, and what a person should know of how they came about."""

    subnet: Subnet
    note: str | None = None


def choose(name: str, spec: Spec) -> Choice:
    """The addresses for network `name` as `spec` wants it. `OptionError` for wrong ones, `Conflict` for taken ones."""
    taken = dict(_taken(name))
    given = Subnet.from_options(spec.start_address, spec.end_address, spec.subnet_mask)
    if given is not None:
        for network, what in taken.items():
            if given.overlaps(network) and not spec.force:
                raise Conflict(
                    f"start-address={given.gateway} with subnet-mask={given.mask} overlaps {what}; "
                    "a free private subnet would be right",
                    hint="give other addresses, or none for an automatic choice, or --force",
                )
        return Choice(given)
    before = _remembered(name)
    if spec.force:
        return Choice(before or next(netdev.candidates()))
    if before is not None and not any(before.overlaps(network) for network in taken):
        return Choice(before)
    for network, what in _others(name):
        taken.setdefault(network, what)
    for candidate in netdev.candidates():
        if not any(candidate.overlaps(network) for network in taken):
            note = None
            if before is not None:
                what = next(what for network, what in taken.items() if before.overlaps(network))
                note = (
                    f"network '{name}' had {before.network}, which now overlaps {what}; now it has {candidate.network}"
                )
            return Choice(candidate, note)
    raise Conflict(
        "every subnet from 192.168.64.0/24 to 192.168.127.0/24 is taken",
        hint="give start-address, end-address and subnet-mask, or --force",
    )


def remember(name: str, subnet: Subnet) -> None:
    """Keep `subnet` for the next run of network `name`."""
    if _remembered(name) != subnet:
        state.write(state.remembered(name) / "network.json", Remembered(subnet), durable=True)


def _taken(name: str) -> Iterator[tuple[IPv4Network, str]]:
    for network in _routes():
        yield network, f"this host's route to {network}"
    for other in state.names():
        record = _read(state.runtime_root() / other / "network.json")
        if other != name and record is not None:
            yield record.network, f"running network '{other}' ({record.network})"


def _others(name: str) -> Iterator[tuple[IPv4Network, str]]:
    for path in sorted(state.state_root().iterdir()):
        record = _read(path / "network.json")
        if path.name != name and record is not None:
            yield record.network, f"the subnet kept for network '{path.name}'"


def _remembered(name: str) -> Subnet | None:
    return _read(state.state_root() / name / "network.json")


def _read(path: Path) -> Subnet | None:
    try:
        return state.decode(path.read_bytes(), Remembered).subnet
    except (OSError, msgspec.DecodeError):  # none, or not ours: nothing is remembered then
        return None


def _routes() -> list[IPv4Network]:
    """The host's unicast routes but the default ones, from every table."""
    argv = ["ip", "-j", "-4", "route", "show", "table", "all", "type", "unicast"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=5)
        destinations = [str(route.get("dst", "default")) for route in json.loads(done.stdout or "[]")]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise HostError(f"the host's routes cannot be read: {error}", hint="sudo apt-get install iproute2") from error
    networks = []
    for destination in destinations:
        if destination != "default":
            network = IPv4Network(destination, strict=False)
            # Halves of the default route (0.0.0.0/1) are a VPN's way to say "everything".
            if network.prefixlen > 1 and network.network_address != IPv4Address("224.0.0.0"):
                networks.append(network)
    return networks
