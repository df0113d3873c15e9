"""DHCPv6 messages: what is written is read again, and no bytes do harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import dhcp6
from openvmnet.wire.dhcp6 import Address, Fqdn, Ia, Message

seconds = st.integers(0, 0xFFFFFFFF)
statuses = st.none() | st.tuples(st.integers(0, 0xFFFF), st.text(max_size=20))
packed = st.binary(min_size=16, max_size=16)
ias = st.builds(
    Ia,
    st.binary(min_size=4, max_size=4),
    seconds,
    seconds,
    st.lists(st.builds(Address, packed, seconds, seconds, st.none() | st.integers(0, 9)), max_size=3).map(tuple),
    statuses,
)
options = st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=40)), max_size=8)
labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=20)
names = st.just("") | st.lists(labels, min_size=1, max_size=3).map(".".join).flatmap(
    lambda name: st.sampled_from([name, f"{name}."])
)


@given(st.integers(1, 11), st.binary(min_size=3, max_size=3), options)
def test_a_message_is_read_as_it_was_written(kind, transaction, given_options):
    one = Message(kind, transaction, given_options)
    assert dhcp6.parse(dhcp6.build(one)) == one


@given(ias)
def test_an_association_is_read_as_it_was_written(ia):
    assert dhcp6.decode_ia(dhcp6.encode_ia(ia)) == ia


@given(names, st.booleans(), st.booleans(), st.booleans())
def test_a_name_is_read_as_it_was_written(name, server, overridden, none):
    one = Fqdn(name, server and not none, overridden, none)
    assert dhcp6.decode_fqdn(dhcp6.encode_fqdn(one)) == one


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_malformed(data):
    for read in (dhcp6.parse, dhcp6.decode_ia, dhcp6.decode_fqdn, dhcp6.decode_status):
        try:
            read(data)
        except Malformed:
            continue
    assert dhcp6.duid_mac(data) is None or len(dhcp6.duid_mac(data)) == 6


@given(options)
def test_known_options_of_any_content_give_values_or_malformed(found):
    message = Message(1, b"abc", [(code % 40, value) for code, value in found])
    for read in (message.requested, message.ias, message.fqdn, lambda: message.duid(dhcp6.CLIENT_ID)):
        try:
            read()
        except Malformed:
            continue


def test_relays_messages_and_torn_ones_are_malformed():
    for data in (b"", b"\1ab", b"\x0c" + bytes(33), b"\1abc\0\1\0\5abcd", b"\1abc\0\1\0"):
        with pytest.raises(Malformed):
            dhcp6.parse(data)


def test_the_mac_in_a_duid():
    mac = bytes.fromhex("525400123456")
    assert dhcp6.duid_mac(dhcp6.duid_ll(mac)) == mac
    assert dhcp6.duid_mac(bytes.fromhex("000100011122334455") + mac[1:]) is not None
    assert dhcp6.duid_mac(b"\0\4" + bytes(16)) is None  # a UUID
