"""Errors of host sockets, from the kernel's own error queue, as the ICMP messages that guests get."""

from __future__ import annotations

import errno
import socket
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.uplink import hosterror
from openvmnet.uplink.hosterror import HostError
from openvmnet.wire import ip

GUEST, OUTSIDE, ROUTER = (socket.inet_aton(one) for one in ("192.168.64.2", "203.0.113.1", "198.51.100.7"))
QUOTED = ip.build_udp(GUEST, OUTSIDE, 1000, 2000, b"")


def icmp(packet: bytes) -> tuple[bytes, bytes, int, int, int, bytes]:
    """Source, destination, type, code, second word, quote."""
    header = ip.parse(packet)
    kind, code, _, rest = struct.unpack_from("!BBHI", packet, header.payload)
    return header.src, header.dst, kind, code, rest, packet[28:]


def test_a_closed_port_on_loopback():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        where = free.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_IP, 11, 1)  # IP_RECVERR
        sock.connect(where)
        for payload in (b"first", b"second"):
            try:
                sock.send(payload)
            except ConnectionRefusedError:
                sock.send(payload)
        time.sleep(0.01)
        errors = hosterror.read(sock.fileno())
        assert [error.data for error in errors] == [b"first", b"second"]
        for error in errors:
            assert (error.number, error.kind, error.code) == (errno.ECONNREFUSED, ip.UNREACHABLE, ip.PORT)
            assert error.offender == socket.inet_aton("127.0.0.1")
        assert hosterror.read(sock.fileno()) == []
        sock.send(b"third")  # SO_ERROR is cleared, too


def test_an_icmp_message_is_carried_as_it_came():
    for kind, code in ((ip.UNREACHABLE, ip.HOST), (ip.UNREACHABLE, 13), (ip.TIME_EXCEEDED, 0)):
        error = HostError(errno.EHOSTUNREACH, kind, code, 0, ROUTER, b"")
        packet = hosterror.as_icmp(error, quoted=QUOTED, destination=OUTSIDE)
        assert icmp(packet) == (ROUTER, GUEST, kind, code, 0, QUOTED)


def test_a_narrow_path_is_told_with_its_mtu_by_whom_it_is_known():
    for offender, source in ((ROUTER, ROUTER), (None, OUTSIDE)):
        error = HostError(errno.EMSGSIZE, None, 0, 1400, offender, b"")
        packet = hosterror.as_icmp(error, quoted=QUOTED, destination=OUTSIDE)
        assert icmp(packet) == (source, GUEST, 3, 4, 1400, QUOTED)


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENETUNREACH, 0), (errno.EHOSTUNREACH, 1), (errno.ECONNREFUSED, 3), (errno.EPERM, 13), (errno.EACCES, 13)],
)
def test_what_the_hosts_kernel_refused(number, code):
    packet = hosterror.as_icmp(HostError(number, None, 0, 0, None, b""), quoted=QUOTED, destination=OUTSIDE)
    assert icmp(packet)[:4] == (OUTSIDE, GUEST, 3, code)


def test_what_has_no_icmp_message_is_silent():
    error = HostError(errno.ENOBUFS, None, 0, 0, None, b"")
    assert hosterror.as_icmp(error, quoted=QUOTED, destination=OUTSIDE) is None


@given(st.binary(min_size=16, max_size=60), st.binary(max_size=64))
def test_any_extended_error_is_decoded_and_told_or_not(payload, data):
    error = hosterror._decode(payload, data)
    assert error.offender is None or len(error.offender) == 4
    packet = hosterror.as_icmp(error, quoted=QUOTED, destination=OUTSIDE)
    assert packet is None or ip.parse(packet).dst == GUEST


def test_reading_something_that_has_no_queue():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        assert hosterror.read(sock.fileno()) == []
