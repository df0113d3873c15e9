"""The rules of a network's namespace, as one nftables text, loaded in one transaction.

Table `bridge vmnet` (`firewall_bridge`) says what a guest may put on the wire; tables `ip vmnet` and `ip6 vmnet`
(`firewall_ip`) say what becomes of a packet for the outside. Here they are put together, and what changes while a
network runs, its ports and their leased addresses, is added and taken out.

No rule takes text from a user: names of links are ours (vmN), addresses come from `ipaddress` objects.
Needs nftables 1.0 and Linux 5.10: tproxy, socket, reject in prerouting, dynamic sets with limits.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from openvmnet.engine.linux import firewall_bridge, firewall_ip
from openvmnet.engine.linux.names import BRIDGE, PORT_MARK, TO_PYTHON, TO_SOCKET, UPLINK, limit, mark, number

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Address, IPv4Network, IPv6Network

__all__ = [
    "BRIDGE", "PORT_MARK", "TO_PYTHON", "TO_SOCKET", "UPLINK",
    "add_port", "counters", "crowd", "guard", "isolation", "link_local", "remove_port", "ruleset",
]  # fmt: skip


def ruleset(
    gateway: IPv4Address | None,
    network: IPv4Network | None,
    mac: str,
    listener: int,
    *,
    prefix: IPv6Network | None = None,
    listener6: int = 0,
    outside: bool = True,
    gateway_services: bool = False,
) -> str:
    """The whole ruleset.

    `gateway` and `network` are None where the host has no address on the network, `prefix` where it has no IPv6; the
    gateway is `prefix[1]`. `listener` and `listener6` are the ports of the pump's transparent sockets on 127.0.0.1 and
    ::1. `outside`: guests reach what is beyond the host. `gateway_services`: TCP and UDP to ports of the gateway that
    the namespace itself does not serve go to Python.
    """
    local = link_local(mac)
    text = firewall_bridge.table(mac, gateway, () if prefix is None else (prefix[1], local), network)
    if gateway is None or network is None:
        text += firewall_ip.empty4()
    else:
        text += firewall_ip.table4(gateway, network, listener, outside=outside, services=gateway_services)
    if prefix is not None:
        text += firewall_ip.table6(local, prefix, listener6, outside=outside, services=gateway_services)
    return text


def link_local(mac: str) -> IPv6Address:
    """The link-local address of the interface with `mac`: RFC 4291 appendix A, modified EUI-64."""
    octets = bytes.fromhex(mac.replace(":", ""))
    interface = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return IPv6Address(b"\xfe\x80" + bytes(6) + interface)


def add_port(link: str, *, isolated: bool, ip6: bool = False) -> str:
    """The elements that make `link` a port; `ip6` says whether the network has IPv6."""
    text = f'add element bridge vmnet marks {{ "{link}" : {mark(link)} }}\n'
    text += f"add element ip vmnet ids {{ {mark(link)} : {number(link)} }}\n"
    if ip6:
        text += f"add element ip6 vmnet ids {{ {mark(link)} : {number(link)} }}\n"
    if isolated:
        text += f'add element bridge vmnet isolated {{ "{link}" }}\n'
    return text


def guard(added: Iterable[tuple[str, str]], removed: Iterable[tuple[str, str]]) -> str:
    """Tie leased addresses of both versions of IP to their ports, and untie them: pairs of address and link."""
    text, six = "", False
    for verb, pairs in (("delete", removed), ("add", added)):
        for address, link in pairs:
            suffix, element = "", address
            if ":" in address:
                six, suffix, element = True, "6", f"0x{int(IPv6Address(address)):032x}"
            text += f"{verb} element bridge vmnet leased{suffix} {{ {element} }}\n"
            text += f'{verb} element bridge vmnet owned{suffix} {{ {element} . "{link}" }}\n'
            if not suffix:
                text += f'{verb} element bridge vmnet bulk {{ {element} . "{link}" : {mark(link)} }}\n'
    # What was seen as a source before may be somebody else's now.
    return text + "flush set bridge vmnet known6\n" if six else text


def crowd(*, crowded: bool, ip6: bool = False) -> str:
    """What is limited only while several guests share the network."""
    text = ""
    for family in ("ip", "ip6") if ip6 else ("ip",):
        for chain, counts, rate in (
            ("crowded_queries", "queries", firewall_ip.QUERIES),
            ("crowded_askers", "askers", firewall_ip.ASKERS),
            ("crowded_openings", "unconnected", firewall_ip.UNCONNECTED),
        ):
            text += f"flush chain {family} vmnet {chain}\n"
            if crowded:
                update = f"update @{counts} {{ meta mark {limit(rate)} }}"
                text += f"add rule {family} vmnet {chain} {update} counter name limited drop\n"
    return text


def isolation(*, needed: bool) -> str:
    """What keeps isolated ports apart from others, as long as there are any."""
    return firewall_bridge.isolation(needed=needed)


def remove_port(link: str, *, isolated: bool, ip6: bool = False) -> str:
    """Take back what `add_port()` added."""
    return add_port(link, isolated=isolated, ip6=ip6).replace("add element", "delete element")


def counters(listing: Iterable[dict[str, object]]) -> dict[str, int]:
    """Packets by counter name, both versions of IP together, from `nft -j list counters`; what is no counter of this
    version's is passed over."""
    found: dict[str, int] = {}
    for item in listing:
        counter = item.get("counter")
        if isinstance(counter, dict) and isinstance(counter.get("packets"), int):
            name = str(counter.get("name"))
            found[name] = found.get(name, 0) + counter["packets"]
    return found
