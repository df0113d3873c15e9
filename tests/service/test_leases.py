from __future__ import annotations

import logging
import os
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Exhausted
from openvmnet.service.leases import Lease, LeaseBook, sanitise

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_700_000_000
MAC_A, MAC_B = b"\x52\x54\0\0\0\x0a", b"\x52\x54\0\0\0\x0b"


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ip(last: int) -> IPv4Address:
    return IPv4Address(f"192.168.64.{last}")


def give(
    book: LeaseBook,
    last: int,
    mac: bytes = MAC_A,
    *,
    client_id: bytes = b"",
    name: str = "",
    seconds: int = 100,
    port: int | None = None,
    now: float = NOW,
) -> Lease:
    lease = Lease(mac, client_id, ip(last), "", int(now) + seconds, port)
    book.grant(lease, name, now)
    return lease


def test_a_lease_is_found_by_mac_address_and_name(clock):
    book = LeaseBook(clock=clock)
    lease = give(book, 2, name="Web.example.org")
    assert book.by_mac(MAC_A) is book.by_ip(ip(2)) is lease
    assert book.by_name("web") == book.by_name("WEB") == ip(2)
    assert book.name_of(ip(2)) == "web"
    assert list(book) == [lease]
    assert book.by_mac(MAC_B) is book.by_ip(ip(3)) is book.by_name("db") is book.name_of(ip(3)) is None


def test_a_lease_under_a_neighbours_mac_is_not_taken_for_the_neighbours(clock):
    book = LeaseBook(clock=clock)
    own = give(book, 2, port=1)
    forged = give(book, 3, client_id=b"\xffforged", port=2)
    assert book.by_mac(MAC_A) is forged
    assert book.by_mac(MAC_A, 1) is own
    assert book.by_mac(MAC_A, 2) is forged
    assert book.by_mac(MAC_A, 3) is None


def test_an_expired_lease_is_remembered_but_not_found(clock):
    book = LeaseBook(clock=clock)
    lease = give(book, 2, name="web")
    clock.now += 100
    assert book.by_mac(MAC_A) is book.by_ip(ip(2)) is book.by_name("web") is None
    assert list(book) == []
    book.sweep(clock.now)
    assert list(book.remembered()) == [lease]
    assert book.find(MAC_A, b"", None, clock.now) is lease
    assert len(book) == 1
    assert book.active_count() == 0


def test_a_gone_mac_ends_its_lease_and_keeps_its_address(clock):
    book = LeaseBook(clock=clock)
    give(book, 2, name="web")
    other = give(book, 3, MAC_B)
    book.release_mac(MAC_A)
    assert book.by_mac(MAC_A) is None
    assert book.by_name("web") is None
    assert list(book) == [other]
    again = book.find(MAC_A, b"", None, NOW)
    assert again is not None
    assert again.ip == ip(2)


def test_a_gone_port_ends_every_lease_that_came_through_it(clock):
    book = LeaseBook(clock=clock)
    give(book, 2, port=1)
    give(book, 3, MAC_B, port=1)
    other = give(book, 4, b"\x52\x54\0\0\0\x0c", port=2)
    book.release_port(1)
    assert list(book) == [other]
    assert set(book.ports()) == {2}


# Names.


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("web", "web"),
        ("Web.Example.ORG", "web"),
        ("my_host 1", "my-host-1"),
        ("-a-", "a"),
        ("", ""),
        (".", ""),
        ("***", ""),
        ("\u00fcber", "ber"),
        ("a" * 80, "a" * 59),
        ("a" * 58 + "--b", "a" * 58),
    ],
)
def test_names_become_ldh_labels(name, label):
    assert sanitise(name) == label


@given(st.text())
def test_any_name_becomes_a_label_or_nothing(name):
    label = sanitise(name)
    assert len(label) <= 59
    assert all(character in "abcdefghijklmnopqrstuvwxyz0123456789-" for character in label)
    assert not label.startswith("-")
    assert not label.endswith("-")
    assert sanitise(label) == label


def test_a_second_vm_of_the_same_name_gets_a_number(clock):
    book = LeaseBook(clock=clock)
    assert give(book, 2, name="web").hostname == "web"
    assert give(book, 3, MAC_B, name="web").hostname == "web-2"
    assert give(book, 4, b"\x52\x54\0\0\0\x0c", name="web").hostname == "web-3"
    assert book.by_name("web-2") == ip(3)


def test_a_vm_keeps_its_number_and_gives_it_back(clock):
    book = LeaseBook(clock=clock)
    give(book, 2, name="web")
    second = give(book, 3, MAC_B, name="web")
    book.release_mac(MAC_A)
    book.forget(second)
    renewed = Lease(MAC_B, b"", ip(3), second.hostname, NOW + 200, None)
    book.grant(renewed, "web", NOW)
    assert renewed.hostname == "web-2"
    assert give(book, 2, name="web").hostname == "web"


def test_a_name_follows_the_vm_that_is_there(clock):
    book = LeaseBook(clock=clock)
    give(book, 2, name="web")
    book.release_mac(MAC_A)
    assert give(book, 3, MAC_B, name="web").hostname == "web"


@pytest.mark.parametrize("name", ["gateway", "localhost", "Gateway.vmnet.internal"])
def test_names_of_the_network_itself_are_not_to_be_had(clock, name):
    assert give(LeaseBook(clock=clock), 2, name=name).hostname == sanitise(name) + "-2"


def test_after_99_of_a_name_there_is_none(clock):
    book = LeaseBook(clock=clock)
    names = [give(book, last, bytes([2, 0, 0, 0, 0, last]), name="web").hostname for last in range(2, 103)]
    assert len(set(names[:99])) == 99
    assert names[99:] == ["", ""]


def test_the_generation_changes_with_names_and_with_their_expiry(clock):
    book = LeaseBook(clock=clock)
    numbers = [book.generation()]
    give(book, 2, name="web")
    numbers.append(book.generation())
    clock.now += 100
    numbers.append(book.generation())
    assert len(set(numbers)) == 3
    assert book.generation() == numbers[-1]


# Who a client is.


def test_a_client_identifier_comes_before_the_mac(clock):
    book = LeaseBook(clock=clock)
    one = give(book, 2, client_id=b"\xffone")
    two = give(book, 3, client_id=b"\xfftwo")
    assert book.find(MAC_A, b"\xffone", None, NOW) is one
    assert book.find(MAC_A, b"\xfftwo", None, NOW) is two
    assert book.find(MAC_B, b"\xfftwo", None, NOW) is two
    assert book.find(MAC_A, b"\xffnew", None, NOW) is None


def test_one_machine_with_and_without_identifier_is_one_client(clock):
    book = LeaseBook(clock=clock)
    firmware = give(book, 2)
    assert book.find(MAC_A, b"\xffid", None, NOW) is firmware
    book = LeaseBook(clock=clock)
    system = give(book, 2, client_id=b"\xffid")
    assert book.find(MAC_A, b"", None, NOW) is system


def test_a_clone_behind_another_port_is_another_client(clock):
    book = LeaseBook(clock=clock)
    original = give(book, 2, client_id=b"\xffid", port=1)
    assert book.find(MAC_B, b"\xffid", 2, NOW) is None
    assert book.find(MAC_A, b"", 2, NOW) is None
    assert book.find(MAC_B, b"\xffid", 1, NOW) is original
    book.release_port(1)
    assert book.find(MAC_A, b"\xffid", 2, NOW) is original


def test_of_two_bindings_of_an_identifier_the_own_macs_is_found(clock):
    book = LeaseBook(clock=clock)
    one = give(book, 2, MAC_A, client_id=b"\xffid", port=1)
    two = give(book, 3, MAC_B, client_id=b"\xffid", port=2)
    book.release_port(1)
    book.release_port(2)
    assert book.find(MAC_A, b"\xffid", 5, NOW) is one
    assert book.find(MAC_B, b"\xffid", 6, NOW) is two


# Bounds.


def test_a_full_book_forgets_what_ended_longest_ago(clock):
    book = LeaseBook(clock=clock, bound=3)
    for last in (2, 3, 4):
        give(book, last, bytes([2, 0, 0, 0, 0, last]))
    book.release_mac(bytes([2, 0, 0, 0, 0, 3]))
    book.release_mac(bytes([2, 0, 0, 0, 0, 2]))
    give(book, 5, bytes([2, 0, 0, 0, 0, 5]))
    assert book.at(int(ip(3))) is None
    assert book.at(int(ip(2))) is not None
    give(book, 6, bytes([2, 0, 0, 0, 0, 6]))
    assert len(book) == 3
    with pytest.raises(Exhausted, match="3 active leases"):
        give(book, 7, bytes([2, 0, 0, 0, 0, 7]))


def test_forgotten_bindings_leave_no_index_behind(clock):
    book = LeaseBook(clock=clock)
    for last in range(2, 100):
        book.forget(give(book, last, bytes([2, 0, 0, 0, 0, last]), client_id=b"\xff%d" % last, name="n", port=last))
    for table in (book._leases, book._lines, book._index, book._names, book._held, book._remembered):
        assert not table


# The file.


def stored(book: LeaseBook) -> None:
    assert book.file is not None
    book.file.write(book.snapshot())


def test_a_book_comes_back_from_its_file(tmp_path: Path, clock):
    path = tmp_path / "leases.json"
    book = LeaseBook(path, clock=clock)
    give(book, 2, name="web", client_id=b"\xffid")
    give(book, 3, MAC_B, seconds=1, name="db")
    stored(book)
    assert not book.dirty
    clock.now += 50
    again = LeaseBook(path, clock=clock)
    assert list(again) == [Lease(MAC_A, b"\xffid", ip(2), "web", NOW + 100, None)]
    assert [lease.ip for lease in again.remembered()] == [ip(3)]
    assert again.by_name("web") == ip(2)
    assert again.by_name("db") is None


def test_the_file_is_json_with_a_line_per_lease_for_the_owner_alone(tmp_path: Path, clock):
    path = tmp_path / "leases.json"
    book = LeaseBook(path, clock=clock)
    give(book, 2, name="web", port=5)
    stored(book)
    assert path.stat().st_mode & 0o777 == 0o600
    assert msgspec.json.decode(path.read_bytes()) == {
        "version": 1,
        "leases": [
            {"ip": "192.168.64.2", "mac": "52:54:00:00:00:0a", "expires": NOW + 100, "hostname": "web", "port": 5}
        ],
    }
    assert os.listdir(tmp_path) == ["leases.json"]


def test_leases_of_ports_that_did_not_live_on_have_ended(tmp_path: Path, clock):
    path = tmp_path / "leases.json"
    book = LeaseBook(path, clock=clock)
    give(book, 2, port=1)
    give(book, 3, MAC_B, port=2)
    stored(book)
    again = LeaseBook(path, clock=clock, live_ports={2})
    assert [(lease.ip, lease.port) for lease in again] == [(ip(3), 2)]
    assert len(again) == 2
    unknown = LeaseBook(path, clock=clock)
    assert sorted((lease.ip, lease.port) for lease in unknown) == [(ip(2), None), (ip(3), None)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version":2,"leases":[]}',
        b'{"version":1}',
        b'{"version":1,"leases":[{"ip":"192.168.64.300","mac":"52:54:00:00:00:0a","expires":1}]}',
        b'{"version":1,"leases":[{"ip":"192.168.64.3","mac":"no","expires":1}]}',
        b'{"version":1,"leases":[{"ip":"192.168.64.3","mac":"52","expires":"soon"}]}',
        b"\xff\xfe\x00" * 100,
        b"[" * 100_000,
    ],
)
def test_a_damaged_or_foreign_file_is_set_aside(tmp_path: Path, clock, caplog, content):
    path = tmp_path / "leases.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        book = LeaseBook(path, clock=clock)
    assert len(book) == 0
    assert len(caplog.records) == 1
    assert (tmp_path / "leases.json.damaged").read_bytes() == content
    give(book, 2)
    stored(book)
    assert len(LeaseBook(path, clock=clock)) == 1


def test_a_directory_in_the_files_place_is_not_fatal(tmp_path: Path, clock, caplog):
    (tmp_path / "leases.json").mkdir()
    assert len(LeaseBook(tmp_path / "leases.json", clock=clock)) == 0
    assert len(caplog.records) == 1


def test_two_records_of_one_address_leave_the_later(tmp_path: Path, clock):
    path = tmp_path / "leases.json"
    path.write_bytes(
        b'{"version":1,"leases":[{"ip":"192.168.64.3","mac":"02:00:00:00:00:01","expires":1700000050},'
        b'{"ip":"192.168.64.3","mac":"02:00:00:00:00:02","expires":1700000040}]}'
    )
    book = LeaseBook(path, clock=clock)
    assert [lease.mac[-1] for lease in book] == [1]
    assert len(book) == 1


def test_no_more_than_the_bound_is_loaded(tmp_path: Path, clock):
    path = tmp_path / "leases.json"
    book = LeaseBook(path, clock=clock)
    for last in range(2, 12):
        give(book, last, bytes([2, 0, 0, 0, 0, last]), seconds=last)
    stored(book)
    small = LeaseBook(path, clock=clock, bound=4)
    assert sorted(int(lease.ip) & 255 for lease in small) == [8, 9, 10, 11]


def test_a_change_is_told_once_until_it_is_written(clock):
    book = LeaseBook(clock=clock)
    told = []
    book.on_change = lambda: told.append(book.dirty)
    give(book, 2)
    give(book, 3, MAC_B)
    assert told == [True]
    book.snapshot()
    book.release_mac(MAC_A)
    assert told == [True, True]
    book.snapshot()
    book.release_mac(MAC_A)
    assert told == [True, True]
