"""Neighbour discovery messages: what is written is read again, and no bytes do harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import icmp6
from openvmnet.wire.icmp6 import Advertisement, Neighbour, Prefix

MAC = bytes.fromhex("5254001234ab")
seconds = st.integers(0, 0xFFFFFFFF)
addresses = st.binary(min_size=16, max_size=16)
labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=63)
domains = st.lists(labels, min_size=1, max_size=3).map(".".join)
prefixes = st.builds(Prefix, addresses, st.integers(0, 128), seconds, seconds, st.booleans(), st.booleans())


@st.composite
def advertisements(draw):
    dns, search = draw(st.lists(addresses, max_size=3)), draw(st.lists(domains, max_size=3))
    return Advertisement(
        lifetime=draw(st.integers(0, 0xFFFF)),
        prefixes=tuple(draw(st.lists(prefixes, max_size=3))),
        managed=draw(st.booleans()),
        other=draw(st.booleans()),
        hop_limit=draw(st.integers(0, 255)),
        reachable=draw(seconds),
        retransmit=draw(seconds),
        mtu=draw(st.none() | seconds),
        mac=draw(st.none() | st.binary(min_size=6, max_size=6)),
        dns=tuple(dns),
        search=tuple(search),
        dns_lifetime=draw(seconds) if dns or search else 0,
    )


@given(advertisements())
def test_an_advertisement_is_read_as_it_was_written(one):
    message = icmp6.build_advertisement(one)
    assert len(message) % 8 == 0
    assert icmp6.parse_advertisement(message) == one


@given(st.sampled_from([135, 136]), addresses.filter(lambda one: one[0] != 0xFF), st.none() | st.just(MAC))
def test_a_neighbour_message_is_read_as_it_was_written(kind, target, mac):
    one = Neighbour(kind, target, mac)
    assert icmp6.parse_neighbour(icmp6.build_neighbour(one)) == one


@given(st.sampled_from([133, 134, 135, 136, 0]), st.binary(max_size=120))
def test_any_bytes_give_a_value_or_malformed(kind, rest):
    for parse in (icmp6.parse_solicitation, icmp6.parse_neighbour, icmp6.parse_advertisement):
        for message in (bytes([kind, 0]) + rest, rest):
            try:
                parse(message)
            except Malformed:
                continue


@given(st.binary(max_size=80))
def test_domains_of_any_bytes_are_names_or_malformed(value):
    try:
        names = icmp6.decode_domains(value)
    except Malformed:
        return
    assert icmp6.decode_domains(b"".join(map(icmp6.encode_domain, names))) == names


def test_a_solicitation_with_and_without_its_sender():
    bare = bytes([133]) + bytes(7)
    assert icmp6.parse_solicitation(bare) is None
    assert icmp6.parse_solicitation(bare + b"\1\1" + MAC) == MAC
    assert icmp6.parse_solicitation(bare + b"\x0e\1" + bytes(6)) is None  # a nonce, RFC 3971


@pytest.mark.parametrize(
    "message",
    [
        b"",
        bytes(7),
        bytes([133, 1]) + bytes(6),
        bytes([133]) + bytes(7) + b"\1\0",
        bytes([133]) + bytes(7) + b"\1\2" + MAC,
    ],
)
def test_what_is_no_solicitation(message):
    with pytest.raises(Malformed):
        icmp6.parse_solicitation(message)


@pytest.mark.parametrize("name", ["", "a..b", "x" * 64, "ü.example", ".".join(["a" * 60] * 5)])
def test_no_domain_names(name):
    with pytest.raises(Malformed):
        icmp6.encode_domain(name)
