"""Where guests' destinations are found on the host."""

from __future__ import annotations

import socket

import pytest

from openvmnet.errors import HostError
from openvmnet.uplink import hostside
from openvmnet.uplink.hostside import HostSide

GATEWAY, ELSEWHERE, OWN = (socket.inet_aton(text) for text in ("192.168.64.1", "203.0.113.9", "10.1.2.3"))
GATEWAY6, ELSEWHERE6, OWN6 = (
    socket.inet_pton(socket.AF_INET6, text) for text in ("fd00:1::1", "2001:db8::9", "2001:db8::1")
)
LOOPBACK, LOOPBACK6 = socket.inet_aton("127.0.0.1"), bytes(15) + b"\1"


def host(*, outside: bool = True, loopback: bool = False, own=None) -> HostSide:
    own = {socket.AF_INET: [OWN, ELSEWHERE], socket.AF_INET6: [OWN6]} if own is None else own
    return HostSide([GATEWAY, GATEWAY6], outside=outside, loopback=loopback, own=lambda family: own.get(family, []))


@pytest.mark.parametrize("outside", [True, False])
def test_the_gateway_is_the_host_and_the_rest_is_the_outside(outside):
    made = host(outside=outside)
    assert (made.destination(GATEWAY, 80), made.destination(GATEWAY6, 80)) == (OWN, OWN6)
    assert made.second(GATEWAY, 80) is None
    expected = (ELSEWHERE, ELSEWHERE6) if outside else (None, None)
    assert (made.destination(ELSEWHERE, 80), made.destination(ELSEWHERE6, 80)) == expected


def test_loopback_first_where_it_is_wanted():
    made = host(loopback=True)
    assert (made.destination(GATEWAY, 80), made.destination(GATEWAY6, 80)) == (LOOPBACK, LOOPBACK6)
    assert (made.second(GATEWAY, 80), made.second(GATEWAY6, 80)) == (OWN, OWN6)
    assert made.destination(ELSEWHERE, 80) == ELSEWHERE
    assert made.second(ELSEWHERE, 80) is None


def test_a_host_without_addresses_is_reached_by_nobody():
    assert host(own={}).destination(GATEWAY, 80) is None
    assert host(own={}, loopback=True).destination(GATEWAY, 80) == LOOPBACK


def test_addresses_are_read_again_once_they_are_old(monkeypatch):
    now, own = [100.0], {socket.AF_INET: [OWN]}
    monkeypatch.setattr(hostside.time, "monotonic", lambda: now[0])
    made = host(own=own)
    assert made.destination(GATEWAY, 80) == OWN
    own[socket.AF_INET] = [ELSEWHERE]
    assert made.destination(GATEWAY, 80) == OWN
    now[0] += 1.1
    assert made.destination(GATEWAY, 80) == ELSEWHERE


def test_what_cannot_be_read_is_no_address():
    def own(_: int) -> list[bytes]:
        raise HostError("netlink says no")

    assert HostSide([GATEWAY], outside=True, loopback=False, own=own).destination(GATEWAY, 80) is None
