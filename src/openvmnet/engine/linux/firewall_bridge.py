"""Table `bridge vmnet`: what a guest may put on the wire.

It sees every frame that enters from a VM's port, before the bridge learns or forwards it:

- it stamps the port's mark on the frame (PORT_MARK + number), which travels with the packet up to the sockets, so that
  DHCP and the limits know where a packet came from, whatever addresses it claims;
- a guest cannot pose as the gateway: its MAC or addresses as a source (ARP sender included), DHCP server answers,
  router advertisements, redirects, and neighbour discovery that ties the gateway's address or MAC to anything are
  dropped; so is what claims or seeks a loopback address. `meta protocol` is what stands behind an 802.1Q tag, where
  `ether type` would be the tag: receivers take a frame tagged with VLAN 0 as if it had no tag, so a tag must hide
  nothing. The kernel looks behind one tag, so a frame with two is dropped;
- nor as another guest that has its address by DHCP: a leased address is a source on the port of its lease alone, in
  IPv4, IPv6, ARP and neighbour advertisements (sets `leased` and `owned`, `leased6` and `owned6`);
- an isolated port exchanges no frame with another port (set `isolated`), in addition to the bridge's own flag, which
  only separates isolated ports from each other.

The bulk of the traffic is TCP over IPv4 from leased addresses. All that is asked of it is asked in the first rule, with
one look-up (map `bulk`, of the leased address and its port); what fails there goes the long way, which says why.

IPv6 can hide a message behind other headers and in fragments (RFC 7113). nft finds the last header as receivers do; a
packet in which it finds none, because its first fragment does not reach so far, is dropped, and so is neighbour
discovery in fragments, which receivers must not take either (RFC 6980).

A subnet of IPv4 has few addresses; an IPv6 prefix has 2^64, and the neighbour table that they would fill is one for the
whole host. So each port may come with NEW_SOURCES a minute, and what was looked at once is known for a while (set
`known6`): the bulk of IPv6 meets one look-up. The set is flushed when addresses are leased.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openvmnet.engine.linux.names import limit

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Network, IPv6Address

PORTS = 2048  # twice what a bridge takes (BR_MAX_PORTS in net/bridge/br_private.h): departed ones may still be there
SIZED = 1 << 16  # addresses; the table of a set takes ten octets for each, used or not
BROADCASTS = 2000  # frames that every other port gets too: storm control, as switches have it
ARP_RATE = 500  # of neighbour discovery and multicast listener reports, too
NEW_SOURCES, NEW_SOURCES_AT_ONCE = 30, 64

# The way of each kind of frame, in one look-up. What is still tagged behind its first tag is dropped unseen.
_KINDS = "ip : goto guard_ip, arp : goto guard_arp, ip6 : goto guard_ip6, 8021q : goto tagged, 8021ad : goto tagged"
_SPOOFED = "counter name spoofed drop"
# Loopback, unspecified, and all that is IPv4 in disguise (RFC 4291 sections 2.5.3 and 2.5.5).
_NO_IPV6 = "::/80"
_IP6 = "meta protocol ip6"  # said where nft would look at the EtherType instead, which a tag hides
_TARGET = "@th,64,128"  # of a neighbour solicitation or advertisement: RFC 4861 sections 4.3 and 4.4


def table(
    mac: str, gateway: IPv4Address | None, gateways6: tuple[IPv6Address, ...], network: IPv4Network | None
) -> str:
    """The table; `gateways6` are the gateway's IPv6 addresses, `network` is the subnet."""
    # Each address has one port at most. A set that knows its size is a plain hash table, which takes half the time.
    size = f"size {network.num_addresses};" if network and network.num_addresses <= SIZED else ""
    return f"""
table bridge vmnet
delete table bridge vmnet
table bridge vmnet {{
  map marks {{ type ifname : mark; size {PORTS}; }}
  map bulk {{ type ipv4_addr . ifname : mark; {size} }}
  set isolated {{ type ifname; }}
  set leased {{ type ipv4_addr; {size} }}
  set owned {{ type ipv4_addr . ifname; {size} }}
  set leased6 {{ typeof {_TARGET}; }}
  set owned6 {{ typeof {_TARGET} . iifname; }}
  set known6 {{ type ipv6_addr . iface_index; size 131072; flags dynamic,timeout; timeout 2m; }}
  set newcomers6 {{ type ifname; size 1024; flags dynamic,timeout; timeout 5m; }}
  set arps {{ type ifname; size 1024; flags dynamic,timeout; timeout 1m; }}
  set storms {{ type ifname; size 1024; flags dynamic,timeout; timeout 1m; }}
  counter spoofed {{ }}
  counter isolation {{ }}
  counter storm {{ }}
  chain prerouting {{
    type filter hook prerouting priority filter; policy accept;
    meta protocol ip meta l4proto tcp meta pkttype != broadcast ether saddr != {mac} ip daddr != 127.0.0.0/8 \
      meta mark set ip saddr . iifname map @bulk accept
    meta mark set iifname map @marks
    meta pkttype broadcast update @storms {{ iifname {limit(BROADCASTS)} }} counter name storm drop
    ether saddr {mac} {_SPOOFED}
    meta protocol vmap {{ {_KINDS} }}
  }}
  chain tagged {{
    {_SPOOFED}
  }}
{_guard_ip(mac, gateway)}{_guard_ip6(mac, gateways6)}}}
"""


def isolation(*, needed: bool) -> str:
    """The chain that keeps isolated ports apart from others, there only while a port is isolated: to look two names up
    takes a fortieth of the throughput between two guests."""
    text = "add chain bridge vmnet forward { type filter hook forward priority filter; policy accept; }\n"
    if not needed:
        return text + "delete chain bridge vmnet forward\n"
    text += "flush chain bridge vmnet forward\n"
    for way in ("iifname", "oifname"):
        text += f"add rule bridge vmnet forward {way} @isolated counter name isolation drop\n"
    return text


def _guard_ip(mac: str, gateway: IPv4Address | None) -> str:
    gateways = f"{gateway}, " if gateway else ""
    arp = f"meta protocol arp arp saddr ip {gateway} {_SPOOFED}\n    " if gateway else ""
    return f"""\
  chain guard_arp {{
    {arp}meta protocol arp arp saddr ether {mac} {_SPOOFED}
    meta protocol arp arp saddr ip @leased arp saddr ip . iifname != @owned {_SPOOFED}
    update @arps {{ iifname {limit(ARP_RATE)} }} drop
  }}
  chain guard_ip {{
    ip daddr 127.0.0.0/8 {_SPOOFED}
    meta l4proto udp jump guard_udp
    ip saddr . iifname @owned accept
    ip saddr @leased {_SPOOFED}
    ip saddr {{ {gateways}127.0.0.0/8 }} {_SPOOFED}
  }}
  chain guard_udp {{
    ip frag-off & 0x1fff != 0 return
    udp dport 68 {_SPOOFED}
    udp sport 67 udp dport != 67 {_SPOOFED}
  }}
"""


def _guard_ip6(mac: str, gateways: tuple[IPv6Address, ...]) -> str:
    posing = claimed = ""
    if gateways:
        posing = "".join(f"{one}, " for one in gateways)
        claimed = f"{_TARGET} {{ {', '.join(hex(int(one)) for one in gateways)} }} {_SPOOFED}\n    "
    source, target = (f"0x{kind:02x}01{mac.replace(':', '')}" for kind in (1, 2))  # options: RFC 4861 section 4.6.1
    anothers = f"{_TARGET} @leased6 {_TARGET} . iifname != @owned6 {_SPOOFED}"
    return f"""\
  chain guard_ip6 {{
    ip6 daddr {_NO_IPV6} {_SPOOFED}
    meta l4proto vmap {{ tcp : goto source6, udp : goto guard_udp6, icmpv6 : goto guard_icmp6 }}
    meta l4proto != 255 goto source6
    {_SPOOFED}
  }}
  chain guard_udp6 {{
    udp dport 546 {_SPOOFED}
    udp sport 547 udp dport != 547 {_SPOOFED}
    goto source6
  }}
  chain guard_icmp6 {{
    {_IP6} exthdr frag exists goto pieces6
    {_IP6} icmpv6 type {{ 1-4, 128, 129 }} goto source6
    update @arps {{ iifname {limit(ARP_RATE)} }} counter name storm drop
    {_IP6} icmpv6 type {{ nd-router-advert, nd-redirect, 138 }} {_SPOOFED}
    {_IP6} icmpv6 type nd-neighbor-advert goto advert6
    {_IP6} icmpv6 type nd-neighbor-solicit goto solicit6
    {_IP6} icmpv6 type nd-router-solicit @th,64,64 {source} {_SPOOFED}
    goto source6
  }}
  chain pieces6 {{
    {_IP6} frag frag-off != 0 goto source6
    {_IP6} icmpv6 type {{ 1-4, 128, 129 }} goto source6
    {_SPOOFED}
  }}
  chain advert6 {{
    {claimed}@th,192,64 {target} {_SPOOFED}
    @th,256,64 {target} {_SPOOFED}
    {anothers}
    goto source6
  }}
  chain solicit6 {{
    @th,192,64 {source} {_SPOOFED}
    @th,256,64 {source} {_SPOOFED}
    ip6 saddr :: {anothers}
    goto source6
  }}
  chain source6 {{
    ip6 saddr . iif @known6 accept
    @nh,64,128 . iifname @owned6 goto newcomer6
    @nh,64,128 @leased6 {_SPOOFED}
    ip6 saddr :: goto newcomer6
    ip6 saddr {{ {posing}{_NO_IPV6}, ff00::/8 }} {_SPOOFED}
    goto newcomer6
  }}
  chain newcomer6 {{
    update @newcomers6 {{ iifname {limit(NEW_SOURCES, "minute", NEW_SOURCES_AT_ONCE)} }} counter name storm drop
    add @known6 {{ ip6 saddr . iif }}
  }}
"""
