"""The uplinks over IPv6, alone, on the lab's loopback: what differs from IPv4."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
from typing import TYPE_CHECKING
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvmnet.kernel import sockets6
from openvmnet.kernel.loop import Lane
from openvmnet.uplink import family, hosterror, udp
from openvmnet.uplink.family import IPV4, IPV6
from openvmnet.uplink.hosterror import HostError
from openvmnet.uplink.icmp import IcmpUplink
from openvmnet.uplink.slowpath import SlowPath
from openvmnet.uplink.tcp import TcpUplink
from openvmnet.uplink.udp import UdpUplink
from openvmnet.wire import ip, ip6
from openvmnet.wire.fragments6 import split
from tests.netns import ping_sockets
from tests.uplink.benching import closed, turn

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel
GUEST, OTHER, OUTSIDE, GATEWAY = "fd00::2", "fd00::3", "fd00:1::1", "fd00::1"


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address)


def of_port(number: int, packet: bytes) -> bytes:
    """`packet` as the firewall hands it over."""
    return packet[:2] + number.to_bytes(2, "big") + packet[4:]


@pytest.fixture(scope="module", autouse=True)
def addresses(lab):
    """All of them are the loopback's, so that a socket may have any."""
    for verb in ("add", "del"):
        for address in (GUEST, OTHER, OUTSIDE, GATEWAY):
            subprocess.run(["ip", "addr", verb, f"{address}/128", "dev", "lo"], check=True)
        if verb == "add":
            yield


class Bench:
    """All three uplinks for both versions, as a network has them."""

    def __init__(self) -> None:
        self.lane = Lane()
        self.written: list[bytes] = []
        self.listener = self._socket(socket.SOCK_STREAM, GATEWAY)
        self.server = self._socket(socket.SOCK_STREAM, OUTSIDE)
        for one in (self.listener, self.server):
            one.listen(16)
        self.listener.setblocking(False)
        self.server.settimeout(2)
        four = socket.socket()
        four.bind(("127.0.0.1", 0))
        four.listen(1)
        self.tcp = TcpUplink(self.lane, four, self.written.append, bytes(4), lambda work: work(), 100)
        self.door = self.tcp.serve6(self.listener, packed(GATEWAY))
        self.udp = UdpUplink(self.lane, self._transparent, self.written.append, 1500, 100)
        self.udp6 = self.udp.serve6(self._transparent6)
        self.datagrams = self._socket(socket.SOCK_DGRAM, OUTSIDE)
        self.guest = self._socket(socket.SOCK_DGRAM, GUEST)
        self.icmp = IcmpUplink(self.lane, self.written.append, 1500, family=IPV6)

    @staticmethod
    def _socket(kind: int, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, 0))
        sock.settimeout(2)
        return sock

    @staticmethod
    def _transparent() -> int:
        raise AssertionError("no flow of this test is of IPv4")

    @staticmethod
    def _transparent6() -> int:
        fd = sockets6.udp()
        with socket.socket(fileno=os.dup(fd)) as view:
            view.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            view.setsockopt(socket.IPPROTO_IPV6, sockets6.IPV6_RECVFRAGSIZE, 1)
        return fd

    def step(self, seconds: float = 0.02) -> None:
        turn(self.lane, seconds)

    def close(self) -> None:
        for uplink in (self.icmp, self.udp, self.tcp):
            uplink.close()
        assert (len(self.icmp), len(self.udp), self.tcp.pending(), len(self.tcp.flows)) == (0, 0, 0, 0)
        assert len(self.tcp.accounts) == 0
        for sock in (self.server, self.datagrams, self.guest):
            sock.close()
        self.lane.close()


def benched():
    return closed(Bench)


@pytest.fixture
def bench():
    with benched() as made:
        yield made


def syn(sport: int, dport: int, *, src: str = GUEST, dst: str = OUTSIDE, flags: int = ip.SYN) -> bytes:
    segment = struct.pack("!HHIIBBHHH", sport, dport, 77, 0, 0x50, flags, 64240, 0, 0)
    return of_port(3, ip6.build(packed(src), packed(dst), ip.TCP, segment))


def opened(uplink, packet: bytes, **changes: object) -> None:
    uplink.open(packet, msgspec.structs.replace(ip6.parse(packet), **changes))


# --- TCP.


def test_a_syn_becomes_a_flow_of_its_guest(bench):
    port = bench.server.getsockname()[1]
    with socket.socket(socket.AF_INET6) as guest:
        guest.bind((GUEST, 0))
        guest.settimeout(2)
        packet = syn(guest.getsockname()[1], port)
        opened(bench.door, packet)
        bench.step()
        assert bench.written == [packet]
        where = port.to_bytes(2, "big") + packed(OUTSIDE)
        with mock.patch.object(sockets6, "local", return_value=where):  # the listener is not transparent here
            guest.connect(bench.listener.getsockname()[:2])
            bench.step()
        (flow,) = bench.tcp.flows
        assert (flow.guest_address, flow.owner) == (packed(GUEST), 3)
        with bench.server.accept()[0] as outside:
            outside.settimeout(2)
            guest.sendall(b"there")
            outside.sendall(b"and back")
            bench.step()
            assert (outside.recv(10), guest.recv(10)) == (b"there", b"and back")
            bench.tcp.forget_guest(packed(OTHER))
            assert len(bench.tcp.flows) == 1
            bench.tcp.forget_guest(packed(GUEST))
            assert len(bench.tcp.flows) == 0
            with pytest.raises(ConnectionResetError):
                outside.recv(1)


def test_a_refusal_is_a_reset(bench):
    packet = syn(4000, 9)
    opened(bench.door, packet)
    bench.step()
    assert bench.written == [ip6.build_reset(packet, ip6.parse(packet))]


@pytest.mark.parametrize("dst", ["2001:db8:99::1", "::ffff:127.0.0.1"], ids=["no route", "mapped"])
def test_what_has_no_route_is_told_at_once_by_the_gateway(bench, dst):
    packet = syn(4000, 80, dst=dst)
    opened(bench.door, packet)
    assert bench.written == [ip6.build_error(packed(GATEWAY), packet, ip6.UNREACHABLE, ip6.NO_ROUTE)]


def test_a_host_whose_kernel_has_no_ipv6_is_a_host_without_a_route(bench, monkeypatch):
    def refuse() -> int:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    for name in ("tcp", "udp", "ping"):
        monkeypatch.setattr(sockets6, name, refuse)
    packets = [
        syn(4000, 80),
        ip6.build_udp(packed(GUEST), packed(OUTSIDE), 1, 2, b"x"),
        ip6.build_echo_request(packed(GUEST), packed(OUTSIDE), 1, 0, b""),
    ]
    for uplink, packet in zip((bench.door, bench.udp6, bench.icmp), packets, strict=True):
        opened(uplink, packet)
    assert [(one[40], one[41], one[48:]) for one in bench.written] == [(1, 0, packet) for packet in packets]


def test_nowhere_is_refused_and_elsewhere_is_gone_to(bench):
    bench.tcp.destination = lambda _address, port: packed(OUTSIDE) if port == bench.server.getsockname()[1] else None
    packet = syn(4000, 80, dst=GATEWAY)
    opened(bench.door, packet)
    assert bench.written == [ip6.build_reset(packet, ip6.parse(packet))]
    packet = syn(4001, bench.server.getsockname()[1], dst=GATEWAY)
    opened(bench.door, packet)
    bench.step()
    assert bench.written[1:] == [packet]
    bench.server.accept()[0].close()


def test_what_is_no_syn_goes_back(bench):
    packet = syn(4000, 80, flags=ip.ACK)
    opened(bench.door, packet)
    assert bench.written == [packet]
    assert bench.tcp.counters["tcp_stray"] == 1


# --- UDP.


def datagram(bench: Bench, payload: bytes, *, dst: str = OUTSIDE, port: int = 0) -> bytes:
    sport, dport = bench.guest.getsockname()[1], port or bench.datagrams.getsockname()[1]
    return of_port(3, ip6.build_udp(packed(GUEST), packed(dst), sport, dport, payload))


def test_first_answers_and_the_rest(bench):
    opened(bench.udp6, datagram(bench, b"first"))
    data, caller = bench.datagrams.recvfrom(100)
    assert data == b"first"
    for payload in (b"answer", b"", bytes(60000)):
        bench.datagrams.sendto(payload, caller)
        bench.step()
        got, sender = bench.guest.recvfrom(65536)
        assert (got, sender[:2]) == (payload, bench.datagrams.getsockname()[:2])
    bench.guest.sendto(b"second", bench.datagrams.getsockname())
    bench.step()
    assert bench.datagrams.recvfrom(100) == (b"second", caller)
    assert len(bench.udp) == 1
    bench.udp.forget_guest(packed(GUEST))
    assert len(bench.udp) == 0


def test_a_closed_port_comes_back_from_who_was_asked(bench):
    """Also where the destination is found under another address."""
    bench.udp.destination = lambda _address, _port: packed(OUTSIDE)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as free:
        free.bind((OUTSIDE, 0))
        port = free.getsockname()[1]
    packet = datagram(bench, b"x", dst=GATEWAY, port=port)
    opened(bench.udp6, packet)
    bench.step()
    assert bench.written == [ip6.build_error(packed(GATEWAY), packet, ip6.UNREACHABLE, ip6.PORT)]


def test_a_destination_that_is_nowhere_is_a_closed_port(bench):
    bench.udp.destination = lambda _address, _port: None
    packet = datagram(bench, b"x")
    opened(bench.udp6, packet)
    assert bench.written == [ip6.build_error(packed(OUTSIDE), packet, ip6.UNREACHABLE, ip6.PORT)]


@contextlib.contextmanager
def narrow() -> Iterator[None]:
    """The way outside, the loopback device here, takes packets of 1,300 octets."""
    command = ["ip", "link", "set", "lo", "mtu"]
    subprocess.run([*command, "1300"], check=True)
    try:
        yield
    finally:
        subprocess.run([*command, "65536"], check=True)


def test_a_narrow_path_is_told_until_the_guest_fragments(bench):
    with narrow():
        packet = datagram(bench, bytes(1400))
        opened(bench.udp6, packet)
        (flow,) = bench.udp._flows.values()
        assert bench.written == [ip6.build_error(packed(OUTSIDE), packet[:48], ip6.PACKET_TOO_BIG, 0, rest=1300)]
        assert flow.careful == udp.LOOKS
        for size in (10, 1400):  # loopback is narrow for the guest's kernel, too: it fragments
            bench.guest.sendto(bytes(size), bench.datagrams.getsockname())
            bench.step()
            assert bench.datagrams.recv(2000) == bytes(size)
        assert (flow.careful, flow.fragments) == (0, True)
        bench.guest.sendto(bytes(5000), bench.datagrams.getsockname())
        bench.step()
        assert bench.datagrams.recv(6000) == bytes(5000)


def test_a_flow_that_begins_in_fragments_may_leave_in_fragments(bench):
    with narrow():
        opened(bench.udp6, datagram(bench, bytes(1400)), dont_fragment=False)
        assert bench.datagrams.recv(2000) == bytes(1400)
        assert bench.written == []


def test_looking_for_fragments_ends(bench, monkeypatch):
    monkeypatch.setattr(udp, "LOOKS", 3)
    opened(bench.udp6, datagram(bench, b"first"))
    (flow,) = bench.udp._flows.values()
    flow.careful = udp.LOOKS
    for number in range(5):
        bench.guest.sendto(b"%d" % number, bench.datagrams.getsockname())
        bench.step()
    assert [bench.datagrams.recv(10) for _ in range(6)] == [b"first", b"0", b"1", b"2", b"3", b"4"]
    assert (flow.careful, flow.fragments) == (0, False)


# --- ICMPv6.


@pytest.fixture
def allowed():
    with ping_sockets():
        yield


def test_replies_bear_the_guests_identifier_sequence_and_data(bench, allowed):
    for sequence in (1, 2, 700):
        opened(bench.icmp, ip6.build_echo_request(packed(GUEST), packed(OUTSIDE), 0xBEEF, sequence, b"%d" % sequence))
    bench.step()
    wanted = [ip6.build_echo_reply(packed(OUTSIDE), packed(GUEST), 0xBEEF, n, b"%d" % n, ttl=64) for n in (1, 2, 700)]
    assert bench.written == wanted
    assert bench.icmp.counters["icmp6_replies"] == 3
    bench.icmp.forget_guest(packed(GUEST))
    assert len(bench.icmp) == 0


def test_the_largest_echo_comes_back_in_pieces_for_the_link(bench, allowed):
    opened(bench.icmp, ip6.build_echo_request(packed(GUEST), packed(OUTSIDE), 1, 1, bytes(65527)), dont_fragment=False)
    bench.step()
    reply = ip6.build_echo_reply(packed(OUTSIDE), packed(GUEST), 1, 1, bytes(65527))
    assert bench.written == split(reply, 1500, 0x00010001)


def test_an_echo_that_the_path_does_not_take_is_told(bench, allowed):
    with narrow():
        packet = ip6.build_echo_request(packed(GUEST), packed(OUTSIDE), 1, 1, bytes(1400))
        opened(bench.icmp, packet)
        assert bench.written == [ip6.build_error(packed(OUTSIDE), packet, ip6.PACKET_TOO_BIG, 0, rest=1300)]


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=40))
def test_any_segment_datagram_and_message_is_survived(data):
    with benched() as bench:
        for uplink, protocol in ((bench.door, ip.TCP), (bench.udp6, ip.UDP), (bench.icmp, ip6.ICMP)):
            opened(uplink, ip6.build(packed(GUEST), packed(OUTSIDE), protocol, data))
        bench.step(0.001)


# --- The slow path, errors, families.


class Uplink:
    def __init__(self) -> None:
        self.opened: list[tuple[bytes, ip.Header]] = []

    def open(self, packet: bytes, header: ip.Header) -> None:
        self.opened.append((packet, header))


def test_the_slow_path_tells_the_versions_apart_and_knows_whose_a_packet_is():
    lane = Lane()
    kernel, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    tun.setblocking(False)
    path = SlowPath(lane, tun.detach())
    four, six = Uplink(), Uplink()
    path.uplinks, path.uplinks6 = {ip.UDP: four}, {ip.UDP: six}
    path.start()
    path.budget = mock.Mock()
    with kernel:
        whole = of_port(9, ip6.build_udp(packed(GUEST), packed(OUTSIDE), 1, 2, bytes(2000)))
        small = of_port(8, ip6.build_udp(packed(GUEST), packed(OUTSIDE), 1, 2, b"x"))
        v4 = ip.build_udp(b"\x0a\0\0\2", b"\x0a\0\0\3", 1, 2, b"x")
        v4 = v4[:4] + (7).to_bytes(2, "big") + v4[6:]
        for packet in (small, *split(whole, 1280, 5), v4, b"\x60", b"\xff" * 50):
            kernel.send(packet)
            lane.select(0)
    assert [call.args for call in path.budget.charge.mock_calls] == [(one,) for one in (8, 9, 9, 7, 0, 0xFFFF)]
    assert [packet for packet, _ in six.opened] == [small, whole]
    assert [header.dont_fragment for _, header in six.opened] == [True, False]
    assert [packet for packet, _ in four.opened] == [v4]
    assert path.counters["slowpath_malformed"] == 2
    path.close()
    lane.close()


QUOTED = ip6.build_udp(packed(GUEST), packed(OUTSIDE), 1000, 2000, b"")


def test_an_icmp_message_is_carried_as_it_came():
    router = packed("2001:db8::7")
    for kind, code in ((ip6.UNREACHABLE, 3), (ip6.UNREACHABLE, 6), (ip6.TIME_EXCEEDED, 0)):
        error = HostError(errno.EHOSTUNREACH, kind, code, 0, router, b"")
        wanted = ip6.build_error(router, QUOTED, kind, code)
        assert hosterror.as_icmp6(error, quoted=QUOTED, destination=packed(OUTSIDE)) == wanted


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENETUNREACH, 0),
        (errno.EHOSTUNREACH, 3),
        (errno.ECONNREFUSED, 4),
        (errno.EPERM, 1),
        (errno.EAFNOSUPPORT, 0),
    ],
)
def test_what_the_hosts_kernel_refused(number, code):
    error = HostError(number, None, 0, 0, None, b"")
    wanted = ip6.build_error(packed(OUTSIDE), QUOTED, ip6.UNREACHABLE, code)
    assert hosterror.as_icmp6(error, quoted=QUOTED, destination=packed(OUTSIDE)) == wanted


@given(st.binary(min_size=16, max_size=60), st.binary(max_size=64))
def test_any_extended_error_is_decoded_and_told_or_not(payload, data):
    error = hosterror._decode(payload, data)
    assert error.offender is None or len(error.offender) in (4, 16)
    if error.offender is None or len(error.offender) == 16:
        told = hosterror.as_icmp6(error, quoted=QUOTED, destination=packed(OUTSIDE))
        assert told is None or ip6.parse(told).dst == packed(GUEST)


def test_the_family_of_an_address():
    assert family.of(bytes(4)) is IPV4
    assert family.of(bytes(16)) is IPV6
    assert IPV6.text(packed("fd00::2")) == "fd00::2"
    assert family.itself(b"anywhere", 80) == b"anywhere"
