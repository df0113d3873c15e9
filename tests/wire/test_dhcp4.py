from __future__ import annotations

import contextlib
import random
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import dhcp4
from openvmnet.wire.dhcp4 import Fqdn, Message

ADDRESS = st.binary(min_size=4, max_size=4)
CODES = st.integers(1, 254).filter(lambda code: code != dhcp4.OVERLOAD)
LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=5).map(".".join)


def field(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=size).map(lambda octets: octets.rstrip(b"\0"))


MESSAGES = st.builds(
    Message,
    op=st.sampled_from([1, 2]),
    xid=st.integers(0, 0xFFFFFFFF),
    chaddr=st.binary(max_size=16),
    options=st.dictionaries(CODES, st.binary(max_size=600), max_size=8),
    htype=st.integers(0, 255),
    hops=st.integers(0, 255),
    secs=st.integers(0, 0xFFFF),
    flags=st.integers(0, 0xFFFF),
    ciaddr=ADDRESS,
    yiaddr=ADDRESS,
    siaddr=ADDRESS,
    giaddr=ADDRESS,
    sname=field(64),
    file=field(128),
)


def request(options: dict[int, bytes], **fields) -> Message:
    return Message(op=dhcp4.BOOTREQUEST, xid=0x12345678, chaddr=b"\x52\x54\0\0\0\1", options=options, **fields)


def raw(options: bytes, *, sname: bytes = b"", file: bytes = b"") -> bytes:
    """A message whose octets behind the cookie are `options`."""
    octets = bytearray(dhcp4.build(request({}))[0][:236])
    octets[44:108] = sname.ljust(64, b"\0")
    octets[108:236] = file.ljust(128, b"\0")
    return bytes(octets) + b"\x63\x82\x53\x63" + options


@given(MESSAGES)
def test_a_message_survives_building_and_parsing(message):
    octets, dropped = dhcp4.build(message, limit=65507)
    assert not dropped
    parsed = dhcp4.parse(octets)
    assert parsed == message
    assert [code for code in parsed.options if code != dhcp4.RELAY_AGENT] == [
        code for code in message.options if code != dhcp4.RELAY_AGENT
    ]


@given(MESSAGES, st.integers(0, 1500))
def test_no_message_exceeds_its_limit_and_nothing_vanishes_silently(message, limit):
    try:
        octets, dropped = dhcp4.build(message, limit=limit)
    except Malformed:
        assert len(message.options[dhcp4.RELAY_AGENT]) > 300
        return
    assert dhcp4.MIN_SIZE <= len(octets) <= max(limit, dhcp4.MIN_LIMIT)
    parsed = dhcp4.parse(octets)
    kept = {code: value for code, value in message.options.items() if code not in dropped}
    assert parsed.options == kept


@given(MESSAGES, st.randoms(use_true_random=False))
def test_mutated_messages_are_values_or_malformed(message, rng):
    octets = bytearray(dhcp4.build(message, limit=65507)[0])
    for _ in range(rng.randrange(1, 12)):
        octets[rng.randrange(len(octets))] = rng.randrange(256)
    inspect(bytes(octets[: rng.randrange(len(octets) + 1)]))


@given(st.binary(max_size=400))
def test_any_option_field_is_a_value_or_malformed(octets):
    inspect(raw(octets))


def inspect(octets: bytes) -> None:
    """Use every parser on a message; anything but Malformed fails the test."""
    try:
        message = dhcp4.parse(octets)
        message.type()
        message.address(dhcp4.REQUESTED_ADDRESS)
        message.number(dhcp4.LEASE_TIME, 4)
    except Malformed:
        return
    for value in message.options.values():
        for decode in (dhcp4.decode_routes, dhcp4.decode_names, dhcp4.decode_fqdn):
            with contextlib.suppress(Malformed):
                decode(value)


def test_many_mutations_of_a_real_message():
    rng = random.Random(67)
    options = {
        53: b"\1",
        61: b"\1" + b"\x52\x54\0\0\0\1",
        55: bytes(range(1, 122)),
        81: b"\5\0\0\3web\0",
        119: b"\1a\0",
    }
    whole = dhcp4.build(request(options))[0]
    for _ in range(20000):
        octets = bytearray(whole)
        for _ in range(rng.randrange(1, 8)):
            octets[rng.randrange(len(octets))] = rng.randrange(256)
        inspect(bytes(octets))


def test_the_layout_is_that_of_rfc_2131():
    message = request({53: b"\1", 55: b"\1\3"}, flags=0x8000, secs=3, hops=1)
    octets = dhcp4.build(message)[0]
    assert octets[:12].hex() == "010106011234567800038000"
    assert octets[28:34] == message.chaddr
    assert octets[236:247].hex() == "63825363" + "350101" + "37020103"[:8]
    assert octets[247] == dhcp4.END
    assert len(octets) == 300
    assert dhcp4.parse(octets).broadcast


def test_pieces_of_an_option_are_one_value_in_their_order():
    parsed = dhcp4.parse(raw(b"\x77\3abc\x35\1\1\x77\2de\xff"))
    assert parsed.options == {119: b"abcde", 53: b"\1"}
    assert list(parsed.options) == [119, 53]


def test_a_value_beyond_255_octets_is_sent_in_pieces():
    value = bytes(range(256)) * 2
    octets = dhcp4.build(request({119: value}), limit=1472)[0]
    assert octets[240:242] == b"\x77\xff"
    assert octets[497:499] == b"\x77\xff"
    assert octets[754:756] == b"\x77\x02"
    assert dhcp4.parse(octets).options[119] == value


@pytest.mark.parametrize(
    ("overload", "expected", "file", "sname"),
    [
        (b"\1", {53: b"\1", 15: b"f"}, b"", b"\x0f\1s\xff"),
        (b"\2", {53: b"\1", 15: b"s"}, b"\x0f\1f\xff", b""),
        (b"\3", {53: b"\1", 15: b"fs"}, b"", b""),
    ],
)
def test_overloaded_fields_are_read_file_first(overload, expected, file, sname):
    parsed = dhcp4.parse(raw(b"\x35\1\1\x34\1" + overload + b"\xff", file=b"\x0f\1f\xff", sname=b"\x0f\1s\xff"))
    assert parsed.options == expected
    assert (parsed.file, parsed.sname) == (file, sname)


def test_what_does_not_fit_goes_to_file_and_sname_and_the_rest_is_reported():
    options = {53: b"\1", 200: b"a" * 200, 201: b"b" * 90, 202: b"c" * 110, 203: b"d" * 50, 204: b"e" * 100}
    octets, dropped = dhcp4.build(request(options))
    assert len(octets) <= 548
    assert dropped == (204,)
    assert octets[108:110] == b"\xca\x6e"
    assert octets[44:46] == b"\xcb\x32"
    assert dhcp4.parse(octets).options == {code: options[code] for code in (53, 200, 201, 202, 203)}


def test_fields_in_use_are_not_overloaded():
    options = {200: b"a" * 200, 201: b"b" * 90, 202: b"c" * 110}
    octets, dropped = dhcp4.build(request(options, file=b"boot", sname=b"host"))
    parsed = dhcp4.parse(octets)
    assert dropped == (202,)
    assert (parsed.file, parsed.sname) == (b"boot", b"host")


def test_the_relays_option_is_last_and_always_there():
    octets, dropped = dhcp4.build(request({82: b"\1\4port", 53: b"\2", 200: b"a" * 250, 201: b"b" * 120}))
    parsed = dhcp4.parse(octets)
    assert dropped == ()
    assert octets.rstrip(b"\0").endswith(b"\x52\6\1\4port\xff")
    assert parsed.options[82] == b"\1\4port"


def test_a_message_without_cookie_is_bootp_without_options():
    octets = bytearray(dhcp4.build(request({53: b"\1"}))[0])
    octets[236:240] = bytes(4)
    assert dhcp4.parse(bytes(octets)).type() is None
    assert dhcp4.parse(bytes(octets[:236])).options == {}


def test_a_missing_end_mark_is_tolerated():
    assert dhcp4.parse(raw(b"\0\0\x35\1\3")).type() == dhcp4.REQUEST


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        raw(b"")[:235],
        b"\3" + raw(b"")[1:],
        raw(b"")[:2] + b"\x11" + raw(b"")[3:],
        raw(b"\x35"),
        raw(b"\x35\2\1"),
        raw(b"\x34\1\4\xff"),
        raw(b"\x34\2\1\1\xff"),
        raw(b"\x34\1\1\xff", file=b"\x0f\xff"),
    ],
)
def test_torn_messages_are_malformed(octets):
    with pytest.raises(Malformed):
        dhcp4.parse(octets)


def test_known_options_of_a_wrong_size_are_malformed_when_asked_for():
    message = request({53: b"\1\1", 50: b"\1\2\3", 51: b"\1"})
    for ask in (message.type, lambda: message.address(50), lambda: message.number(51, 4)):
        with pytest.raises(Malformed):
            ask()
    assert message.number(57, 2) is None
    assert message.address(54) is None


# RFC 3442.


def test_classless_routes_have_rfc_3442s_encoding():
    routes = [
        (IPv4Address("0.0.0.0"), 0, IPv4Address("10.0.0.1")),
        (IPv4Address("10.17.0.0"), 16, IPv4Address("10.0.0.2")),
        (IPv4Address("10.229.0.128"), 25, IPv4Address("10.0.0.3")),
    ]
    value = dhcp4.encode_routes(routes)
    assert value.hex(" ") == "00 0a 00 00 01 10 0a 11 0a 00 00 02 19 0a e5 00 80 0a 00 00 03"
    assert dhcp4.decode_routes(value) == routes


@given(
    st.lists(
        st.tuples(st.integers(0, 32), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF)).map(
            lambda t: (IPv4Address(t[1] & (0xFFFFFFFF << (32 - t[0]) & 0xFFFFFFFF)), t[0], IPv4Address(t[2]))
        ),
        max_size=20,
    )
)
def test_classless_routes_survive(routes):
    assert dhcp4.decode_routes(dhcp4.encode_routes(routes)) == routes


@pytest.mark.parametrize("value", [b"\x21" + bytes(9), b"\x08\x0a\x01\x02\x03", b"\x08", b"\x04\x0f\1\2\3\4"])
def test_torn_routes_are_malformed(value):
    with pytest.raises(Malformed):
        dhcp4.decode_routes(value)


# RFC 3397.


def test_a_search_list_is_compressed_as_in_rfc_3397():
    value = dhcp4.encode_names(["eng.apple.com", "marketing.apple.com"])
    assert value == b"\3eng\5apple\3com\0\x09marketing\xc0\x04"
    assert dhcp4.decode_names(value) == ["eng.apple.com", "marketing.apple.com"]


@given(st.lists(NAME, max_size=12))
def test_search_lists_survive(names):
    assert dhcp4.decode_names(dhcp4.encode_names(names)) == names


@pytest.mark.parametrize(
    "value",
    [
        b"\3eng",
        b"\xc0",
        b"\xc0\0",
        b"\1a\xc0\2",
        b"\1a\xc0\0",
        b"\1a\0\1b\xc0\5",
        b"\x40a\0",
        b"\2\xff\xfe\0",
        b"\1a" * 130,
    ],
)
def test_torn_search_lists_are_malformed(value):
    with pytest.raises(Malformed):
        dhcp4.decode_names(value)


@pytest.mark.parametrize("name", ["", "a..b", "x" * 64, "\u00e4.example", ".".join(["abcdefg"] * 32)])
def test_what_is_no_domain_name_is_not_encoded(name):
    with pytest.raises(Malformed):
        dhcp4.encode_names([name])


# RFC 4702.


def test_both_encodings_of_a_client_fqdn_are_read():
    assert dhcp4.decode_fqdn(b"\5\0\0\3web\7example\0") == Fqdn("web.example.", server_updates=True)
    assert dhcp4.decode_fqdn(b"\4\0\0\3web") == Fqdn("web")
    assert dhcp4.decode_fqdn(b"\1\0\0web.example") == Fqdn("web.example", server_updates=True, canonical=False)
    assert dhcp4.decode_fqdn(b"\x0c\0\0") == Fqdn("", no_updates=True)


@given(NAME, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_a_client_fqdn_survives(name, absolute, updates, overridden, canonical):
    fqdn = Fqdn(name + "." * absolute, updates, overridden, not updates, canonical)
    value = dhcp4.encode_fqdn(fqdn)
    assert value[1:3] == b"\xff\xff"
    assert dhcp4.decode_fqdn(value) == fqdn


@pytest.mark.parametrize("value", [b"", b"\5\0", b"\x09\0\0a", b"\4\0\0\5web", b"\4\0\0\xc0\0"])
def test_torn_client_fqdns_are_malformed(value):
    with pytest.raises(Malformed):
        dhcp4.decode_fqdn(value)


def test_a_reply_copies_what_rfc_2131_and_6842_say():
    asked = request(
        {53: b"\1", 61: b"\0id", 82: b"\1\1x"}, flags=0x8000, giaddr=b"\1\2\3\4", hops=2, secs=9, ciaddr=b"\1" * 4
    )
    reply = dhcp4.reply_to(asked, dhcp4.OFFER)
    assert (reply.op, reply.xid, reply.flags, reply.giaddr, reply.chaddr) == (
        2,
        asked.xid,
        0x8000,
        asked.giaddr,
        asked.chaddr,
    )
    assert (reply.hops, reply.secs, reply.ciaddr, reply.yiaddr) == (0, 0, bytes(4), bytes(4))
    assert reply.options == {53: b"\2", 61: b"\0id"}
