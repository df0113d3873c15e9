"""What makes a fresh namespace a network, and a TAP a port: requests to the agent, in their order.

They depend on the configuration alone. So a network process can hand them over as soon as it knows that, and load the
rest of itself while the agent works; the start of a network takes as long as the longer of the two.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from openvmnet.engine.linux import firewall, links
from openvmnet.engine.linux.names import BRIDGE, LISTENER, PORT_PREFIX, UPLINK
from openvmnet.kernel.sockets import IP_TRANSPARENT
from openvmnet.kernel.sockets6 import IPV6_TRANSPARENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from openvmnet.config import NetworkConfig, PortKind

Step = dict[str, Any]
Option = tuple[int, int, int | str]

# By the size of an address, in octets.
TRANSPARENT: dict[int, Option] = {
    4: (socket.SOL_IP, IP_TRANSPARENT, 1),
    16: (socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1),
}
_BACKLOG = 4096


FIRST = f"{PORT_PREFIX}1"


def network(
    config: NetworkConfig,
    mac: str,
    present: Iterable[str],
    isolated: Mapping[str, bool],
    first: PortKind | None = None,
) -> list[Step]:
    """The namespace of `config`, whose links `present` are there already; `mac` is the gateway's.

    `isolated` has the ports, and says of each whether it is; with `first`, port FIRST is made, too. The rules and all
    that is known of the ports come last, in one transaction: nothing is open in between. The steps that give a
    descriptor are those of the TUN and of its listeners (IPv4, IPv6), where the network has them, and of FIRST.
    """
    prefix = config.prefix
    steps = [_sysctl(links.SYSCTLS), _sysctl(links.SYSCTLS6 if prefix else links.NO_IPV6)]
    if BRIDGE not in present:
        steps += _bridge(config, mac)
    if config.subnet is not None:
        steps += _uplink(config)
    if first is not None:
        steps += _tap(FIRST, config, first)
        isolated = {**isolated, FIRST: first.isolated}
    text = _ruleset(config, mac)
    for link, alone in isolated.items():
        text += firewall.add_port(link, isolated=alone, ip6=prefix is not None)
    return [*steps, _nft(text + as_they_are(isolated, ip6=prefix is not None))]


def port(link: str, config: NetworkConfig, kind: PortKind, isolated: Mapping[str, bool]) -> list[Step]:
    """A TAP with its place on the bridge and in the rules; `isolated` has all ports, this one with them."""
    ip6 = config.prefix is not None
    rules = firewall.add_port(link, isolated=kind.isolated, ip6=ip6)
    return [*_tap(link, config, kind), _nft(rules + as_they_are(isolated, ip6=ip6))]


def as_they_are(isolated: Mapping[str, bool], *, ip6: bool) -> str:
    """The rules that depend on how many ports there are, and of what kind."""
    text = firewall.crowd(crowded=len(isolated) > 1, ip6=ip6)
    return text + firewall.isolation(needed=any(isolated.values()))


def _bridge(config: NetworkConfig, mac: str) -> list[Step]:
    """The bridge, with the gateway's addresses where it has any."""
    text = links.bridge(mac, config.mtu)
    if config.subnet is not None:
        text += links.gateway(config.subnet.gateway, config.subnet.prefixlen)
    steps = [_ip(text)]
    if config.prefix is not None:
        steps += [_sysctl(links.BRIDGE_SYSCTLS6), _ip(links.gateway6(config.prefix, mac), "-6")]
    return steps


def _tap(link: str, config: NetworkConfig, kind: PortKind) -> list[Step]:
    return [
        {"op": "tap" if kind.offloads else "bare-tap", "name": link},
        _ip(links.port(link, config.mtu, isolated=kind.isolated)),
    ]


def _uplink(config: NetworkConfig) -> list[Step]:
    """The way to Python: the TUN, and the listeners that take what comes back from it."""
    six = config.prefix is not None
    return [
        {"op": "tun", "name": UPLINK},
        _sysctl(links.UPLINK_SYSCTLS | (links.UPLINK_SYSCTLS6 if six else {})),
        _ip(links.uplink(ip6=six)),
        _listener(socket.AF_INET, 4, "127.0.0.1"),
        *([_listener(socket.AF_INET6, 16, "::1")] if six else []),
    ]


def _ruleset(config: NetworkConfig, mac: str) -> str:
    """The firewall without its ports."""
    subnet = config.subnet
    return firewall.ruleset(
        None if subnet is None else subnet.gateway,
        None if subnet is None else subnet.network,
        mac,
        LISTENER,
        prefix=config.prefix,
        listener6=LISTENER,
        outside=config.outside,
        gateway_services=True,
    )


def _listener(family: int, size: int, address: str) -> Step:
    # SO_REUSEADDR: connections that the process before left behind do not keep the port from the next one.
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return {
        "op": "socket", "family": family, "type": socket.SOCK_STREAM | socket.SOCK_NONBLOCK,
        "options": [TRANSPARENT[size], reuse], "bind": [address, LISTENER], "listen": _BACKLOG,
    }  # fmt: skip


def _sysctl(values: Mapping[str, str]) -> Step:
    return {"op": "sysctl", "values": values}


def _ip(text: str, *options: str) -> Step:
    return {"op": "run", "argv": ["ip", *options, "-batch", "-"], "input": text}


def _nft(text: str) -> Step:
    return {"op": "run", "argv": ["nft", "-f", "-"], "input": text}
