"""Which addresses a network gets.

Given ones are taken as they are, if nothing stands in the way. Without, a network gets what its name had the last time;
a new name gets the first of its mode's candidates (192.168.64.0/24 to 192.168.127.0/24 for `shared`, from there to
192.168.191.0/24 for `host`) that no route of the host, no running network and no other remembered name has. Where names
have all of them, the one that was used longest ago shares its own. In IPv6 a network has a random unique local /64
(RFC 4193), kept with its name, or the one that `nat66-prefix` gives.

What stands in the way of a subnet: a route of the host, since guests could not reach what is behind it (any table: VPNs
have their own), and another running network of the same user. Neither can break anything but the reach of those guests,
so `force` passes over both.
"""

from __future__ import annotations

import json
import os
import subprocess
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING, TypeVar

import msgspec

from openvmnet import control, netdev, state
from openvmnet.config import DEFAULT_MTU, NetworkConfig, running_config
from openvmnet.errors import Conflict, HostError, MissingFeature
from openvmnet.netdev import Subnet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from openvmnet.messages import Spec

_UNIQUE_LOCAL = 0xFD << 120
_Kept = TypeVar("_Kept")


class Remembered(msgspec.Struct, frozen=True):
    """What is kept of a network between its runs: STATE/NAME/network.json."""

    subnet: Subnet | None = None
    prefix: IPv6Network | None = None


class Choice(msgspec.Struct, frozen=True):
    """The network as it will be, and what a person should know of how that came about."""

    config: NetworkConfig
    note: str | None = None


def choose(name: str, spec: Spec) -> Choice:
    """Network `name` as `spec` wants it. `OptionError` for wrong values, `Conflict` for addresses that are taken."""
    given = Subnet.from_options(spec.start_address, spec.end_address, spec.subnet_mask)
    prefix = None if spec.nat66_prefix is None else netdev.unique_local(spec.nat66_prefix)
    config = NetworkConfig(
        name=name,
        mode=spec.mode,
        mtu=DEFAULT_MTU if spec.mtu is None else spec.mtu,
        net_uuid=spec.net_uuid,
        host_loopback=spec.host_loopback,
        linger=spec.linger,
    )
    running = {other: one for other, one in _running() if other != name}
    if spec.net_uuid is not None:
        _refuse_second(name, spec.net_uuid, running)
    if spec.net_uuid is not None and given is None:  # the guests' own: no address of the host is on it
        return Choice(config)
    routes = _routes()
    before = _read(state.state_root() / name / "network.json", Remembered) or Remembered()
    subnet, note = _subnet(name, spec, given, before.subnet, _taken(routes, running))
    prefix = _prefix(spec, prefix, before.prefix, routes, running)
    return Choice(msgspec.structs.replace(config, subnet=subnet, prefix=prefix), note)


def remember(config: NetworkConfig) -> None:
    """Keep the addresses for the next run of the network."""
    path = state.state_root() / config.name / "network.json"
    kept = Remembered(config.subnet, config.prefix)
    if config.subnet is not None and _read(path, Remembered) != kept:
        state.write(state.remembered(config.name) / "network.json", kept, durable=True)


def _refuse_second(name: str, uuid: str, running: Mapping[str, NetworkConfig]) -> None:
    """A private network is one, whatever it is called: two with its UUID would part VMs that mean to meet."""
    for other, config in running.items():
        if config.net_uuid == uuid:
            raise Conflict(
                f"net-uuid={uuid} is running network '{other}', which every VM with this UUID joins, not '{name}'",
                hint=f"leave --name out, or give --name {other} or another UUID",
            )


def _subnet(
    name: str, spec: Spec, given: Subnet | None, before: Subnet | None, taken: Mapping[IPv4Network, str]
) -> tuple[Subnet, str | None]:
    """The IPv4 addresses, and a note where they are not those that the name had."""
    if given is not None:
        for network, what in taken.items():
            if given.overlaps(network) and not spec.force:
                raise Conflict(
                    f"start-address={given.gateway} with subnet-mask={given.mask} overlaps {what}; "
                    "a free private subnet would be right",
                    hint="give other addresses, or none for an automatic choice, or --force",
                )
        return given, None
    why = None if before is None else next((what for net, what in taken.items() if before.overlaps(net)), None)
    if before is not None and (why is None or spec.force):
        return before, None
    candidates = list(netdev.candidates(spec.mode))
    free = [candidate for candidate in candidates if not any(candidate.overlaps(network) for network in taken)]
    if spec.force:
        free = free or candidates
    if not free:
        raise Conflict(
            f"every subnet from {candidates[0].network} to {candidates[-1].network} is taken",
            hint="give start-address, end-address and subnet-mask, or --force",
        )
    others = list(_others(name))
    chosen = min(free, key=lambda one: max((used for network, used in others if one.overlaps(network)), default=0.0))
    if before is None:
        return chosen, None
    return chosen, f"network '{name}' had {before.network}, which now overlaps {why}; now it has {chosen.network}"


def _prefix(
    spec: Spec,
    given: IPv6Network | None,
    before: IPv6Network | None,
    routes: list[IPv4Network | IPv6Network],
    running: Mapping[str, NetworkConfig],
) -> IPv6Network | None:
    """The IPv6 prefix; None where this host's kernel has no IPv6."""
    if not os.path.exists("/proc/net/if_inet6"):
        if given is None:
            return None
        raise MissingFeature(f"nat66-prefix={spec.nat66_prefix} needs IPv6, which this host's kernel has not (or off)")
    taken: dict[IPv6Network, str] = {}
    for route in routes:
        if isinstance(route, IPv6Network):
            taken[route] = f"this host's route to {route}"
    for other, config in running.items():
        if config.prefix is not None:
            taken[config.prefix] = f"running network '{other}' ({config.mode}, {config.prefix})"
    if given is not None:
        for network, what in taken.items():
            if given.overlaps(network) and not spec.force:
                raise Conflict(
                    f"nat66-prefix={spec.nat66_prefix} overlaps {what}; a free unique local prefix would be right",
                    hint="give another prefix, or none for a random one, or --force",
                )
        return given
    prefix = before
    while prefix is None or any(prefix.overlaps(network) for network in taken):
        # RFC 4193 section 3.2: 40 random bits; the 16 bits of the subnet stay zero.
        prefix = IPv6Network((_UNIQUE_LOCAL | int.from_bytes(os.urandom(5)) << 80, 64))
    return prefix


def _taken(routes: list[IPv4Network | IPv6Network], running: Mapping[str, NetworkConfig]) -> dict[IPv4Network, str]:
    taken = {route: f"this host's route to {route}" for route in routes if isinstance(route, IPv4Network)}
    for other, config in running.items():
        if config.subnet is not None:
            network = config.subnet.network
            taken[network] = f"running network '{other}' ({network}, vmnet-{config.mode})"
    return taken


def _running() -> Iterator[tuple[str, NetworkConfig]]:
    for name in state.names():
        config = running_config(name)
        if config is not None and control.lives(name):
            yield name, config


def _others(name: str) -> Iterator[tuple[IPv4Network, float]]:
    """What is kept for other names, and when each was used last: its log is written to whenever it runs."""
    for path in state.state_root().iterdir():
        record = _read(path / "network.json", Remembered)
        if path.name != name and record is not None and record.subnet is not None:
            log = path / "log"
            yield record.subnet.network, (log if log.exists() else path / "network.json").stat().st_mtime


def _read(path: Path, kind: type[_Kept]) -> _Kept | None:
    try:
        return state.decode(path.read_bytes(), kind)
    except (OSError, msgspec.DecodeError):  # none, or not ours: nothing is remembered then
        return None


def _routes() -> list[IPv4Network | IPv6Network]:
    """The host's unicast routes but the default ones, from every table; of IPv6, neither those of single links."""
    argv = ["ip", "-j", "route", "show", "table", "all", "type", "unicast"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=5)
        destinations = [str(route.get("dst", "default")) for route in json.loads(done.stdout or "[]")]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise HostError(f"the host's routes cannot be read: {error}", hint="sudo apt-get install iproute2") from error
    networks = []
    for destination in destinations:
        if destination == "default":
            continue
        network = ip_network(destination, strict=False)
        # Halves of the default route (0.0.0.0/1) are a VPN's way to say "everything"; 2000::/3 is the same for IPv6.
        wide = network.prefixlen <= (1 if network.version == 4 else 3)
        if not wide and not network.is_multicast and not (network.version == 6 and network.is_link_local):
            networks.append(network)
    return networks
