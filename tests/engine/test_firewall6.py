"""The ruleset for IPv6 in a real namespace, against guests that send any frame they like."""

from __future__ import annotations

import contextlib
import os

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6NDOptUnknown,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    PadN,
    fragment6,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from openvmnet.engine.linux import firewall, firewall_bridge
from openvmnet.engine.linux.engine import LinuxEngine
from openvmnet.engine.linux.namespace import Namespace
from openvmnet.wire.fragments6 import Reassembly6
from tests.engine.taps import BROADCAST, CONFIG6, GATEWAY6, GATEWAY6_LOCAL, GATEWAY_MAC, PREFIX, net

pytestmark = pytest.mark.kernel
OUTSIDE = "2001:db8:2::1"
ALL_NODES, ALL_NODES_MAC = "ff02::1", "33:33:00:00:00:01"
ME, MY_IP, MY_LOCAL = "52:54:00:00:00:01", str(PREFIX[2]), "fe80::5054:ff:fe00:1"
PAD = Raw(bytes(20))
LONG_OPTIONS = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(200)) for _ in range(3)])


@pytest.fixture(scope="module")
def world(lab, tmp_path_factory):
    """Two guests that share all (`a`, `b`), and two isolated ones (`c`, `d`)."""
    with net(tmp_path_factory.mktemp("net6"), CONFIG6) as made:
        for isolated in (False, False, True, True):
            made.plug(isolated=isolated)
        yield made


@pytest.fixture
def guests(world):
    """The four, with nothing waiting."""
    world.quiet()
    return world.guests


def to_gateway(guest, packet):
    return Ether(src=guest.mac, dst=GATEWAY_MAC) / packet


def resolve(guest) -> None:
    """Let the gateway know the guest, so that it can answer at once."""
    ask = IPv6(src=guest.ip6, dst=GATEWAY6) / ICMPv6ND_NS(tgt=GATEWAY6) / ICMPv6NDOptSrcLLAddr(lladdr=guest.mac)
    guest.send(to_gateway(guest, ask))
    assert any(Ether(frame).haslayer(ICMPv6ND_NA) for frame in guest.frames(1, until=_is_advert))


def _is_advert(frame: bytes) -> bool:
    return bool(Ether(frame).haslayer(ICMPv6ND_NA))


def passed(world, frame, source, sink) -> list[bytes]:
    """What `sink` gets of it; what the gateway says meanwhile is left out."""
    return [one for one in world.passes(frame, source, sink) if Ether(one).src != GATEWAY_MAC]


def everyone(packet):
    return Ether(src=ME, dst=ALL_NODES_MAC) / packet


def nd(src: str, body):
    return everyone(IPv6(src=src, dst=ALL_NODES, hlim=255) / body)


def pieces(packet, size: int, first: int = 0):
    """One fragment of `packet`, the `first`th, in a frame."""
    whole = packet.copy()
    return everyone(fragment6(IPv6(bytes(whole)), size)[first])


def with_fragment_header(src: str, body):
    """A packet in one piece that has a fragment header all the same (RFC 6946)."""
    return everyone(IPv6(src=src, dst=ALL_NODES, hlim=255) / IPv6ExtHdrFragment(nh=58, m=0, offset=0) / body)


ADVERT_OF_GATEWAY = ICMPv6ND_NA(tgt=GATEWAY6, O=1) / ICMPv6NDOptDstLLAddr(lladdr=ME)
SPOOFS = {
    "gateway's address": nd(GATEWAY6, UDP(sport=9, dport=9) / PAD),
    "gateway's link-local address": nd(GATEWAY6_LOCAL, UDP(sport=9, dport=9) / PAD),
    "gateway's address in TCP": nd(GATEWAY6, TCP(sport=9, dport=9, flags="S")),
    "advertisement for the gateway": nd(MY_LOCAL, ADVERT_OF_GATEWAY),
    "advertisement for the gateway's link-local address": nd(MY_LOCAL, ICMPv6ND_NA(tgt=GATEWAY6_LOCAL)),
    "advertisement behind headers": everyone(
        IPv6(src=MY_LOCAL, dst=ALL_NODES, hlim=255) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / ADVERT_OF_GATEWAY
    ),
    "advertisement with a fragment header": with_fragment_header(MY_LOCAL, ADVERT_OF_GATEWAY),
    "advertisement in fragments": pieces(
        IPv6(src=MY_LOCAL, dst=ALL_NODES, hlim=255) / IPv6ExtHdrFragment(nh=58) / ADVERT_OF_GATEWAY
        / ICMPv6NDOptUnknown(type=253, data=bytes(1500)), 1280,
    ),
    "advertisement with the gateway's MAC": nd(
        MY_LOCAL, ICMPv6ND_NA(tgt=str(PREFIX[9])) / ICMPv6NDOptDstLLAddr(lladdr=GATEWAY_MAC)
    ),
    "advertisement with the gateway's MAC in second place": nd(
        MY_LOCAL,
        ICMPv6ND_NA(tgt=str(PREFIX[9])) / ICMPv6NDOptUnknown(type=253, data=bytes(6))
        / ICMPv6NDOptDstLLAddr(lladdr=GATEWAY_MAC),
    ),
    "solicitation with the gateway's MAC": nd(
        MY_LOCAL, ICMPv6ND_NS(tgt=str(PREFIX[9])) / ICMPv6NDOptSrcLLAddr(lladdr=GATEWAY_MAC)
    ),
    "solicitation as the gateway": nd(GATEWAY6, ICMPv6ND_NS(tgt=str(PREFIX[9])) / ICMPv6NDOptSrcLLAddr(lladdr=ME)),
    "router solicitation with the gateway's MAC": nd(
        MY_LOCAL, ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=GATEWAY_MAC)
    ),
    "router advertisement": nd(MY_LOCAL, ICMPv6ND_RA()),
    "router advertisement with a fragment header": with_fragment_header(MY_LOCAL, ICMPv6ND_RA()),
    "router advertisement whose type is in no first fragment": pieces(
        IPv6(src=MY_LOCAL, dst=ALL_NODES, hlim=255) / IPv6ExtHdrFragment(nh=60) / LONG_OPTIONS / LONG_OPTIONS
        / LONG_OPTIONS / ICMPv6ND_RA(), 1280,
    ),
    "redirect": nd(MY_LOCAL, ICMPv6ND_Redirect(tgt=MY_LOCAL, dst=OUTSIDE)),
    "router renumbering": nd(MY_LOCAL, Raw(b"\x8a\0\0\0" + bytes(20))),
    "DHCPv6 server": everyone(IPv6(src=MY_LOCAL, dst=ALL_NODES) / UDP(sport=547, dport=546) / PAD),
    "DHCPv6 server behind headers": everyone(
        IPv6(src=MY_LOCAL, dst=ALL_NODES) / IPv6ExtHdrDestOpt() / UDP(sport=547, dport=546) / PAD
    ),
    "DHCPv6 server, first fragment": pieces(
        IPv6(src=MY_LOCAL, dst=ALL_NODES) / IPv6ExtHdrFragment(nh=17) / UDP(sport=547, dport=546) / Raw(bytes(1500)),
        1280,
    ),
    "loopback source": nd("::1", UDP(sport=9, dport=9) / PAD),
    "loopback destination": everyone(IPv6(src=MY_IP, dst="::1") / UDP(sport=9, dport=9) / PAD),
    "mapped source": nd("::ffff:192.168.64.1", UDP(sport=9, dport=9) / PAD),
    "mapped destination": everyone(IPv6(src=MY_IP, dst="::ffff:127.0.0.1") / UDP(sport=9, dport=9) / PAD),
    "multicast source": nd("ff02::1", UDP(sport=9, dport=9) / PAD),
}  # fmt: skip
for _name in ("router renumbering",):
    SPOOFS[_name][IPv6].nh = 58


def test_the_spoofs_are_from_the_guest_that_sends_them(guests):
    a = guests[0]
    assert (a.mac, a.ip6, a.local6) == (ME, MY_IP, MY_LOCAL)
    assert str(firewall.link_local(GATEWAY_MAC)) == GATEWAY6_LOCAL


@pytest.mark.parametrize("tag", [None, 0], ids=["plain", "VLAN 0"])
@pytest.mark.parametrize("name", SPOOFS)
def test_a_spoof_reaches_no_neighbour(world, guests, name, tag):
    a, b, *_ = guests
    frame = SPOOFS[name]
    if tag is not None:
        frame = Ether(src=frame.src, dst=frame.dst) / Dot1Q(vlan=tag) / frame.payload
    before = world.counters()["spoofed"]
    assert passed(world, frame, a, b) == []
    assert world.counters()["spoofed"] == before + 1


def test_what_is_honest_passes(world, guests):
    a, b, *_ = guests
    straight = Ether(src=a.mac, dst=b.mac)
    large = fragment6(
        IPv6(bytes(IPv6(src=a.ip6, dst=b.ip6) / IPv6ExtHdrFragment(nh=17) / UDP(dport=9) / Raw(bytes(3000)))), 1400
    )
    echo = fragment6(
        IPv6(bytes(IPv6(src=a.ip6, dst=b.ip6) / IPv6ExtHdrFragment(nh=58) / ICMPv6EchoRequest(data=bytes(3000)))), 1400
    )
    honest = [
        straight / IPv6(src=a.local6, dst=b.local6) / ICMPv6ND_NS(tgt=b.local6) / ICMPv6NDOptSrcLLAddr(lladdr=a.mac),
        straight / IPv6(src=a.local6, dst=b.local6) / ICMPv6ND_NA(tgt=a.local6) / ICMPv6NDOptDstLLAddr(lladdr=a.mac),
        Ether(src=a.mac, dst="33:33:ff:00:00:01") / IPv6(src="::", dst="ff02::1:ff00:1") / ICMPv6ND_NS(tgt=GATEWAY6),
        Ether(src=a.mac, dst="33:33:00:00:00:02") / IPv6(src=a.local6, dst="ff02::2") / ICMPv6ND_RS(),
        straight / IPv6(src=a.ip6, dst=b.ip6) / TCP(sport=547, dport=546, flags="S"),
        straight / IPv6(src=a.ip6, dst=b.ip6) / UDP(sport=546, dport=547) / PAD,
        straight / IPv6(src=a.ip6, dst=b.ip6) / ICMPv6EchoRequest(),
        straight / IPv6(src=a.ip6, dst=b.ip6, nh=132) / PAD,
        straight / IPv6(src=a.ip6, dst=b.ip6, nh=59),
        Ether(src=a.mac, dst="33:33:00:00:00:fb") / IPv6(src=a.local6, dst="ff02::fb") / UDP(sport=5353, dport=5353),
        *(straight / piece for piece in large + echo),
    ]
    for frame in honest:
        (got,) = passed(world, frame, a, b)
        assert got[: len(bytes(frame))] == bytes(frame)


def test_an_address_by_lease_is_its_ports_alone(world, guests):
    a, b, *_ = guests
    mine = str(PREFIX[0x100])
    assert passed(world, nd(mine, UDP(sport=9, dport=9) / PAD), a, b) != []  # nobody's yet; it is known from now on
    world.do(world.engine.guard({(mine, b.link)}, set()))
    try:
        claims = [
            nd(mine, UDP(sport=9, dport=9) / PAD),
            nd(mine, TCP(sport=9, dport=9, flags="S")),
            nd(MY_LOCAL, ICMPv6ND_NA(tgt=mine) / ICMPv6NDOptDstLLAddr(lladdr=ME)),
            nd("::", ICMPv6ND_NS(tgt=mine)),  # as if it tried the address for itself, to make the owner's trial fail
        ]
        for frame in claims:
            assert passed(world, frame, a, b) == []
        for frame in claims:
            owners = frame.copy()
            owners.src = b.mac
            assert passed(world, owners, b, a) != []
        asked = nd(MY_LOCAL, ICMPv6ND_NS(tgt=mine) / ICMPv6NDOptSrcLLAddr(lladdr=ME))
        assert passed(world, asked, a, b) != []  # who wants to reach it may ask for it
    finally:
        world.do(world.engine.guard(set(), {(mine, b.link)}))
    assert passed(world, nd(mine, UDP(sport=9, dport=9) / PAD), a, b) != []


# --- Isolation.


def tried_paths(source, sink):
    """Frames by which `source` may try to reach `sink`."""
    payload = UDP(sport=1000, dport=2000) / Raw(b"hello neighbour")
    straight = IPv6(src=source.ip6, dst=sink.ip6) / payload
    yield "unicast", Ether(src=source.mac, dst=sink.mac) / straight
    yield "link-local", Ether(src=source.mac, dst=sink.mac) / IPv6(src=source.local6, dst=sink.local6) / payload
    yield "broadcast MAC", Ether(src=source.mac, dst=BROADCAST) / straight
    yield "all nodes", Ether(src=source.mac, dst=ALL_NODES_MAC) / IPv6(src=source.local6, dst=ALL_NODES) / payload
    yield "mDNS", Ether(src=source.mac, dst="33:33:00:00:00:fb") / IPv6(src=source.local6, dst="ff02::fb") / payload
    yield (
        "wide multicast",
        Ether(src=source.mac, dst="33:33:00:00:00:01") / IPv6(src=source.ip6, dst="ff0e::1") / payload,
    )
    yield "multicast to the gateway's MAC", to_gateway(source, IPv6(src=source.ip6, dst="ff0e::1") / payload)
    yield "unknown MAC", Ether(src=source.mac, dst="52:54:00:99:99:99") / straight
    yield "through the gateway", to_gateway(source, straight)
    yield "through the gateway, link-local", to_gateway(source, IPv6(src=source.local6, dst=sink.local6) / payload)
    yield "through the gateway, TCP", to_gateway(source, IPv6(src=source.ip6, dst=sink.ip6) / TCP(dport=22, flags="S"))
    yield "through the gateway, ping", to_gateway(source, IPv6(src=source.ip6, dst=sink.ip6) / ICMPv6EchoRequest())
    yield "VLAN 0", Ether(src=source.mac, dst=sink.mac) / Dot1Q(vlan=0) / straight
    yield "solicitation", Ether(src=source.mac, dst=ALL_NODES_MAC) / IPv6(src=source.ip6) / ICMPv6ND_NS(tgt=sink.ip6)
    yield "advertisement", Ether(src=source.mac, dst=sink.mac) / IPv6(src=source.ip6) / ICMPv6ND_NA(tgt=source.ip6)
    yield (
        "listener report",
        Ether(src=source.mac, dst="33:33:00:00:00:16") / IPv6(src=source.local6) / ICMPv6MLReport2(),
    )
    yield "fragment", to_gateway(source, IPv6(src=source.ip6, dst=sink.ip6) / IPv6ExtHdrFragment(nh=17, m=1) / payload)


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
        assert [frame for frame in got if frame.src != GATEWAY_MAC] == [], name
        assert [frame for frame in got if b"hello neighbour" in bytes(frame)] == [], name


def test_an_isolated_port_reaches_gateway_and_outside(world, guests):
    c = guests[2]
    resolve(c)
    c.send(to_gateway(c, IPv6(src=c.ip6, dst=GATEWAY6) / ICMPv6EchoRequest()))
    assert any(Ether(frame).haslayer(ICMPv6EchoReply) for frame in c.frames(0.3))
    c.send(to_gateway(c, IPv6(src=c.ip6, dst=OUTSIDE) / UDP(dport=53) / PAD))
    assert [IPv6(packet).dst for packet in world.packets()] == [OUTSIDE]


def test_no_hairpin_through_the_gateway_for_anybody(world, guests):
    """Nor a redirect, nor a look for the neighbour: a scan of the prefix would fill the host's neighbour table."""
    a, b, *_ = guests
    resolve(a)
    before = world.counters()["hairpin"]
    for packet in (UDP(dport=9) / PAD, TCP(dport=22, flags="S"), ICMPv6EchoRequest()):
        a.send(to_gateway(a, IPv6(src=a.ip6, dst=b.ip6) / packet))
        a.send(to_gateway(a, IPv6(src=a.ip6, dst=str(PREFIX[0x9999])) / packet))
        a.send(to_gateway(a, IPv6(src=a.local6, dst="fe80::9999") / packet))
    assert [frame for frame in b.frames(0.1) if Ether(frame).src == GATEWAY_MAC] == []
    assert [frame for frame in a.frames(0.05) if Ether(frame).haslayer(ICMPv6ND_Redirect)] == []
    assert world.counters()["hairpin"] == before + 9


# --- What goes where.


@pytest.mark.parametrize(
    "packet",
    [
        TCP(sport=4000, dport=80, flags="S"),
        TCP(sport=4001, dport=80, flags="SEC"),
        UDP(sport=4000, dport=53) / Raw(b"x"),
        ICMPv6EchoRequest(id=7, seq=1, data=bytes(20)),
        TCP(sport=4002, dport=80, flags="A") / Raw(b"x"),
        IPv6ExtHdrDestOpt() / UDP(sport=4000, dport=53) / Raw(b"x"),
    ],
    ids=["syn", "syn with ECN", "udp", "echo", "stray", "behind options"],
)
def test_what_opens_a_flow_comes_to_python_with_its_ports_number(world, guests, packet):
    for guest in guests[:2]:
        sent = IPv6(src=guest.ip6, dst=OUTSIDE, fl=0xABCDE) / packet
        guest.send(to_gateway(guest, sent))
        (got,) = world.packets()
        assert int.from_bytes(got[2:4], "big") == guest.number
        assert (IPv6(got).src, IPv6(got).dst, IPv6(got).hlim) == (guest.ip6, OUTSIDE, 63)
        assert got[40:] == bytes(sent)[40:]


def test_fragments_come_to_python_with_the_number_and_become_whole(world, guests):
    a = guests[0]
    payload = bytes(range(256)) * 20
    whole = IPv6(src=a.ip6, dst=OUTSIDE) / IPv6ExtHdrFragment(nh=17) / UDP(sport=5, dport=6) / Raw(payload)
    for piece in reversed(fragment6(IPv6(bytes(whole)), 1400)):
        a.send(to_gateway(a, piece))
    packets = world.packets()
    assert {int.from_bytes(packet[2:4], "big") for packet in packets} == {a.number}
    reassembly = Reassembly6()
    (got,) = [whole for packet in packets if (whole := reassembly.add(packet)) is not None]
    assert bytes(IPv6(got)[UDP].payload) == payload


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (IPv6(dst="fec0::1") / TCP(dport=80, flags="S"), 0),
        (IPv6(dst="64:ff9b::127.0.0.1") / TCP(dport=80, flags="S"), 0),
        (IPv6(dst="64:ff9b::169.254.169.254") / UDP(dport=80) / PAD, 0),
        (IPv6(dst="2002:7f00:1::") / UDP(dport=80) / PAD, 0),
        (IPv6(dst="2002:e000:1::") / UDP(dport=80) / PAD, 0),
        (IPv6(dst=OUTSIDE, nh=132) / PAD, 1),
        (IPv6(dst=OUTSIDE, nh=47) / PAD, 1),
    ],
    ids=["site-local", "NAT64 of loopback", "NAT64 of link-local", "6to4 of loopback", "6to4 of multicast", "SCTP",
         "GRE"],
)  # fmt: skip
def test_what_is_refused_is_refused_with_an_error(world, guests, packet, code):
    a = guests[0]
    resolve(a)
    packet = packet.copy()
    packet.src = a.ip6
    a.send(to_gateway(a, packet))
    errors = [Ether(frame) for frame in a.frames(0.3, until=lambda f: Ether(f).haslayer(ICMPv6DestUnreach))]
    (error,) = [one for one in errors if one.haslayer(ICMPv6DestUnreach)]
    assert (error[IPv6].src, error[ICMPv6DestUnreach].code) == (GATEWAY6, code)
    assert world.packets(0.05) == []


@pytest.mark.parametrize(
    "packet",
    [
        IPv6(src=MY_IP, dst="ff0e::1") / UDP(dport=5353) / PAD,
        IPv6(src=MY_LOCAL, dst=OUTSIDE) / UDP(dport=53) / PAD,
        IPv6(src="2001:db8:9::1", dst=OUTSIDE) / UDP(dport=53) / PAD,
        IPv6(src="2001:db8:9::1", dst=OUTSIDE) / TCP(dport=80, flags="S"),
        IPv6(src=MY_IP, dst="::1") / TCP(dport=80, flags="S"),
        IPv6(src=MY_IP, dst="::") / TCP(dport=80, flags="S"),
        IPv6(src=MY_IP, dst="::7f00:1") / TCP(dport=80, flags="S"),
        IPv6(src=MY_IP, dst="::ffff:127.0.0.1") / TCP(dport=80, flags="S"),
        IPv6(src=MY_IP, dst="::ffff:203.0.113.1") / TCP(dport=80, flags="S"),
        IPv6(src="::1", dst=OUTSIDE) / TCP(dport=80, flags="S"),
        IPv6(src=MY_IP, dst=OUTSIDE) / ICMPv6ND_NS(tgt=OUTSIDE),
        IPv6(src=MY_IP, dst=OUTSIDE) / ICMPv6EchoReply(),
        IPv6(src=MY_IP, dst=OUTSIDE) / ICMPv6PacketTooBig(mtu=1280) / IPv6(src=OUTSIDE, dst=MY_IP) / UDP(),
        IPv6(src=MY_IP, dst=OUTSIDE) / UDP(sport=0, dport=53) / PAD,
        IPv6(src=MY_IP, dst=OUTSIDE) / TCP(dport=80, flags="R"),
        IPv6(src=MY_IP, dst=OUTSIDE, nh=59),
    ],
    ids=["multicast", "link-local source", "foreign source", "foreign source by TCP", "loopback", "unspecified",
         "compatible", "mapped loopback", "mapped", "from loopback", "solicitation", "reply", "too big", "port 0",
         "stray reset", "no next header"],
)  # fmt: skip
def test_what_never_reaches_python(world, guests, packet):
    a = guests[0]
    for tag in (None, Dot1Q(vlan=0)):
        a.send(to_gateway(a, packet) if tag is None else Ether(src=a.mac, dst=GATEWAY_MAC) / tag / packet)
    assert world.packets(0.05) == []


def test_the_pumps_port_is_out_of_reach(world, guests):
    a = guests[0]
    resolve(a)
    port = world.engine.listener6.getsockname()[1]
    for address in (GATEWAY6, "::1"):
        for tag in (b"", b"\x81\x00\x00\x00"):
            frame = bytes(to_gateway(a, IPv6(src=a.ip6, dst=address) / TCP(sport=4444, dport=port, flags="S")))
            a.send(frame[:12] + tag + frame[12:])
    flags = [str(Ether(frame)[TCP].flags) for frame in a.frames(0.2) if Ether(frame).haslayer(TCP)]
    assert "SA" not in flags


# --- Limits.


def test_made_up_sources_fill_no_table(world, guests):
    """The neighbour table is one for the whole host; another port's guest is not bothered."""
    *_, d = guests
    for number in range(400):
        d.send(to_gateway(d, IPv6(src=str(PREFIX[0x10000 + number]), dst=GATEWAY6) / ICMPv6EchoRequest()))
    # Each with the multicast group at which the gateway asks for it.
    assert 64 <= len(_neighbours(world)) <= 2 * firewall_bridge.NEW_SOURCES_AT_ONCE + 32
    resolve(guests[1])


def _neighbours(world) -> list[str]:
    text = world.do(world.engine.namespace.run(["ip", "-6", "-batch", "-"], "neigh show nud all dev vmnet0\n"))
    return [line.split()[0] for line in text.splitlines()]


def test_neighbour_discovery_is_bounded(world, guests):
    a, b, *_ = guests
    before = world.counters()["storm"]
    frame = bytes(nd(MY_LOCAL, ICMPv6ND_NS(tgt=str(PREFIX[0x77]))))
    for _ in range(3 * firewall_bridge.ARP_RATE):
        with contextlib.suppress(BlockingIOError):
            a.send(frame)
    assert world.counters()["storm"] > before
    resolve(b)


# --- The engine's side.


def test_the_gateway_answers_at_once_and_ports_have_no_address(world):
    text = world.do(world.engine.namespace.run(["ip", "-6", "-batch", "-"], "addr show\n"))
    assert f"inet6 {GATEWAY6}/64" in text
    assert f"inet6 {GATEWAY6_LOCAL}/64" in text
    assert "tentative" not in text
    assert text.count("inet6") == 3  # and ::1


def test_neighbours6_are_the_guests(world, guests):
    a = guests[0]
    resolve(a)
    assert (a.ip6, a.mac) in [(one.address, one.mac) for one in world.engine.neighbours6()]


def test_the_next_engine_takes_over_what_is_there(lab, tmp_path):
    with net(tmp_path, CONFIG6) as made:
        guest, first = made.plug(), made.engine
        os.close(first.tun)  # the dead process had them
        first.listener.close()
        first.listener6.close()
        first.namespace.close()

        async def up() -> LinuxEngine:
            engine = LinuxEngine(Namespace(made.path), CONFIG6, GATEWAY_MAC)
            await engine.up({guest.link: False})
            return engine

        made.engine = made.do(up())
        made.engine.watch(made.lane, made.departed.append, lambda: made.gone.append(True))
        resolve(guest)
        guest.send(to_gateway(guest, IPv6(src=guest.ip6, dst=OUTSIDE) / UDP(sport=4000, dport=53) / Raw(b"x")))
        (got,) = [packet for packet in made.packets() if packet[0] >> 4 == 6 and packet[6] == 17]
        assert int.from_bytes(got[2:4], "big") == guest.number
        for sock in (first._netlink, first._events):
            if sock.fileno() >= 0:
                made.lane.forget(sock.fileno())
                sock.close()


def test_a_network_without_a_prefix_has_no_ipv6(lab, tmp_path):
    with net(tmp_path) as made:
        made.plug()
        assert made.engine.prefix is None
        assert made.do(made.engine.namespace.run(["ip", "-6", "-batch", "-"], "addr show\n")) == ""
        assert "table ip6" not in made.do(made.engine.namespace.run(["nft", "list", "ruleset"], ""))
