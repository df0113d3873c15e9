"""Reassembly of what a kernel that has reassembled already takes apart again."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import fragments, ip
from openvmnet.wire.fragments import Reassembly

GUEST, OUTSIDE = socket.inet_aton("192.168.64.2"), socket.inet_aton("203.0.113.1")


def pieces(payload: bytes, size: int, *, identification: int = 7, options: int = 0, flags: int = 0) -> list[bytes]:
    """The packet around `payload` in fragments of `size` octets of payload."""
    found = []
    for offset in range(0, len(payload), size):
        more = 0x2000 if offset + size < len(payload) else 0
        part = payload[offset : offset + size]
        # Of the options, only some are copied into later fragments (RFC 791).
        words = 5 + (options if offset == 0 else 0)
        header = struct.pack(
            "!BBHHHBBH4s4s", 0x40 | words, 0, words * 4 + len(part), identification, flags | more | offset // 8, 64,
            ip.UDP, 0, GUEST, OUTSIDE,
        )  # fmt: skip
        found.append(header + bytes(words * 4 - 20) + part)
    return found


def feed(reassembly: Reassembly, packets: list[bytes]) -> list[bytes]:
    return [whole for packet in packets if (whole := reassembly.add(packet)) is not None]


@given(
    st.binary(min_size=17, max_size=4000), st.integers(1, 200), st.integers(0, 10), st.sampled_from([0, 0x4000])
)  # fmt: skip
def test_pieces_become_the_packet(payload, eighths, options, flags):
    reassembly = Reassembly()
    parts = pieces(payload, eighths * 8, options=options, flags=flags)
    (whole,) = feed(reassembly, parts)
    assert len(reassembly) == 0
    if len(parts) == 1:
        assert whole == parts[0]
        return
    header = ip.parse(whole)
    assert (header.src, header.dst, header.protocol, header.ttl) == (GUEST, OUTSIDE, ip.UDP, 64)
    assert header.dont_fragment == bool(flags)
    assert whole[header.payload :] == payload
    assert ip.checksum(whole[: header.payload]) == 0


def test_the_largest_packet():
    payload = bytes(range(256)) * 255 + bytes(range(235))
    (whole,) = feed(Reassembly(), pieces(payload, 1480))
    assert len(whole) == 65535
    assert whole[20:] == payload


def test_one_octet_too_many_is_no_packet():
    assert feed(Reassembly(), pieces(bytes(65516), 1480)) == []


def test_interleaved_packets():
    reassembly = Reassembly()
    one, other = pieces(b"1" * 3000, 1000, identification=1), pieces(b"2" * 3000, 1000, identification=2)
    mixed = [packet for both in zip(one, other, strict=True) for packet in both]
    assert [whole[20:] for whole in feed(reassembly, mixed)] == [b"1" * 3000, b"2" * 3000]


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_with_a_piece_lost_nothing_comes_out(lost):
    reassembly = Reassembly()
    parts = pieces(bytes(4000), 1000)
    assert feed(reassembly, parts[:lost] + parts[lost + 1 :]) == []
    # The same identification again, whole.
    assert len(feed(reassembly, parts)) == 1
    assert len(reassembly) == 0


def test_the_table_is_bounded_and_the_oldest_gives_way():
    reassembly = Reassembly()
    begun = [pieces(bytes(2000), 1000, identification=number) for number in range(fragments.PENDING + 10)]
    for first, _ in begun:
        assert reassembly.add(first) is None
    assert len(reassembly) == fragments.PENDING
    assert len(feed(reassembly, [second for _, second in begun])) == fragments.PENDING


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_any_bytes_give_a_packet_nothing_or_malformed(packets):
    reassembly = Reassembly()
    for packet in packets:
        try:
            whole = reassembly.add(packet)
        except Malformed:
            continue
        assert whole is None or whole == packet or len(whole) > 20


@given(st.data())
def test_damaged_pieces_give_a_packet_nothing_or_malformed(data):
    reassembly = Reassembly()
    for _ in range(5):
        for packet in pieces(bytes(200), 64, identification=data.draw(st.integers(0, 1))):
            damaged = bytearray(packet)
            for _ in range(data.draw(st.integers(0, 2))):
                damaged[data.draw(st.integers(0, 19))] = data.draw(st.integers(0, 255))
            try:
                whole = reassembly.add(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
            except Malformed:
                continue
            if whole is not None and not int.from_bytes(damaged[6:8], "big") & 0x3FFF:
                assert whole == damaged[: len(whole)]
            elif whole is not None:
                assert ip.parse(whole).total == len(whole)
        assert len(reassembly) <= fragments.PENDING
