"""The rules of a network's namespace, as one nftables text, loaded in one transaction.

Two tables. Table `bridge vmnet` sees every frame that enters from a VM's port, before the bridge learns or forwards it:

- it stamps the port's mark on the frame (PORT_MARK + number), which travels with the packet up to the sockets, so that
  DHCP and the limits below know where a packet came from, whatever addresses it claims;
- a guest cannot pose as the gateway: its MAC or IPv4 address as a source (ARP sender included), DHCP server answers and
  router advertisements are dropped; so is what claims or seeks a loopback address. `meta protocol` is what stands
  behind an 802.1Q tag, where `ether type` would be the tag: receivers take a frame tagged with VLAN 0 as if it had no
  tag, so a tag must hide nothing. The kernel looks behind one tag, so a frame with two is dropped;
- nor as another guest that has its address by DHCP: a leased address is a source on the port of its lease alone, in
  IPv4 and in ARP (sets `leased` and `owned`);
- an isolated port exchanges no frame with another port (set `isolated`), in addition to the bridge's own flag, which
  only separates isolated ports from each other.

Table `ip vmnet` decides what happens to a packet for the outside (DESIGN: first packet in Python, the rest in the
kernel), in prerouting at mangle priority, after defragmentation:

- to the gateway, to broadcast, within the subnet: the local stack, or dropped in `forward` when it would be routed back
  out of the bridge (no path between guests but the bridge);
- TCP that opens (SYN alone), UDP without a flow's socket, ICMP echo: mark TO_PYTHON, routed to the TUN `up0`;
- TCP and UDP with a flow's socket, and ICMP errors about flows: mark TO_SOCKET, delivered here although the address is
  elsewhere; TCP without a socket, though it opens nothing, goes to Python too, which writes it back;
- TCP that Python writes to `up0`: TPROXY to the pump's listener, or the flow's own socket;
- what is never forwarded (loopback, link-local with the cloud metadata service, this-network, multicast, class E):
  refused with ICMP, counted; other protocols: ICMP protocol unreachable, counted.

What goes to Python carries the number of its port in the IPv4 identification, which nothing after it needs: a guest may
make up every address, and still is who it is.

Openings are limited per port, so a flood from one guest meets the kernel, not Python, and not its neighbours' share.
No rule takes text from a user: names of links are ours (vmN), addresses come from `ipaddress` objects.
Needs nftables 1.0 and Linux 5.10: tproxy, socket, reject in prerouting, dynamic sets with limits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Address, IPv4Network

BRIDGE = "vmnet0"
UPLINK = "up0"
TO_SOCKET, TO_PYTHON = 1, 2
PORT_MARK = 0x1000

# Openings a second and port, with the burst that one may spend at once. A guest that works opens some hundred flows a
# second; the slow path bears about ten times that, and the limit has to keep one guest from taking all of it.
OPENINGS = 10000
DHCP_RATE = 1000
BROADCASTS = 2000  # frames that every other port gets too: storm control, as switches have it
QUERIES = 5000  # to the gateway's name server, while there are several ports
ARP_RATE = 500

# Destinations that are nowhere, or this host itself: RFC 6890. The kernel takes 0.0.0.0 for "this host" (inet(7)).
NEVER = "0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 240.0.0.0/4"


# The way of each kind of frame, in one look-up. What is still tagged behind its first tag is dropped unseen.
_KINDS = "ip : goto guard_ip, arp : goto guard_arp, ip6 : goto guard_ip6, 8021q : goto tagged, 8021ad : goto tagged"


def ruleset(gateway: IPv4Address, network: IPv4Network, mac: str, listener: int) -> str:
    """The whole ruleset; `listener` is the port of the pump's transparent socket on 127.0.0.1."""
    return _bridge_table(gateway, mac) + _ip_table(network, listener)


def _bridge_table(gateway: IPv4Address, mac: str) -> str:
    return f"""
table bridge vmnet
delete table bridge vmnet
table bridge vmnet {{
  map marks {{ type ifname : mark; }}
  set isolated {{ type ifname; }}
  set leased {{ type ipv4_addr; }}
  set owned {{ type ipv4_addr . ifname; }}
  set arps {{ type ifname; size 1024; flags dynamic,timeout; timeout 1m; }}
  set storms {{ type ifname; size 1024; flags dynamic,timeout; timeout 1m; }}
  counter spoofed {{ }}
  counter isolation {{ }}
  counter storm {{ }}
  chain prerouting {{
    type filter hook prerouting priority filter; policy accept;
    iifname "{BRIDGE}" accept
    meta mark set iifname map @marks
    meta pkttype broadcast update @storms {{ iifname {_limit(BROADCASTS)} }} counter name storm drop
    ether saddr {mac} counter name spoofed drop
    meta protocol vmap {{ {_KINDS} }}
  }}
  chain tagged {{
    counter name spoofed drop
  }}
  chain guard_arp {{
    meta protocol arp arp saddr ip {gateway} counter name spoofed drop
    meta protocol arp arp saddr ether {mac} counter name spoofed drop
    meta protocol arp arp saddr ip @leased arp saddr ip . iifname != @owned counter name spoofed drop
    update @arps {{ iifname {_limit(ARP_RATE)} }} drop
  }}
  chain guard_ip {{
    ip daddr 127.0.0.0/8 counter name spoofed drop
    meta l4proto udp jump guard_udp
    ip saddr . iifname @owned accept
    ip saddr @leased counter name spoofed drop
    ip saddr {{ {gateway}, 127.0.0.0/8 }} counter name spoofed drop
  }}
  chain guard_udp {{
    udp dport 68 counter name spoofed drop
    udp sport 67 udp dport != 67 counter name spoofed drop
  }}
  chain guard_ip6 {{
    meta protocol ip6 icmpv6 type nd-router-advert counter name spoofed drop
    udp dport 546 counter name spoofed drop
    udp sport 547 udp dport != 547 counter name spoofed drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname @isolated counter name isolation drop
    oifname @isolated counter name isolation drop
  }}
}}
"""


def _ip_table(network: IPv4Network, listener: int) -> str:
    intercept = f"tproxy to 127.0.0.1:{listener} meta mark set {TO_SOCKET} accept"
    return f"""
table ip vmnet
delete table ip vmnet
table ip vmnet {{
  map ids {{ typeof meta mark : ip id; }}
  set openings {{ type mark; size 4096; flags dynamic,timeout; timeout 1m; }}
  set dhcp {{ type mark; size 4096; flags dynamic,timeout; timeout 1m; }}
  set queries {{ type mark; size 4096; flags dynamic,timeout; timeout 1m; }}
  counter limited {{ }}
  counter refused {{ }}
  counter unsupported {{ }}
  counter hairpin {{ }}
  counter stray {{ }}
  chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "{UPLINK}" ip saddr {network} meta l4proto tcp {intercept}
    iifname != "{BRIDGE}" accept
    udp dport 67 jump dhcp
    udp dport 53 jump crowded
    ip daddr {{ {network}, 255.255.255.255 }} accept
    ip saddr != {network} counter name refused drop
    ip daddr {{ {NEVER} }} jump refuse
    meta l4proto tcp jump segment
    udp sport 0 drop
    meta l4proto udp socket transparent 1 meta mark set {TO_SOCKET} accept
    icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} meta mark set {TO_SOCKET} accept
    meta l4proto != {{ udp, icmp }} counter name unsupported reject with icmp type prot-unreachable
    meta l4proto icmp icmp type != echo-request counter name unsupported drop
    jump opening
  }}
  chain crowded {{ }}
  chain dhcp {{
    update @dhcp {{ meta mark {_limit(DHCP_RATE)} }} counter name limited drop
  }}
  chain segment {{
    tcp flags & (syn|ack|rst|fin) == syn goto opening
    meta l4proto tcp socket transparent 1 meta mark set {TO_SOCKET} accept
    tcp flags & rst == rst counter name stray drop
    counter name stray goto opening
  }}
  chain opening {{
    update @openings {{ meta mark {_limit(OPENINGS)} }} counter name limited drop
    ip id set 0
    ip id set meta mark map @ids
    meta mark set {TO_PYTHON} accept
  }}
  chain refuse {{
    ip daddr {{ 224.0.0.0/4, 240.0.0.0/4 }} counter name refused drop
    counter name refused reject with icmp type net-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{BRIDGE}" oifname "{UPLINK}" accept
    iifname "{UPLINK}" oifname "{BRIDGE}" accept
    counter name hairpin
  }}
}}
"""


def _limit(rate: int) -> str:
    return f"limit rate over {rate}/second burst {rate} packets"


def add_port(link: str, number: int, *, isolated: bool) -> str:
    """The elements that make `link` port `number`."""
    text = f'add element bridge vmnet marks {{ "{link}" : {PORT_MARK + number} }}\n'
    text += f"add element ip vmnet ids {{ {PORT_MARK + number} : {number} }}\n"
    if isolated:
        text += f'add element bridge vmnet isolated {{ "{link}" }}\n'
    return text


def guard(added: Iterable[tuple[str, str]], removed: Iterable[tuple[str, str]]) -> str:
    """Tie leased addresses to their ports, and untie them: pairs of address and link."""
    text = ""
    for verb, pairs in (("delete", removed), ("add", added)):
        for address, link in pairs:
            text += f"{verb} element bridge vmnet leased {{ {address} }}\n"
            text += f'{verb} element bridge vmnet owned {{ {address} . "{link}" }}\n'
    return text


def crowd(*, crowded: bool) -> str:
    """What is limited only while several guests share the network: questions to the name server."""
    text = "flush chain ip vmnet crowded\n"
    if crowded:
        limit = f"update @queries {{ meta mark {_limit(QUERIES)} }}"
        text += f"add rule ip vmnet crowded {limit} counter name limited drop\n"
    return text


def remove_port(link: str, number: int, *, isolated: bool) -> str:
    """Take back what `add_port()` added."""
    return add_port(link, number, isolated=isolated).replace("add element", "delete element")


def counters(listing: Iterable[dict[str, object]]) -> dict[str, int]:
    """Packets by counter name, from `nft -j list counters`; keys that this version does not know are passed over."""
    found: dict[str, int] = {}
    for item in listing:
        counter = item.get("counter")
        if isinstance(counter, dict) and isinstance(counter.get("packets"), int):
            found[str(counter.get("name"))] = counter["packets"]
    return found
