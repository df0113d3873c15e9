"""Links, addresses, rules and routes of a network's namespace, as texts for `ip -batch -`, and its sysctls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openvmnet.engine.linux.firewall import link_local
from openvmnet.engine.linux.names import BRIDGE, TO_PYTHON, TO_SOCKET, UPLINK

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Network

_SOCKET_TABLE, _PYTHON_TABLE = 100, 200
# A TAP's ring of 1,000 frames drops a burst that the uplink has already acknowledged: a download falls 17-fold.
_TAP_QUEUE = 20000
_TUN_QUEUE = 2000  # openings that wait for Python
_TUN_MTU = 65535  # reassembled datagrams come to Python whole

SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    # Packets for elsewhere, from a device without addresses: the reverse path filter would drop them all.
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
    "net.ipv4.conf.all.send_redirects": "0",
    "net.ipv4.conf.default.send_redirects": "0",
    # A SYN for a four-tuple whose last connection is in TIME_WAIT would be given that socket before it is routed, and
    # ip_forward() drops what has a socket: the guest could not use the port again for a minute.
    "net.ipv4.tcp_early_demux": "0",
    # A client of a published port that ends its connection leaves the gateway's end in TIME_WAIT for a minute, and the
    # default of 28,232 ports for each port of a guest's would be gone after 470 connections a second. RFC 6191.
    "net.ipv4.tcp_tw_reuse": "1",
    "net.ipv4.ip_local_port_range": "16384 65535",
    # Where br_netfilter is loaded (every Docker host) a new namespace sends bridged packets through the IP hooks, where
    # TPROXY takes their socket away again and every SYN gets a RST.
    "net.bridge.bridge-nf-call-iptables": "0",
    "net.bridge.bridge-nf-call-ip6tables": "0",
    "net.bridge.bridge-nf-call-arptables": "0",
    # Of IPv6, only what is turned on below: guests' TAPs are no interfaces of this host's.
    "net.ipv6.conf.default.disable_ipv6": "1",
    # The way to a guest is some microseconds of memory: a sender that paces itself (BBR) pays for timers there, and
    # gains nothing. Outside, the host's own choice holds. This one is always allowed.
    "net.ipv4.tcp_congestion_control": "reno",
    # For the same reason a window of half a megabyte is wide enough: what a host allows for the world (here 6 MB, there
    # 32) would wait in this host's memory, out of the caches' reach, where the outside is slower than the guest.
    "net.ipv4.tcp_rmem": "4096 131072 1048576",
    # One traceroute sends its probes at once; the default of one ICMP error a second would answer the first alone.
    "net.ipv4.icmp_ratelimit": "10",
}

NO_IPV6 = {"net.ipv6.conf.all.disable_ipv6": "1"}

# For a network with IPv6, before its links are made.
SYSCTLS6 = {
    "net.ipv6.conf.lo.disable_ipv6": "0",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv6.conf.default.accept_ra": "0",
    "net.ipv6.conf.default.accept_redirects": "0",
    "net.ipv6.icmp.ratelimit": "10",  # as for IPv4
}

# And when they are there. Addresses come from `bridge6()`; up0 needs none.
BRIDGE_SYSCTLS6 = {
    f"net.ipv6.conf.{BRIDGE}.addr_gen_mode": "1",
    f"net.ipv6.conf.{BRIDGE}.accept_ra": "0",
    f"net.ipv6.conf.{BRIDGE}.disable_ipv6": "0",
}
UPLINK_SYSCTLS6 = {f"net.ipv6.conf.{UPLINK}.addr_gen_mode": "1", f"net.ipv6.conf.{UPLINK}.disable_ipv6": "0"}

# ICMP errors that Python sends in the gateway's name have a source that is local here, and come from a device.
UPLINK_SYSCTLS = {f"net.ipv4.conf.{UPLINK}.accept_local": "1"}


def bridge(mac: str, mtu: int) -> str:
    """The bridge, without an address."""
    return f"""\
link set lo up
link add name {BRIDGE} address {mac} type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link set {BRIDGE} mtu {mtu}
link set {BRIDGE} up
"""


def gateway(address: IPv4Address, prefixlen: int) -> str:
    """The gateway's address, and where marked packets go."""
    return f"addr add {address}/{prefixlen} brd + dev {BRIDGE}\n" + _marked("0.0.0.0/0")


def _marked(everything: str) -> str:
    """Marks come before what is local: a port of the gateway that nobody serves here goes to Python all the same."""
    return f"""\
rule add pref 10 fwmark {TO_SOCKET} lookup {_SOCKET_TABLE}
rule add pref 11 fwmark {TO_PYTHON} lookup {_PYTHON_TABLE}
rule add pref 12 lookup local
rule del pref 0
route add local {everything} dev lo table {_SOCKET_TABLE}
"""


def gateway6(prefix: IPv6Network, mac: str) -> str:
    """The gateway's IPv6 addresses, usable at once (no duplicate address detection), and where marked packets go.

    They are the bridge's alone by the firewall, so nobody has to be asked. The batch is for `ip -6`.
    """
    return f"""\
addr replace {link_local(mac)}/64 dev {BRIDGE} nodad
addr replace {prefix[1]}/64 dev {BRIDGE} nodad
""" + _marked("::/0")


def uplink(*, ip6: bool = False) -> str:
    """The TUN to Python: again for each network process, since it goes with the one before."""
    text = f"""\
link set {UPLINK} mtu {_TUN_MTU} txqueuelen {_TUN_QUEUE} up
route replace default dev {UPLINK} table {_PYTHON_TABLE}
"""
    return text + f"route replace ::/0 dev {UPLINK} table {_PYTHON_TABLE}\n" if ip6 else text


def port(link: str, mtu: int, *, isolated: bool) -> str:
    """A guest's TAP on the bridge."""
    flag = "on" if isolated else "off"
    return f"""\
link set {link} mtu {mtu} txqueuelen {_TAP_QUEUE} master {BRIDGE}
link set {link} type bridge_slave isolated {flag}
link set {link} up
"""
