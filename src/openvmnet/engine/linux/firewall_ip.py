"""Tables `ip vmnet` and `ip6 vmnet`: what becomes of a packet for the outside.

The first packet of a flow goes to Python, the rest stays in the kernel. In prerouting at mangle priority, after
defragmentation:

- to the gateway, to broadcast or multicast: the local stack; within the subnet: nowhere, there is no path between
  guests but the bridge (IPv4: dropped in `forward`, where it would leave the bridge again; IPv6 at once, before the
  kernel sends a redirect and looks for the neighbour);
- TCP that opens (SYN alone), UDP without a flow's socket, ICMP echo: mark TO_PYTHON, routed to the TUN `up0`;
- TCP and UDP with a flow's socket, and ICMP errors about flows: mark TO_SOCKET, delivered here although the address is
  elsewhere (TCP's are the bulk, so they come first: what they belong to was let through when it opened); TCP without a
  socket, though it opens nothing, goes to Python too, which writes it back;
- a guest's TCP that Python writes to `up0`: TPROXY to the pump's listener, or the flow's own socket; a RST in the
  gateway's name goes on to the guest;
- what is never forwarded (NEVER, NEVER6) is refused with ICMP and counted; so are other protocols, by Python where the
  kernel would first look for a checksum that they do not have.

Where the gateway's address is the host (`gateway_services`), TCP and UDP to its other ports are treated as to the
outside. On a network without an outside, that and the local stack are all there is.

What goes to Python, and the SYN of a connection to the name server, carries the number of its port: in the IPv4
identification, or in the lower 16 bits of the IPv6 flow label (octets 2 and 3 of the header), which nothing after it
needs: a guest may make up every address, and still is who it is. Openings are limited per port, so a flood from one
guest meets the kernel, not Python, and not its neighbours' share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from openvmnet.engine.linux.names import BRIDGE, TO_PYTHON, TO_SOCKET, UPLINK, limit

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

# Openings a second and port, with the burst that one may spend at once. A guest that works opens some hundred flows a
# second; the slow path bears about ten times that, and the limit has to keep one guest from taking all of it.
OPENINGS = 10000
DHCP_RATE, DHCP_AT_ONCE = 400, 1000  # messages; twice what 100 exchanges a second take
# While there are several ports: queries to name servers, connections to them, and of openings those that are not TCP's.
# UDP has a share of the thread that is used up by then; what comes beyond it would only be read to be dropped.
QUERIES, ASKERS, UNCONNECTED = 5000, 500, 3000

# Destinations that are nowhere, or this host itself: RFC 6890. The kernel takes 0.0.0.0 for "this host" (inet(7)).
NEVER = "0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 240.0.0.0/4"
# The same for IPv6: unspecified and loopback with IPv4-compatible, IPv4-mapped, site-local (RFC 3879), and what 6to4
# (RFC 3056) and NAT64 (RFC 6052) would make of NEVER.
NEVER6 = (
    "::/96, ::ffff:0:0/96, fec0::/10, 2002::/24, 2002:7f00::/24, 2002:a9fe::/32, 2002:e000::/19, 64:ff9b::/104, "
    "64:ff9b::7f00:0/104, 64:ff9b::a9fe:0/112, 64:ff9b::e000:0/99"
)

# The kernel sends an error only about a packet whose checksum is right, and takes every protocol's payload to be summed
# up like TCP's, but for these (nf_reject_verify_csum).
_UNSUMMED = "47, 50, 51, 132"  # GRE, ESP, AH, SCTP
_NOTHING = 59  # "no next header": there is nothing to refuse (RFC 8200 section 4.7)

_FLAGS = "(syn|ack|rst|fin)"


class _Terms(msgspec.Struct, frozen=True):
    """The words in which the two tables differ."""

    family: str
    loopback: str
    number: str  # the field that bears a port's number
    clear: str
    dhcp: int
    here: str  # rules for what is the gateway's or stays on the link
    never: str
    icmp: str
    errors: str
    no_protocol: str
    refuse: str


def table4(gateway: IPv4Address, network: IPv4Network, listener: int, *, outside: bool, services: bool) -> str:
    """Table `ip vmnet`; `listener` is the port of the pump's transparent socket on 127.0.0.1."""
    here = f"ip daddr {gateway} goto gateway\n    " if services else ""
    terms = _Terms(
        family="ip",
        loopback="127.0.0.1",
        number="ip id",
        clear="ip id set 0",
        dhcp=67,
        here=f"{here}ip daddr {{ {network}, 255.255.255.255 }} accept",
        never=NEVER,
        icmp="icmp",
        errors="destination-unreachable, time-exceeded, parameter-problem",
        no_protocol="icmp type prot-unreachable",
        refuse="ip daddr { 224.0.0.0/4, 240.0.0.0/4 } counter name refused drop\n"
        "    counter name refused reject with icmp type net-prohibited",
    )
    return _table(terms, str(network), str(gateway), listener, outside=outside)


def table6(local: IPv6Address, prefix: IPv6Network, listener: int, *, outside: bool, services: bool) -> str:
    """Table `ip6 vmnet`; `local` is the gateway's link-local address, `listener` a port on ::1."""
    gateway = prefix[1]
    here = f"ip6 daddr {gateway} goto gateway\n    " if services else ""
    terms = _Terms(
        family="ip6",
        loopback="[::1]",
        number="@nh,16,16",
        clear="ip6 flowlabel set 0",
        dhcp=547,
        # The first address of a prefix is any router's (RFC 4291 section 2.6.1).
        here=f"{here}ip6 daddr {{ {gateway}, {local}, {prefix[0]}, ff00::/8 }} accept\n"
        f"    ip6 daddr {{ {prefix}, fe80::/10 }} counter name hairpin drop",
        never=NEVER6,
        icmp="icmpv6",
        errors="destination-unreachable, packet-too-big, time-exceeded, parameter-problem",
        no_protocol="icmpv6 type admin-prohibited",
        refuse="counter name refused reject with icmpv6 type no-route",
    )
    return _table(terms, str(prefix), str(gateway), listener, outside=outside)


def empty4() -> str:
    """Table `ip vmnet` of a network on which the host has no address: what ports are added to, and no way."""
    return "\ntable ip vmnet\ndelete table ip vmnet\ntable ip vmnet {\n" + _sets("ip id") + "}\n"


def _sets(number: str) -> str:
    return f"""\
  map ids {{ typeof meta mark : {number}; }}
  set openings {{ type mark; size 4096; flags dynamic,timeout; timeout 1m; }}
  set dhcp {{ type mark; size 4096; flags dynamic,timeout; timeout 1m; }}
  set queries {{ type mark; size 4096; flags dynamic,timeout; timeout 1m; }}
  set askers {{ type mark; size 4096; flags dynamic,timeout; timeout 1m; }}
  set unconnected {{ type mark; size 4096; flags dynamic,timeout; timeout 1m; }}
  counter limited {{ }}
  counter refused {{ }}
  counter unsupported {{ }}
  counter hairpin {{ }}
  counter stray {{ }}
  chain crowded_queries {{ }}
  chain crowded_askers {{ }}
  chain crowded_openings {{ }}
"""


def _table(terms: _Terms, network: str, gateway: str, listener: int, *, outside: bool) -> str:
    name = terms.family
    intercept = f"tproxy to {terms.loopback}:{listener} meta mark set {TO_SOCKET} accept"
    return f"""
table {name} vmnet
delete table {name} vmnet
table {name} vmnet {{
{_sets(terms.number)}  chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "{UPLINK}" {name} saddr {network} {name} saddr != {gateway} meta l4proto tcp {intercept}
    iifname != "{BRIDGE}" accept
    meta l4proto tcp tcp flags & {_FLAGS} != syn socket transparent 1 meta mark set {TO_SOCKET} accept
    udp dport {terms.dhcp} jump dhcp
    udp dport 53 jump crowded_queries
    tcp dport 53 tcp flags & {_FLAGS} == syn jump asker
    {terms.here}
    {name} saddr != {network} counter name refused drop
{_outside(terms) if outside else "    jump refuse"}
  }}
  chain gateway {{
    tcp dport 53 accept
    udp dport {{ 53, {terms.dhcp} }} accept
    meta l4proto != {{ tcp, udp }} accept
    {name} saddr != {network} counter name refused drop
    meta l4proto tcp goto segment
    udp sport 0 drop
    meta l4proto udp socket transparent 1 meta mark set {TO_SOCKET} accept
    goto opening
  }}
  chain segment {{
    tcp flags & {_FLAGS} == syn goto opening
    tcp flags & rst == rst counter name stray drop
    counter name stray goto opening
  }}
{_limited(terms)}  chain unsupported {{
    meta l4proto {{ {_UNSUMMED} }} reject with {terms.no_protocol}
    meta l4proto {_NOTHING} drop
    goto opening
  }}
  chain refuse {{
    {terms.refuse}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{BRIDGE}" oifname "{UPLINK}" accept
    iifname "{UPLINK}" oifname "{BRIDGE}" accept
    counter name hairpin
  }}
}}
"""


def _limited(terms: _Terms) -> str:
    """What a guest may begin so many times a second."""
    return f"""\
  chain asker {{
    jump crowded_askers
    {terms.number} set meta mark map @ids
  }}
  chain dhcp {{
    update @dhcp {{ meta mark {limit(DHCP_RATE, burst=DHCP_AT_ONCE)} }} counter name limited drop
  }}
  chain opening {{
    meta l4proto != tcp jump crowded_openings
    update @openings {{ meta mark {limit(OPENINGS)} }} counter name limited drop
    {terms.clear}
    {terms.number} set meta mark map @ids
    meta mark set {TO_PYTHON} accept
  }}
"""


def _outside(terms: _Terms) -> str:
    return f"""\
    {terms.family} daddr {{ {terms.never} }} jump refuse
    meta l4proto tcp jump segment
    udp sport 0 drop
    meta l4proto udp socket transparent 1 meta mark set {TO_SOCKET} accept
    {terms.icmp} type {{ {terms.errors} }} meta mark set {TO_SOCKET} accept
    meta l4proto != {{ udp, {terms.icmp} }} counter name unsupported goto unsupported
    meta l4proto {terms.icmp} {terms.icmp} type != echo-request counter name unsupported drop
    jump opening"""
