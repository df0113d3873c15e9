"""The ruleset in a real namespace, against guests that send any frame they like."""

from __future__ import annotations

import ipaddress
import socket
import subprocess

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, fragment
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6ND_RA, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

from openvmnet.engine.linux import firewall
from openvmnet.engine.linux.firewall_ip import ASKERS
from openvmnet.wire.fragments import Reassembly
from tests.engine.taps import BROADCAST, GATEWAY, GATEWAY_MAC, net

OUTSIDE = "203.0.113.1"


@pytest.fixture(scope="module")
def world(lab, tmp_path_factory):
    """Two guests that share all (`a`, `b`), and two isolated ones (`c`, `d`)."""
    with net(tmp_path_factory.mktemp("net")) as made:
        for isolated in (False, False, True, True):
            made.plug(isolated=isolated)
        yield made


@pytest.fixture
def guests(world):
    """The four, with nothing waiting."""
    world.quiet()
    return world.guests


def resolve(guest) -> None:
    """Let the gateway know the guest, so that it can answer at once."""
    guest.send(Ether(src=guest.mac, dst=BROADCAST) / ARP(op=1, hwsrc=guest.mac, psrc=guest.ip, pdst=GATEWAY))
    assert any(Ether(frame).haslayer(ARP) for frame in guest.frames(1, until=lambda f: Ether(f).haslayer(ARP)))


def to_gateway(guest, packet, **ether):
    return Ether(src=guest.mac, dst=GATEWAY_MAC, **ether) / packet


# --- Spoofing.

ME, MY_IP = "52:54:00:00:00:01", "192.168.64.2"
PAD = Raw(bytes(20))
RA = IPv6(src="fe80::1", dst="ff02::1") / ICMPv6ND_RA()
SERVER_ANSWER = (
    UDP(sport=67, dport=68) / BOOTP(op=2, chaddr=bytes(6)) / DHCP(options=[("message-type", "offer"), "end"])
)

SPOOFS = {
    "gateway's MAC": Ether(src=GATEWAY_MAC, dst=BROADCAST, type=0x88B5) / PAD,
    "ARP reply for the gateway": Ether(src=ME, dst=BROADCAST) / ARP(op=2, hwsrc=ME, psrc=GATEWAY, pdst=MY_IP),
    "ARP request as the gateway": Ether(src=ME, dst=BROADCAST) / ARP(op=1, hwsrc=ME, psrc=GATEWAY, pdst=MY_IP),
    "gratuitous ARP": Ether(src=ME, dst=BROADCAST) / ARP(op=1, hwsrc=ME, psrc=GATEWAY, pdst=GATEWAY),
    "ARP with the gateway's MAC inside": Ether(src=ME, dst=BROADCAST)
    / ARP(op=2, hwsrc=GATEWAY_MAC, psrc="192.168.64.9"),
    "ARP of hardware type 6": Ether(src=ME, dst=BROADCAST, type=0x0806)
    / Raw(b"\0\6" + bytes(ARP(op=2, hwsrc=ME, psrc=GATEWAY))[2:]),  # IEEE 802, which Linux takes for Ethernet
    "gateway's address": Ether(src=ME, dst=BROADCAST) / IP(src=GATEWAY, dst="192.168.64.255") / UDP(sport=9, dport=9),
    "gateway's address in a fragment": Ether(src=ME, dst=BROADCAST) / IP(src=GATEWAY, frag=3, proto=17) / PAD,
    "DHCP server": Ether(src=ME, dst=BROADCAST) / IP(src=MY_IP, dst="255.255.255.255") / SERVER_ANSWER,
    "DHCP server, first fragment": Ether(src=ME, dst=BROADCAST)
    / IP(src=MY_IP, dst="255.255.255.255", flags="MF", proto=17)
    / Raw(bytes(UDP(sport=67, dport=68, len=600)) + bytes(296)),
    "DHCP server, tiny fragment": Ether(src=ME, dst=BROADCAST)
    / IP(src=MY_IP, dst="255.255.255.255", flags="MF", proto=17)
    / Raw(bytes(UDP(sport=67, dport=68, len=600))),
    "DHCP server behind IP options": Ether(src=ME, dst=BROADCAST)
    / IP(src=MY_IP, dst="255.255.255.255", options=[IPOption_NOP()] * 12)
    / SERVER_ANSWER,
    "loopback source": Ether(src=ME, dst=BROADCAST) / IP(src="127.0.0.1", dst="192.168.64.255") / UDP(sport=9, dport=9),
    "loopback destination": Ether(src=ME, dst=BROADCAST) / IP(src=MY_IP, dst="127.0.0.1") / UDP(sport=9, dport=9),
    "router advertisement": Ether(src=ME, dst="33:33:00:00:00:01") / RA,
    "router advertisement behind headers": Ether(src=ME, dst="33:33:00:00:00:01")
    / IPv6(src="fe80::1", dst="ff02::1")
    / IPv6ExtHdrHopByHop()
    / IPv6ExtHdrDestOpt()
    / ICMPv6ND_RA(),
    "DHCPv6 server": Ether(src=ME, dst="33:33:00:00:00:01") / IPv6(src="fe80::1") / UDP(sport=547, dport=546) / PAD,
}  # fmt: skip


def test_the_spoofs_are_from_the_guest_that_sends_them(guests):
    assert (guests[0].mac, guests[0].ip) == (ME, MY_IP)


@pytest.mark.kernel
@pytest.mark.parametrize("name", SPOOFS)
def test_a_spoof_reaches_no_neighbour(world, guests, name):
    a, b, *_ = guests
    before = world.counters()["spoofed"]
    assert world.passes(SPOOFS[name], a, b) == []
    assert world.counters()["spoofed"] == before + 1


TAGS = {
    "VLAN 0": [Dot1Q(vlan=0)],
    "VLAN 0 with a priority": [Dot1Q(vlan=0, prio=5, dei=1)],
    "service VLAN 0": [Dot1AD(vlan=0)],
    "VLAN 0 in VLAN 0": [Dot1Q(vlan=0), Dot1Q(vlan=0)],
    "VLAN 0 in service VLAN 0": [Dot1AD(vlan=0), Dot1Q(vlan=0)],
}


@pytest.mark.kernel
@pytest.mark.parametrize("tags", TAGS)
@pytest.mark.parametrize("name", SPOOFS)
def test_a_tag_of_vlan_0_hides_nothing(world, guests, name, tags):
    """Receivers, Linux among them, take a frame tagged with VLAN 0 as if it had no tag (IEEE 802.1Q, 6.9)."""
    a, b, *_ = guests
    plain = SPOOFS[name]
    tagged = Ether(src=plain.src, dst=plain.dst)
    for tag in TAGS[tags]:
        tagged = tagged / tag.copy()
    tagged.lastlayer().type = plain.type
    assert world.passes(bytes(tagged) + bytes(plain.payload), a, b) == []


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["ARP reply for the gateway", "gateway's address", "DHCP server"])
def test_a_tag_of_vlan_0_hides_nothing_from_the_gateway(world, guests, name):
    a, *_ = guests
    a.send(
        Ether(src=a.mac, dst=GATEWAY_MAC) / Dot1Q(vlan=0) / ARP(op=1, hwsrc=a.mac, psrc=GATEWAY, pdst="192.168.64.77")
    )
    a.send(Ether(src=a.mac, dst=GATEWAY_MAC) / Dot1Q(vlan=0) / IP(src=a.ip, dst="127.0.0.1") / TCP(dport=80, flags="S"))
    resolve(a)
    assert all(one.address != GATEWAY for one in world.engine.neighbours())


@pytest.mark.kernel
def test_what_is_honest_passes(world, guests):
    a, b, *_ = guests
    honest = [
        Ether(src=a.mac, dst=BROADCAST) / ARP(op=1, hwsrc=a.mac, psrc=a.ip, pdst=b.ip),
        Ether(src=a.mac, dst=b.mac) / IP(src=a.ip, dst=b.ip) / UDP(sport=68, dport=67) / PAD,
        Ether(src=a.mac, dst=b.mac) / IP(src=a.ip, dst=b.ip) / TCP(sport=67, dport=68, flags="S"),
        Ether(src=a.mac, dst=b.mac) / IPv6(src="fe80::2", dst="fe80::3") / ICMPv6ND_NS(tgt="fe80::3"),
        Ether(src=a.mac, dst=b.mac) / Dot1Q(vlan=7) / IP(src=a.ip, dst=b.ip) / UDP(sport=9, dport=9) / PAD,
        Ether(src="52:54:00:12:34:56", dst=b.mac) / IP(src="10.9.9.9", dst=b.ip) / UDP(sport=9, dport=9) / PAD,
        Ether(src=a.mac, dst=b.mac, type=0x88B6) / Raw(bytes(1486)),
    ]
    for frame in honest:
        (got,) = world.passes(frame, a, b)
        assert got[: len(bytes(frame))] == bytes(frame)


@pytest.mark.kernel
@pytest.mark.parametrize("body", [b"\0\x43\0\x44", b"\0\1\0\x44", b"\0\x43\0\1"])
def test_what_a_later_fragment_begins_with_is_no_port(world, guests, body):
    a, b, *_ = guests
    frame = Ether(src=a.mac, dst=b.mac) / IP(src=a.ip, dst=b.ip, frag=5, proto=17) / Raw(body + bytes(60))
    assert world.passes(frame, a, b) == [bytes(frame)]


@pytest.mark.kernel
def test_a_guest_cannot_draw_the_gateways_frames(world, guests):
    """The bridge learns no MAC of the gateway's from a port: what b sends to the gateway does not reach a."""
    a, b, *_ = guests
    resolve(b)
    for tag in (b"", bytes(Dot1Q(vlan=0, type=0x88B5))):
        a.send(bytes(Ether(src=GATEWAY_MAC, dst=BROADCAST, type=0x8100 if tag else 0x88B5)) + tag + bytes(40))
    b.send(to_gateway(b, IP(src=b.ip, dst=GATEWAY) / ICMP() / PAD))
    assert any(Ether(frame).haslayer(ICMP) for frame in b.frames(0.5, until=lambda f: Ether(f).haslayer(ICMP)))
    assert [frame for frame in a.frames(0.05) if frame[:6] == bytes.fromhex(GATEWAY_MAC.replace(":", ""))] == []


# --- Isolation.


def tried_paths(source, sink):
    """Frames by which `source` may try to reach `sink`."""
    payload = UDP(sport=1000, dport=2000) / Raw(b"hello neighbour")
    straight = IP(src=source.ip, dst=sink.ip) / payload
    yield "unicast", Ether(src=source.mac, dst=sink.mac) / straight
    yield "broadcast", Ether(src=source.mac, dst=BROADCAST) / straight
    yield "multicast", Ether(src=source.mac, dst="01:00:5e:00:00:fb") / IP(src=source.ip, dst="224.0.0.251") / payload
    yield "unknown MAC", Ether(src=source.mac, dst="52:54:00:99:99:99") / straight
    yield "reserved MAC", Ether(src=source.mac, dst="01:80:c2:00:00:0e") / straight
    yield "through the gateway", to_gateway(source, straight)
    yield "through the gateway, TCP", to_gateway(source, IP(src=source.ip, dst=sink.ip) / TCP(dport=22, flags="S"))
    yield "through the gateway, ping", to_gateway(source, IP(src=source.ip, dst=sink.ip) / ICMP())
    yield (
        "through the gateway, directed broadcast",
        to_gateway(source, IP(src=source.ip, dst="192.168.64.255") / payload),
    )
    yield "through the gateway, another source", to_gateway(source, IP(src=sink.ip, dst=sink.ip) / payload)
    yield "VLAN 0", Ether(src=source.mac, dst=sink.mac) / Dot1Q(vlan=0) / straight
    yield "VLAN 0 through the gateway", Ether(src=source.mac, dst=GATEWAY_MAC) / Dot1Q(vlan=0) / straight
    yield "VLAN 7", Ether(src=source.mac, dst=sink.mac) / Dot1Q(vlan=7) / straight
    yield "ARP", Ether(src=source.mac, dst=BROADCAST) / ARP(op=1, hwsrc=source.mac, psrc=source.ip, pdst=sink.ip)
    yield "ARP reply", Ether(src=source.mac, dst=sink.mac) / ARP(op=2, hwsrc=source.mac, psrc=source.ip, pdst=sink.ip)
    yield "IPv6", Ether(src=source.mac, dst="33:33:00:00:00:01") / IPv6(src="fe80::2", dst="ff02::1") / payload
    # An echo to the gateway whose answer would go to the other.
    yield "reflected ping", to_gateway(source, IP(src=sink.ip, dst=GATEWAY) / ICMP() / Raw(b"reflected"))
    yield "source route", to_gateway(
        source, IP(src=source.ip, dst=GATEWAY, options=[_loose_source_route(sink.ip)]) / payload
    )  # fmt: skip


def _loose_source_route(address: str):
    from scapy.layers.inet import IPOption_LSRR

    return IPOption_LSRR(routers=[address], pointer=4)


@pytest.mark.kernel
@pytest.mark.parametrize(("one", "other"), [(2, 3), (2, 0), (0, 2)], ids=["both", "from isolated", "to isolated"])
def test_an_isolated_port_exchanges_nothing(world, guests, one, other):
    source, sink = guests[one], guests[other]
    for guest in (source, sink):
        resolve(guest)
    for name, frame in tried_paths(source, sink):
        world.quiet()
        source.send(frame)
        got = [Ether(data) for data in sink.frames(0.06)]
        # The gateway's own answers are its own: it is what every port reaches.
        foreign = [frame for frame in got if frame.src != GATEWAY_MAC]
        assert foreign == [], name
        carried = [frame for frame in got if b"hello neighbour" in bytes(frame)]
        assert carried == [], name


@pytest.mark.kernel
def test_an_isolated_port_reaches_gateway_and_outside(world, guests):
    c = guests[2]
    resolve(c)
    c.send(to_gateway(c, IP(src=c.ip, dst=GATEWAY) / ICMP() / PAD))
    assert any(Ether(frame).haslayer(ICMP) for frame in c.frames(1, until=lambda f: Ether(f).haslayer(ICMP)))
    c.send(to_gateway(c, IP(src=c.ip, dst=OUTSIDE) / UDP(dport=53) / PAD))
    assert [IP(packet).dst for packet in world.packets()] == [OUTSIDE]


@pytest.mark.kernel
def test_no_hairpin_through_the_gateway_for_anybody(world, guests):
    a, b, *_ = guests
    resolve(a)
    resolve(b)
    before = world.counters()["hairpin"]
    for packet in (UDP(dport=9) / PAD, TCP(dport=22, flags="S"), ICMP()):
        a.send(to_gateway(a, IP(src=a.ip, dst=b.ip) / packet))
    assert [frame for frame in b.frames(0.1) if not Ether(frame).haslayer(ARP)] == []
    assert world.counters()["hairpin"] == before + 3


# --- What goes where.


@pytest.mark.kernel
@pytest.mark.parametrize(
    "packet",
    [
        TCP(sport=4000, dport=80, flags="S"),
        TCP(sport=4001, dport=80, flags="SEC"),  # asks for explicit congestion notification
        UDP(sport=4000, dport=53) / Raw(b"x"),
        ICMP(type=8, id=7, seq=1) / PAD,
        TCP(sport=4002, dport=80, flags="A") / Raw(b"x"),  # of a connection that nobody knows
    ],
    ids=["syn", "syn with ECN", "udp", "echo", "stray"],
)
def test_what_opens_a_flow_comes_to_python(world, guests, packet):
    a = guests[0]
    a.send(to_gateway(a, IP(src=a.ip, dst=OUTSIDE) / packet))
    (got,) = world.packets()
    assert (IP(got).src, IP(got).dst) == (a.ip, OUTSIDE)
    assert bytes(IP(got).payload) == bytes(IP(bytes(IP(src=a.ip, dst=OUTSIDE) / packet)).payload)


@pytest.mark.kernel
def test_fragments_come_to_python_whole(world, guests):
    a = guests[0]
    """In the pieces that it came in, in their order; the slow path's reassembly does the rest."""
    payload = bytes(range(256)) * 20
    for piece in reversed(fragment(IP(src=a.ip, dst=OUTSIDE, id=77) / UDP(sport=5, dport=6) / Raw(payload), 1400)):
        a.send(to_gateway(a, piece))
    reassembly = Reassembly()
    (got,) = [whole for packet in world.packets() if (whole := reassembly.add(packet)) is not None]
    assert bytes(IP(got)[UDP].payload) == payload
    checked = IP(got)
    del checked.chksum
    assert bytes(checked) == got


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (IP(dst="169.254.169.254") / TCP(dport=80, flags="S"), 9),
        (IP(dst="169.254.169.254") / UDP(dport=53) / PAD, 9),
        (IP(dst="169.254.1.2") / ICMP(), 9),
        (IP(dst="0.1.2.3") / UDP(dport=53) / PAD, 9),
        (IP(dst=OUTSIDE, proto=132) / PAD, 2),
        (IP(dst=OUTSIDE, proto=47) / PAD, 2),
    ],
    ids=["metadata", "metadata by UDP", "link-local", "this network", "SCTP", "GRE"],
)
def test_what_is_refused_is_refused_with_an_error(world, guests, packet, code):
    a = guests[0]
    resolve(a)
    packet = packet.copy()
    packet.src = a.ip
    a.send(to_gateway(a, packet))
    errors = [Ether(frame) for frame in a.frames(0.5, until=lambda f: Ether(f).haslayer(ICMP))]
    (error,) = [one for one in errors if one.haslayer(ICMP)]
    assert (error[IP].src, error[ICMP].type, error[ICMP].code) == (GATEWAY, 3, code)
    assert world.packets(0.05) == []


@pytest.mark.kernel
@pytest.mark.parametrize(
    "packet",
    [
        IP(src="192.168.64.2", dst="224.0.0.251") / UDP(dport=5353) / PAD,
        IP(src="192.168.64.2", dst="240.0.0.1") / UDP(dport=9) / PAD,
        IP(src="10.1.2.3", dst=OUTSIDE) / UDP(dport=53) / PAD,
        IP(src="8.8.8.8", dst=OUTSIDE) / TCP(dport=80, flags="S"),
        IP(src="192.168.64.2", dst="127.0.0.1") / TCP(dport=80, flags="S"),
        IP(src="127.0.0.1", dst=OUTSIDE) / TCP(dport=80, flags="S"),
        IP(src="192.168.64.2", dst=OUTSIDE) / ICMP(type=13),
        IP(src="192.168.64.2", dst=OUTSIDE) / ICMP(type=5, code=1) / IP(src=OUTSIDE, dst="192.168.64.2") / UDP(),
        IP(src="192.168.64.2", dst=OUTSIDE) / UDP(sport=0, dport=53) / PAD,
        IP(src="192.168.64.2", dst=OUTSIDE) / TCP(dport=80, flags="R"),
    ],
    ids=["multicast", "class E", "foreign source", "public source", "loopback", "from loopback", "timestamp",
         "redirect", "port 0", "stray reset"],
)  # fmt: skip
def test_what_never_reaches_python(world, guests, packet):
    a = guests[0]
    for tag in (None, Dot1Q(vlan=0)):
        a.send(to_gateway(a, packet) if tag is None else Ether(src=a.mac, dst=GATEWAY_MAC) / tag / packet)
    assert world.packets(0.05) == []


@pytest.mark.kernel
def test_the_agents_and_the_pumps_ports_are_out_of_reach(world, guests):
    """The pump's listener has a port on 127.0.0.1; by the gateway's address, or the loopback's, it does not answer."""
    a = guests[0]
    resolve(a)
    port = world.engine.listener.getsockname()[1]
    for address in (GATEWAY, "127.0.0.1"):
        for tag in (b"", b"\x81\x00\x00\x00"):
            packet = IP(src=a.ip, dst=address) / TCP(sport=4444, dport=port, flags="S")
            frame = bytes(to_gateway(a, packet))
            a.send(frame[:12] + tag + frame[12:])
    flags = [str(Ether(frame)[TCP].flags) for frame in a.frames(0.2) if Ether(frame).haslayer(TCP)]
    assert set(flags) <= {"RA"}


@pytest.mark.kernel
def test_dhcp_knows_the_port_by_its_mark(world, guests):
    udp, raw, arp = world.engine.dhcp_sockets()
    with udp, raw, arp:
        for guest in guests[:3]:
            claim = guests[3 if guest is guests[0] else 0]  # whatever the packet claims
            frame = Ether(src=guest.mac, dst=BROADCAST) / IP(src="0.0.0.0", dst="255.255.255.255")
            guest.send(frame / UDP(sport=68, dport=67) / BOOTP(chaddr=bytes.fromhex(claim.mac.replace(":", ""))))
            world.turn(0.02)
            data, ancillary, _, _ = udp.recvmsg(2000, 100)
            marks = [int.from_bytes(value, "little") for _, kind, value in ancillary if kind == socket.SO_MARK]
            assert marks == [firewall.PORT_MARK + guest.number]
            assert data[28:34].hex(":") == claim.mac


@pytest.mark.kernel
def test_connections_to_the_name_server_are_limited_per_port(world, guests):
    a, b, *_ = guests
    resolve(b)

    def ask(guest, port: int) -> bytes:
        return bytes(to_gateway(guest, IP(src=guest.ip, dst=GATEWAY) / TCP(sport=port, dport=53, flags="S")))

    before = world.counters()["limited"]
    for port in range(3 * ASKERS):
        a.send(ask(a, 1024 + port))
    assert world.counters()["limited"] > before
    b.send(ask(b, 1024))  # nobody listens here: the answer is a RST
    assert b.frames(1, until=lambda frame: Ether(frame).haslayer(TCP))


@pytest.mark.kernel
def test_openings_are_limited_per_port(world, guests):
    """Far more than the burst; a neighbour's opening still comes through."""
    a, b, *_ = guests
    before = world.counters()["limited"]
    frames = [bytes(to_gateway(a, IP(src=a.ip, dst=OUTSIDE) / UDP(sport=1024 + i, dport=9) / PAD)) for i in range(64)]
    for _ in range(600):
        for frame in frames:
            a.send(frame)
        world.packets(0)
    assert world.counters()["limited"] > before
    world.quiet()
    b.send(to_gateway(b, IP(src=b.ip, dst=OUTSIDE) / UDP(dport=53) / PAD))
    assert b.ip in [IP(packet).src for packet in world.packets()]


# --- The texts.


def test_the_rulesets_text_has_no_gaps():
    text = firewall.ruleset(
        ipaddress.IPv4Address("10.0.0.1"), ipaddress.IPv4Network("10.0.0.0/8"), "5a:00:00:00:00:01", 4242
    )
    assert "tproxy to 127.0.0.1:4242" in text
    assert "10.0.0.0/8" in text
    assert text.count("{") == text.count("}")


@pytest.mark.kernel
def test_the_ruleset_loads_again_over_itself(lab, tmp_path):
    """As a process that takes over does; and nothing is left of the one before."""
    with net(tmp_path) as made:
        made.plug()
        rules = firewall.ruleset(
            ipaddress.IPv4Address("172.16.5.1"), ipaddress.IPv4Network("172.16.0.0/12"), "5a:00:00:00:00:02", 1
        )
        for _ in range(2):
            made.do(made.engine.namespace.run(["nft", "-f", "-"], rules))
        listing = made.do(made.engine.namespace.run(["nft", "list", "ruleset"], ""))
        assert "172.16.0.0/12" in listing
        assert GATEWAY not in listing


def test_adding_and_removing_a_port_are_each_others_opposite():
    added = firewall.add_port("vm3", isolated=True)
    assert added.splitlines() == [
        'add element bridge vmnet marks { "vm3" : 4099 }',
        "add element ip vmnet ids { 4099 : 3 }",
        'add element bridge vmnet isolated { "vm3" }',
    ]
    assert firewall.remove_port("vm3", isolated=True) == added.replace("add", "delete")


def test_counters_passes_over_what_it_does_not_know():
    listing = [
        {"metainfo": {"version": "1"}},
        {"counter": {"name": "spoofed", "packets": 3, "bytes": 9}},
        {"counter": {"name": "odd"}},
        {"counter": 5},
        {},
    ]
    assert firewall.counters(listing) == {"spoofed": 3}


def test_nft_is_there():
    assert subprocess.run(["nft", "--version"], capture_output=True, check=True).stdout
