"""IPv6 fragments: splitting, and reassembly of what a kernel that has reassembled already takes apart again."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import fragments, ip, ip6
from openvmnet.wire.fragments6 import Reassembly6, split

GUEST, OUTSIDE = (socket.inet_pton(socket.AF_INET6, one) for one in ("fd00::2", "2001:db8:2::1"))


def packet(payload: bytes, *, options: int = 0) -> bytes:
    """A packet around `payload`, with `options` destination options headers before it."""
    kind = ip.UDP
    for _ in range(options):
        payload, kind = bytes([kind, 0, 1, 4, 0, 0, 0, 0]) + payload, ip6.DESTINATION_OPTIONS
    return ip6.build(GUEST, OUTSIDE, kind, payload)


def behind_options(piece: bytes, options: int) -> bytes:
    """A fragment whose fragment header stands behind hop-by-hop options, as a kernel keeps them in each piece."""
    if not options:
        return piece
    header = bytes([ip6.FRAGMENT, options - 1]) + bytes(options * 8 - 2)
    length = (len(piece) - 40 + len(header)).to_bytes(2, "big")
    return piece[:4] + length + bytes([ip6.HOP_BY_HOP]) + piece[7:40] + header + piece[40:]


def feed(reassembly: Reassembly6, packets: list[bytes]) -> list[bytes]:
    return [whole for piece in packets if (whole := reassembly.add(piece)) is not None]


@given(st.binary(min_size=1, max_size=6000), st.integers(1280, 3000), st.integers(0, 0xFFFFFFFF), st.integers(0, 2))
def test_pieces_fit_and_become_the_packet(payload, mtu, identification, options):
    whole = packet(payload, options=options)
    pieces = split(whole, mtu, identification)
    assert all(len(piece) <= mtu for piece in pieces)
    assert (len(pieces) == 1) == (len(whole) <= mtu)
    reassembly = Reassembly6()
    assert feed(reassembly, pieces) == [whole]
    assert len(reassembly) == 0


@given(st.binary(min_size=1300, max_size=3000), st.integers(1, 3))
def test_pieces_behind_hop_by_hop_options_become_the_packet_with_them(payload, options):
    pieces = [behind_options(piece, options) for piece in split(packet(payload), 1280, 7)]
    (whole,) = feed(Reassembly6(), pieces)
    header = ip6.parse(whole)
    assert (header.protocol, header.payload) == (ip.UDP, 40 + options * 8)
    assert whole[header.payload :] == payload


def test_a_packet_in_one_piece_with_a_fragment_header_loses_it():
    piece = ip6.build(GUEST, OUTSIDE, ip6.FRAGMENT, bytes([ip.UDP]) + bytes(7) + b"datagram")
    for padding in (b"", bytes(6)):
        assert Reassembly6().add(piece + padding) == packet(b"datagram")


def test_the_largest_packet():
    whole = packet(bytes(range(256)) * 255 + bytes(range(255)))
    assert len(whole) == 40 + 65535
    assert feed(Reassembly6(), split(whole, 1500, 1)) == [whole]


def test_one_octet_too_many_is_no_packet():
    pieces = split(packet(bytes(65535)), 1500, 1)
    last = pieces[-1]
    longer = last[:4] + (len(last) - 39).to_bytes(2, "big") + last[6:] + b"x"
    assert feed(Reassembly6(), [*pieces[:-1], longer]) == []


def test_interleaved_packets():
    one, other = split(packet(b"1" * 3000), 1280, 1), split(packet(b"2" * 3000), 1280, 2)
    mixed = [piece for both in zip(one, other, strict=True) for piece in both]
    assert [whole[40:] for whole in feed(Reassembly6(), mixed)] == [b"1" * 3000, b"2" * 3000]


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_with_a_piece_lost_nothing_comes_out(lost):
    reassembly = Reassembly6()
    pieces = split(packet(bytes(4000)), 1280, 9)
    assert feed(reassembly, pieces[:lost] + pieces[lost + 1 :]) == []
    assert len(feed(reassembly, pieces)) == 1
    assert len(reassembly) == 0


def test_the_table_is_bounded_and_the_oldest_gives_way():
    reassembly = Reassembly6()
    begun = [split(packet(bytes(2000)), 1280, number) for number in range(fragments.PENDING + 10)]
    for first, _ in begun:
        assert reassembly.add(first) is None
    assert len(reassembly) == fragments.PENDING
    assert len(feed(reassembly, [second for _, second in begun])) == fragments.PENDING


@given(st.lists(st.binary(max_size=120), max_size=20))
def test_any_bytes_give_a_packet_nothing_or_malformed(packets):
    reassembly = Reassembly6()
    for piece in packets:
        try:
            whole = reassembly.add(piece)
        except Malformed:
            continue
        assert whole is None or whole == piece or len(whole) >= 40


@given(st.data())
def test_damaged_pieces_give_a_packet_nothing_or_malformed(data):
    reassembly = Reassembly6()
    options = data.draw(st.integers(0, 2))
    for _ in range(5):
        for piece in split(packet(bytes(1500)), 1280, data.draw(st.integers(0, 1))):
            damaged = bytearray(behind_options(piece, options))
            for _ in range(data.draw(st.integers(0, 2))):
                damaged[data.draw(st.integers(0, 60))] = data.draw(st.integers(0, 255))
            try:
                whole = reassembly.add(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
            except Malformed:
                continue
            assert whole is None or len(whole) <= 40 + 65535
        assert len(reassembly) <= fragments.PENDING
