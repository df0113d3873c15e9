"""resolv.conf, read and read again; which server is asked first."""

from __future__ import annotations

import os
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.service.dns_upstream import QUIET, Resolvers, Server, parse_resolv_conf


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("", []),
        ("nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ["192.0.2.1", "2001:db8::1"]),
        ("# nameserver 192.0.2.9\n;nameserver 192.0.2.8\nsearch a b\n\tnameserver\t192.0.2.1   \n", ["192.0.2.1"]),
        ("nameserver 192.0.2.1 # the first\nnameserver 192.0.2.1", ["192.0.2.1"]),
        ("nameserver fe80::1%eth0\noptions edns0 trust-ad", ["fe80::1%eth0"]),
        ("nameserver\nnameserver localhost\nnameserver 192.0.2\nNameserver 192.0.2.1", []),
        ("".join(f"nameserver 192.0.2.{x}\n" for x in range(20)), [f"192.0.2.{x}" for x in range(8)]),
        ("nameserver 127.0.0.53\r\n", ["127.0.0.53"]),
    ],
)
def test_parse(text, addresses):
    assert parse_resolv_conf(text) == addresses


@given(st.text(max_size=200).map(lambda text: text.replace("x", "nameserver 1.1.1.1")))
def test_any_text(text):
    assert all(Server(address, 53).family in {socket.AF_INET, socket.AF_INET6} for address in parse_resolv_conf(text))


def test_scope():
    server = Server("fe80::1%lo", 53)
    assert server.sockaddr == ("fe80::1", 53, 0, socket.if_nametoindex("lo"))
    assert Server("fe80::1%none", 53).sockaddr == ("fe80::1", 53, 0, 0)


class TestChanges:
    def test_one_look_a_second(self, tmp_path):
        path = tmp_path / "resolv.conf"
        path.write_text("nameserver 192.0.2.1\n")
        resolvers = Resolvers(path)
        assert resolvers.check(100.0)
        path.write_text("nameserver 192.0.2.2\n")
        assert not resolvers.check(100.9)
        assert resolvers.check(101.0)
        assert [server.text for server in resolvers.servers] == ["192.0.2.2"]

    def test_same_size_and_same_tick_of_the_clock(self, tmp_path):
        """Two writes that no time stamp tells apart: the second is found by reading again."""
        path = tmp_path / "resolv.conf"
        path.write_text("nameserver 192.0.2.1\n")
        stamp = time.time_ns()
        os.utime(path, ns=(stamp, stamp))
        resolvers = Resolvers(path)
        assert resolvers.check(100.0)
        path.write_text("nameserver 192.0.2.2\n")
        os.utime(path, ns=(stamp, stamp))
        assert resolvers.check(101.0)

    def test_a_settled_file_is_not_read_again(self, tmp_path):
        path = tmp_path / "resolv.conf"
        path.write_text("nameserver 192.0.2.1\n")
        os.utime(path, (1_000_000, 1_000_000))
        resolvers = Resolvers(path)
        assert resolvers.check(100.0)
        read = []
        resolvers._read = lambda: read.append(1) or ""
        for second in range(101, 110):
            assert not resolvers.check(float(second))
        assert not read

    def test_touched_but_equal_is_no_change(self, tmp_path):
        path = tmp_path / "resolv.conf"
        path.write_text("nameserver 192.0.2.1\n")
        resolvers = Resolvers(path)
        resolvers.check(100.0)
        generation, server = resolvers.generation, resolvers.servers[0]
        path.write_text("# again\nnameserver 192.0.2.1\n")
        assert not resolvers.check(101.0)
        assert resolvers.generation == generation
        assert resolvers.servers[0] is server

    def test_what_is_known_of_a_server_survives(self, tmp_path):
        path = tmp_path / "resolv.conf"
        path.write_text("nameserver 192.0.2.1\n")
        resolvers = Resolvers(path)
        resolvers.check(100.0)
        server = resolvers.servers[0]
        path.write_text("nameserver 192.0.2.2\nnameserver 192.0.2.1\n")
        assert resolvers.check(101.0)
        assert resolvers.servers[1] is server

    def test_gone_and_back_and_no_file(self, tmp_path):
        path = tmp_path / "resolv.conf"
        resolvers = Resolvers(path)
        assert resolvers.check(100.0)
        assert resolvers.servers == []
        assert not resolvers.check(101.0)
        path.symlink_to(tmp_path / "real")
        assert not resolvers.check(102.0)
        (tmp_path / "real").write_text("nameserver 192.0.2.1\n")
        assert resolvers.check(103.0)
        path.unlink()
        path.mkdir()
        assert resolvers.check(104.0)
        assert resolvers.servers == []


class TestOrder:
    def resolvers(self, tmp_path, count=3):
        path = tmp_path / "resolv.conf"
        path.write_text("".join(f"nameserver 192.0.2.{x}\n" for x in range(count)))
        resolvers = Resolvers(path)
        resolvers.check(0.0)
        return resolvers, resolvers.servers

    def test_as_in_the_file(self, tmp_path):
        resolvers, servers = self.resolvers(tmp_path)
        assert resolvers.order(1.0) == (servers, False)

    def test_a_quiet_server_is_last_then_on_trial_beside_the_first_good_one(self, tmp_path):
        resolvers, (a, b, c) = self.resolvers(tmp_path)
        a.silent(5.0, 6.0)
        assert resolvers.order(6.0) == ([b, c, a], False)
        assert resolvers.ranked() == [b, c, a]
        assert resolvers.order(6.0 + QUIET) == ([a, b, c], True)
        assert resolvers.order(6.0 + QUIET) == ([b, c, a], False)  # one trial at a time
        a.silent(6.0 + QUIET, 7.0 + QUIET)
        assert resolvers.order(7.0 + QUIET) == ([b, c, a], False)
        assert resolvers.order(8.0 + QUIET * 2) == ([a, b, c], True)
        a.heard(20.0)
        assert resolvers.order(30.0) == ([a, b, c], False)

    def test_a_slow_answer_is_no_silence_of_the_server(self, tmp_path):
        resolvers, servers = self.resolvers(tmp_path)
        servers[0].heard(5.5)  # it answered others after it was asked
        servers[0].silent(5.0, 6.0)
        assert resolvers.order(6.0) == (servers, False)
