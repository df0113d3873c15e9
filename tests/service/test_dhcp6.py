"""The DHCPv6 server and its book, message by message."""

from __future__ import annotations

import logging
from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.service.dhcp6 import Dhcp6Config, Dhcp6Server, interface_mac
from openvmnet.service.leases6 import DECLINE_TIME, MAX_PER_PORT, LeaseBook6
from openvmnet.wire import dhcp6
from openvmnet.wire.dhcp6 import Address, Fqdn, Ia, Message

PREFIX = IPv6Network("fd00:1122:3344::/64")
GATEWAY_MAC = bytes.fromhex("5a0000000001")
SERVER = dhcp6.duid_ll(GATEWAY_MAC)
SOURCE = IPv6Address("fe80::5054:ff:fe12:3456").packed
MAC = bytes.fromhex("525400123456")
DUID = b"\0\4" + bytes(range(16))
IAID = b"\0\0\0\1"
DAY = 86400


class Setting:
    """A server, and a clock that a test turns."""

    def __init__(self, path=None, **options) -> None:
        self.now = 1000.0
        self.config = Dhcp6Config(PREFIX, GATEWAY_MAC, (PREFIX[1],))
        first, last = options.pop("pool", self.config.pool)
        self.book = LeaseBook6(first, last, path, clock=lambda: self.now, **options)
        self.server = Dhcp6Server(self.config, self.book)

    def ask(self, kind, *ias, duid=DUID, server=None, port=7, source=SOURCE, **options) -> Message | None:
        found = [(dhcp6.CLIENT_ID, duid)] if duid is not None else []
        found += [(dhcp6.SERVER_ID, server)] if server is not None else []
        found += [(dhcp6.IA_NA, dhcp6.encode_ia(ia)) for ia in ias]
        found += [(getattr(dhcp6, name.upper()), value) for name, value in options.items()]
        reply = self.server.handle(dhcp6.build(Message(kind, b"abc", found)), source=source, port=port, now=self.now)
        if reply is None:
            return None
        self.commit = reply.commit
        answer = dhcp6.parse(reply.payload)
        assert answer.transaction == b"abc"
        assert answer.duid(dhcp6.SERVER_ID) == SERVER
        return answer

    def lease(self, **options) -> Ia:
        answer = self.ask(dhcp6.REQUEST, Ia(options.pop("iaid", IAID)), server=SERVER, **options)
        (ia,) = answer.ias()
        return ia


@pytest.fixture
def setting():
    return Setting()


def status(message):
    value = message.get(dhcp6.STATUS_CODE)
    return None if value is None else dhcp6.decode_status(value)[0]


def test_the_four_messages(setting):
    offer = setting.ask(dhcp6.SOLICIT, Ia(IAID))
    assert offer.type == dhcp6.ADVERTISE
    assert offer.get(dhcp6.PREFERENCE) == b"\xff"
    assert not setting.commit
    (offered,) = offer.ias()
    assert len(setting.book) == 0
    reply = setting.ask(dhcp6.REQUEST, offered, server=SERVER)
    assert (reply.type, setting.commit) == (dhcp6.REPLY, True)
    (given_ia,) = reply.ias()
    assert given_ia == offered
    (address,) = given_ia.addresses
    assert (address.preferred, address.valid, given_ia.t1, given_ia.t2) == (DAY, DAY, DAY // 2, DAY * 4 // 5)
    assert IPv6Address(address.address) in PREFIX
    assert reply.get(dhcp6.DNS_SERVERS) == PREFIX[1].packed
    assert reply.get(dhcp6.CLIENT_ID) == DUID


def test_rapid_commit_is_one_exchange(setting):
    reply = setting.ask(dhcp6.SOLICIT, Ia(IAID), rapid_commit=b"")
    assert (reply.type, setting.commit, reply.get(dhcp6.RAPID_COMMIT)) == (dhcp6.REPLY, True, b"")
    assert len(list(setting.book)) == 1


def test_only_what_was_requested_is_told(setting):
    reply = setting.ask(dhcp6.SOLICIT, Ia(IAID), oro=dhcp6.DOMAIN_LIST.to_bytes(2, "big"))
    assert reply.get(dhcp6.DNS_SERVERS) is None
    assert reply.get(dhcp6.DOMAIN_LIST) == b"\x05vmnet\x08internal\0"


def test_information_without_an_address(setting):
    reply = setting.ask(dhcp6.INFORMATION_REQUEST, duid=None)
    assert reply.get(dhcp6.DNS_SERVERS) == PREFIX[1].packed
    assert reply.get(dhcp6.INFORMATION_REFRESH_TIME) == DAY.to_bytes(4, "big")
    assert setting.ask(dhcp6.INFORMATION_REQUEST, Ia(IAID)) is None


def test_renewing_and_rebinding_lengthen_the_lease(setting):
    before = setting.lease()
    for kind, server in ((dhcp6.RENEW, SERVER), (dhcp6.REBIND, None)):
        setting.now += 1000
        (ia,) = setting.ask(kind, before, server=server).ias()
        assert ia == before
        (lease,) = setting.book
        assert lease.expires == int(setting.now) + DAY


def test_an_address_of_elsewhere_is_taken_back(setting):
    foreign = Address(bytes.fromhex("fd99") + bytes(14), 5, 5)
    (ia,) = setting.ask(dhcp6.REBIND, Ia(IAID, addresses=(foreign,))).ias()
    assert {(one.address == foreign.address): one.valid for one in ia.addresses} == {False: DAY, True: 0}


def test_a_client_that_comes_with_a_free_address_keeps_it(setting):
    wanted = PREFIX[0x12345].packed
    (ia,) = setting.ask(dhcp6.RENEW, Ia(IAID, addresses=(Address(wanted, 5, 5),)), server=SERVER).ias()
    assert [one.address for one in ia.addresses] == [wanted]


def test_confirm(setting):
    here, elsewhere = Address(PREFIX[0x10005].packed, 0, 0), Address(bytes.fromhex("fd99") + bytes(14), 0, 0)
    assert status(setting.ask(dhcp6.CONFIRM, Ia(IAID, addresses=(here,)))) == dhcp6.SUCCESS
    assert status(setting.ask(dhcp6.CONFIRM, Ia(IAID, addresses=(here, elsewhere)))) == dhcp6.NOT_ON_LINK
    assert setting.ask(dhcp6.CONFIRM, Ia(IAID)) is None


def test_released_is_remembered(setting):
    ia = setting.lease()
    assert status(setting.ask(dhcp6.RELEASE, ia, server=SERVER)) == dhcp6.SUCCESS
    assert list(setting.book) == []
    assert setting.lease() == ia
    (answer,) = setting.ask(dhcp6.RELEASE, Ia(b"\0\0\0\2", addresses=ia.addresses), server=SERVER).ias()
    assert answer.status[0] == dhcp6.NO_BINDING
    assert len(list(setting.book)) == 1


def test_declined_is_kept_back_for_a_while(setting):
    ia = setting.lease()
    setting.ask(dhcp6.DECLINE, ia, server=SERVER)
    other = setting.lease()
    assert other.addresses != ia.addresses
    setting.ask(dhcp6.RELEASE, other, server=SERVER)
    setting.now += DECLINE_TIME + 1
    assert setting.lease(duid=DUID + b"x") != ia


def test_messages_for_others_and_without_identifiers_are_passed_over(setting):
    assert setting.ask(dhcp6.REQUEST, Ia(IAID), server=SERVER + b"x") is None
    assert setting.ask(dhcp6.SOLICIT, Ia(IAID), server=SERVER) is None
    assert setting.ask(dhcp6.REQUEST, Ia(IAID)) is None
    assert setting.ask(dhcp6.SOLICIT, Ia(IAID), duid=None) is None
    assert setting.ask(dhcp6.ADVERTISE, Ia(IAID)) is None
    assert setting.server.handle(b"\x0c" + bytes(40), source=SOURCE, port=7, now=setting.now) is None
    assert list(setting.book) == []


def test_no_prefixes(setting):
    reply = setting.ask(dhcp6.SOLICIT, Ia(IAID), ia_pd=b"\0\0\0\5" + bytes(8))
    (ia,) = reply.ias(dhcp6.IA_PD)
    assert ia.status[0] == dhcp6.NO_PREFIX_AVAIL
    assert reply.ias()[0].addresses


def test_the_name_of_a_client(setting):
    option = dhcp6.encode_fqdn(Fqdn("Alpha.example.org.", server_updates=True))
    reply = setting.ask(dhcp6.REQUEST, Ia(IAID), server=SERVER, client_fqdn=option)
    assert reply.fqdn() == Fqdn("alpha.vmnet.internal.", server_updates=True)
    assert setting.book.named("alpha").mac == MAC
    # Another VM cannot have it.
    setting.ask(dhcp6.REQUEST, Ia(IAID), server=SERVER, client_fqdn=option, port=8, source=bytes(16), duid=DUID + b"x")
    assert setting.book.named("alpha").mac == MAC


def test_clones_have_addresses_of_their_own():
    setting = Setting()
    setting.server = Dhcp6Server(setting.config, setting.book, lambda port: bytes([2, 0, 0, 0, 0, port]))
    addresses = {setting.lease(port=port).addresses[0].address for port in (7, 8, 9)}
    assert len(addresses) == 3
    assert setting.lease(port=8).addresses[0].address in addresses
    assert len(list(setting.book)) == 3


def test_a_small_pool_says_once_that_it_is_empty(caplog):
    setting = Setting(pool=(PREFIX[0x10000], PREFIX[0x10003]))
    with caplog.at_level(logging.WARNING):
        given_addresses = {setting.lease(iaid=bytes([0, 0, 0, one])).addresses[0].address for one in range(4)}
        assert len(given_addresses) == 4
        for one in range(4, 8):
            assert setting.lease(iaid=bytes([0, 0, 0, one])).status[0] == dhcp6.NO_ADDRS_AVAIL
        offer = setting.ask(dhcp6.SOLICIT, Ia(b"\0\0\0\x09"))
    assert status(offer) == dhcp6.NO_ADDRS_AVAIL
    assert len(caplog.records) == 1


def test_a_port_gets_its_share_and_no_more():
    setting = Setting()
    setting.server.port_added(7)
    for one in range(MAX_PER_PORT + 20):
        setting.now += 1
        setting.lease(iaid=one.to_bytes(4, "big"))
    assert len(list(setting.book)) == MAX_PER_PORT
    assert setting.lease(port=8, duid=DUID + b"x").addresses
    setting.server.port_gone(7)
    assert len(list(setting.book)) == 1


def test_a_flood_is_not_heard():
    setting = Setting()
    for _ in range(1000):
        setting.ask(dhcp6.SOLICIT, Ia(IAID))
    assert setting.server.counters["advertise"] <= 201
    assert setting.server.counters["limited"] >= 799


def test_the_book_survives_a_killed_process(tmp_path):
    path = tmp_path / "leases6.json"
    first = Setting(path, live_ports={7, 8})
    one, other = first.lease(), first.lease(port=8, duid=DUID + b"x")
    first.book.file.write(first.book.snapshot())
    again = Setting(path, live_ports={7})
    assert {lease.ip.packed for lease in again.book} == {one.addresses[0].address}
    assert again.lease() == one
    # The other's port has gone meanwhile; its address is remembered, also under another number.
    assert again.lease(port=9, duid=DUID + b"x") == other
    path.write_text("no leases")
    assert len(Setting(path).book) == 0
    assert path.with_name("leases6.json.damaged").exists()


def test_expired_is_remembered(setting):
    ia = setting.lease()
    setting.now += DAY + 1
    setting.book.sweep(setting.now)
    assert list(setting.book) == []
    assert setting.lease() == ia


def test_the_mac_of_a_link_local_address():
    assert interface_mac(SOURCE) == MAC
    assert interface_mac(PREFIX[1].packed) is None


kinds = st.sampled_from([1, 3, 4, 5, 6, 8, 9, 11])
messages = st.tuples(kinds, st.integers(0, 5), st.integers(7, 9), st.booleans(), st.integers(0, 4000))


@given(st.lists(messages, max_size=40))
def test_no_address_is_anybody_elses(steps):
    setting = Setting(pool=(PREFIX[0x10000], PREFIX[0x10007]))
    for kind, who, port, named, later in steps:
        setting.now += later
        lease = next((one for one in setting.book if one.client.iaid == bytes([0, 0, 0, who])), None)
        ia = Ia(bytes([0, 0, 0, who]), addresses=(Address(lease.ip.packed, 0, 0),) if lease else ())
        setting.ask(kind, *([ia] if kind != 11 else []), port=port, server=SERVER if named else None)
        active = list(setting.book)
        assert len({one.ip for one in active}) == len(active) <= 8
        assert len({one.client.key for one in active}) == len(active)
        assert all(PREFIX[0x10000] <= one.ip <= PREFIX[0x10007] for one in active)
        book = setting.book
        assert book._clients.keys() == {one.client.key for one in book._addresses.values()}
        assert sum(book._held.values()) == len(book._active) <= len(book._addresses)


@given(st.binary(max_size=120), kinds)
def test_any_message_is_survived(data, kind):
    setting = Setting()
    for payload in (data, bytes([kind]) + b"abc" + data):
        setting.server.handle(payload, source=SOURCE, port=None, now=setting.now)
