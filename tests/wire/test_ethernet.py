from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import ethernet
from openvmnet.wire.ethernet import Arp, Frame

MAC = st.binary(min_size=6, max_size=6)
IP = st.binary(min_size=4, max_size=4)


@given(MAC, MAC, st.integers(0x600, 0xFFFF), st.binary(max_size=1500))
def test_a_frame_survives_building_and_parsing(dst, src, ethertype, payload):
    octets = ethernet.build(dst, src, ethertype, payload)
    frame = ethernet.parse(octets)
    assert len(octets) == max(60, 14 + len(payload))
    assert frame[:3] == (dst, src, ethertype)
    assert frame.payload == payload.ljust(46, b"\0")


def test_a_frame_has_the_layout_of_the_wire():
    octets = bytes.fromhex("ffffffffffff 525400123456 0806") + b"x" * 46
    assert ethernet.parse(octets) == Frame(ethernet.BROADCAST, bytes.fromhex("525400123456"), ethernet.ARP, b"x" * 46)


@pytest.mark.parametrize("octets", [b"", b"x" * 13, bytes(12) + b"\x05\xdc" + bytes(1500)])
def test_what_is_no_ethernet_ii_frame_is_malformed(octets):
    with pytest.raises(Malformed):
        ethernet.parse(octets)


@given(st.integers(0, 0xFFFF), MAC, IP, MAC, IP, st.binary(max_size=18))
def test_arp_survives_building_and_parsing_with_padding_behind_it(operation, sender, sender_ip, target, target_ip, pad):
    arp = Arp(operation, sender, sender_ip, target, target_ip)
    assert ethernet.parse_arp(ethernet.build_arp(arp) + pad) == arp


def test_arp_has_the_layout_of_rfc_826():
    arp = Arp(ethernet.ARP_REQUEST, b"\x52\x54\0\0\0\1", b"\xc0\xa8\x40\x01", bytes(6), b"\xc0\xa8\x40\x02")
    assert ethernet.build_arp(arp).hex(" ", 2) == (
        "0001 0800 0604 0001 5254 0000 0001 c0a8 4001 0000 0000 0000 c0a8 4002"
    )


@given(st.binary(max_size=64))
def test_whatever_the_bytes_arp_and_frames_are_values_or_malformed(octets):
    for parse in (ethernet.parse, ethernet.parse_arp):
        with contextlib.suppress(Malformed):
            parse(octets)


@pytest.mark.parametrize("at", [0, 2, 4, 5])
def test_arp_for_other_networks_is_malformed(at):
    octets = bytearray(ethernet.build_arp(Arp(1, bytes(6), bytes(4), bytes(6), bytes(4))))
    octets[at] ^= 0x40
    with pytest.raises(Malformed):
        ethernet.parse_arp(bytes(octets))


def test_a_mac_is_written_with_colons_and_read_with_dashes_too():
    assert ethernet.format_mac(b"\x52\x54\0\x12\x34\xab") == "52:54:00:12:34:ab"
    assert ethernet.parse_mac("52-54-00-12-34-AB") == b"\x52\x54\0\x12\x34\xab"


@pytest.mark.parametrize("text", ["", "52:54:00:12:34", "52:54-00:12:34:56", "525400123456", "52:54:00:12:34:5g"])
def test_what_is_no_mac_is_malformed(text):
    with pytest.raises(Malformed, match="MAC"):
        ethernet.parse_mac(text)
