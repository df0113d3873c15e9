"""The name server as its clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openvmnet.service import dns as service
from openvmnet.service.dns_forward import MAX_PER_CLIENT
from tests.service.dns_world import PRIMARY, SECONDARY, answer, nothing, play, query

CHANGE = st.tuples(st.integers(0, 60), st.integers(0, 255), st.integers(0, 30))
"""How a query is broken: an octet's place, its new value, and how many are cut off."""


def rdata(message) -> list[str]:
    return [str(one) for rrset in message.answer for one in rrset]


class TestLocalNames:
    def test_forward_and_back(self, tmp_path):
        async def scenario(world):
            assert rdata(await world.ask("vm1.vmnet.internal")) == ["192.168.64.2"]
            assert rdata(await world.ask("VM1.Vmnet.Internal")) == ["192.168.64.2"]
            assert rdata(await world.ask("gateway.vmnet.internal")) == ["192.168.64.1"]
            assert rdata(await world.ask("2.64.168.192.in-addr.arpa", "PTR")) == ["vm1.vmnet.internal."]
            assert rdata(await world.ask("1.64.168.192.in-addr.arpa", "PTR")) == ["gateway.vmnet.internal."]
            assert (await world.ask("vm9.vmnet.internal")).rcode() == dns.rcode.NXDOMAIN
            empty = await world.ask("vm1.vmnet.internal", "AAAA")
            assert empty.rcode() == dns.rcode.NOERROR
            assert not empty.answer
            assert empty.authority[0].rdtype == dns.rdatatype.SOA
            assert not world.upstream.asked

        play(scenario, tmp_path)

    def test_never_stale(self, tmp_path):
        """An answer of the hot table does not outlive its name by a single query."""

        async def scenario(world):
            for number in range(2, 60):
                world.addresses["vm1"] = type(world.addresses["vm1"])(f"192.168.64.{number}")
                world.changes += 1
                for _ in range(3):
                    assert rdata(await world.ask("vm1.vmnet.internal")) == [f"192.168.64.{number}"]
            del world.addresses["vm1"]
            world.changes += 1
            assert (await world.ask("vm1.vmnet.internal")).rcode() == dns.rcode.NXDOMAIN
            assert world.stats["hot"] > 58

        play(scenario, tmp_path)

    def test_any_is_minimal(self, tmp_path):
        async def scenario(world):
            message = await world.ask("vm1.vmnet.internal", "ANY")
            assert len(message.answer) == 1
            foreign = await world.ask(query("www.example.com", "ANY"))
            assert foreign.flags & dns.flags.TC
            assert not foreign.answer
            assert not world.upstream.asked

        play(scenario, tmp_path)


class TestForwarding:
    def test_octet_for_octet(self, tmp_path):
        """Whatever the upstream's answer looks like, only its id and the case of the question change."""
        odd = struct.pack("!HHHHHH", 0, 0x8583, 1, 1, 0, 1)
        sent = []

        async def scenario(world):
            question = query("Www.eXample.com", "A", use_edns=0, payload=1232)
            tail = b"\xc0\x10" + struct.pack("!HHIH", 65280, 4, 77, 3) + b"odd"
            opt = b"\0" + struct.pack("!HHIH", 41, 4000, 0x8000, 8) + b"\xfd\xe9\0\4abcd"

            def reply(asked):
                wire = asked.to_wire()
                sent.append(wire[:2] + odd[2:] + wire[12:-11].lower() + tail + opt)
                return sent[-1]

            world.upstream.reply = reply
            got = await world.raw(question.to_wire())
            wire = question.to_wire()
            assert got == wire[:2] + odd[2:] + wire[12:-11] + tail + opt

        play(scenario, tmp_path)

    def test_the_cache_lowers_ttls_and_forgets(self, tmp_path):
        async def scenario(world):
            world.upstream.reply = lambda asked: answer(asked, "192.0.2.1", ttl=100)
            assert (await world.ask("a.example.com")).answer[0].ttl == 100
            for seconds, ttl in ((0, 100), (10, 90), (10, 80), (0, 80), (79, 1)):
                world.later(seconds)
                assert ttl - 1 <= (await world.ask("A.example.com")).answer[0].ttl <= ttl
            assert len(world.upstream.asked) == 1
            world.later(2)
            assert (await world.ask("a.example.com")).answer[0].ttl == 100
            assert len(world.upstream.asked) == 2

        play(scenario, tmp_path)

    def test_negative_answers_are_kept_as_long_as_their_soa_says(self, tmp_path):
        async def scenario(world):
            world.upstream.reply = lambda asked: nothing(asked, ttl=300, minimum=20)
            for _ in range(3):
                assert (await world.ask("no.example.com")).rcode() == dns.rcode.NXDOMAIN
            assert len(world.upstream.asked) == 1
            world.later(21)
            await world.ask("no.example.com")
            assert len(world.upstream.asked) == 2

        play(scenario, tmp_path)

    def test_failures_are_not_kept(self, tmp_path):
        async def scenario(world):
            def failure(asked):
                message = dns.message.make_response(asked)
                message.set_rcode(dns.rcode.SERVFAIL)
                return message

            world.upstream.reply = failure
            for number in (1, 2):
                assert (await world.ask("bad.example.com")).rcode() == dns.rcode.SERVFAIL
                assert len(world.upstream.asked) == number

        play(scenario, tmp_path)

    def test_mixed_case_comes_back(self, tmp_path):
        async def scenario(world):
            for name in ("www.example.com", "WWW.example.com", "wWw.ExAmPlE.cOm", "www.example.com"):
                for _ in range(2):
                    message = await world.ask(name)
                    assert message.question[0].name.to_text().rstrip(".") == name
            assert len(world.upstream.asked) == 1

        play(scenario, tmp_path)

    def test_same_questions_in_flight_are_one(self, tmp_path):
        async def scenario(world):
            world.upstream.delay = 0.2
            messages = await asyncio.gather(*(world.ask(name) for name in ["x.example.com", "X.example.com"] * 10))
            assert all(rdata(message) == ["192.0.2.1"] for message in messages)
            assert len(world.upstream.asked) == 1
            assert world.stats["coalesced"] == 19

        play(scenario, tmp_path)

    def test_a_query_sent_again_has_one_answer(self, tmp_path):
        async def scenario(world):
            world.upstream.delay = 0.2
            sock = world.client()
            for _ in range(3):
                sock.send(query("x.example.com", id=7).to_wire())
            assert (await world.receive(sock))[:2] == b"\0\7"
            await world.silent(sock)

        play(scenario, tmp_path)

    def test_too_long_for_udp_goes_by_tcp(self, tmp_path):
        async def scenario(world):
            whole = [f'"{"x" * 200}{number}"' for number in range(20)]

            def short(asked):
                message = dns.message.make_response(asked)
                message.flags |= dns.flags.TC
                return message

            world.upstream.reply = short
            world.upstream.reply_tcp = lambda asked: answer(asked, *whole, kind="TXT")
            message = await world.ask("long.example.com", "TXT")
            assert message.flags & dns.flags.TC
            (message,) = await world.ask_tcp(query("long.example.com", "TXT"))
            assert sorted(rdata(message)) == sorted(whole)
            assert len(world.upstream.asked_tcp) == 1
            # An answer that the cache has whole is still too long for UDP.
            message = await world.ask("long.example.com", "TXT")
            assert message.flags & dns.flags.TC
            assert not message.answer

        play(scenario, tmp_path)

    def test_answers_fit_what_the_client_takes(self, tmp_path):
        async def scenario(world):
            world.upstream.reply = lambda asked: answer(asked, *(f"192.0.2.{x}" for x in range(50)))
            for _ in range(2):
                for options in ({}, {"use_edns": 0, "payload": 600}, {"use_edns": 0, "payload": 1232}):
                    question = query("many.example.com", "A", **options)
                    data = await world.raw(question.to_wire())
                    message = dns.message.from_wire(data)
                    assert len(data) <= options.get("payload", 512)
                    assert bool(message.flags & dns.flags.TC) == (options.get("payload") != 1232)
                    assert len(rdata(message)) == (50 if options.get("payload") == 1232 else 0)
                    assert (message.edns == 0) == bool(options)

        play(scenario, tmp_path)

    def test_class_and_transfers_are_refused(self, tmp_path):
        async def scenario(world):
            chaos = query("version.bind", "TXT", rdclass="CH")
            assert (await world.ask(chaos)).rcode() == dns.rcode.REFUSED
            for kind in ("AXFR", "IXFR", "TKEY", "TSIG"):
                for name in ("vmnet.internal", "example.com"):
                    assert (await world.ask(name, kind)).rcode() == dns.rcode.REFUSED
            assert not world.upstream.asked

        play(scenario, tmp_path)

    def test_bad_version(self, tmp_path):
        async def scenario(world):
            message = await world.ask(query("www.example.com", use_edns=1))
            assert message.rcode() == dns.rcode.BADVERS
            assert message.edns == 0

        play(scenario, tmp_path)

    def test_no_option_of_the_client_goes_upstream(self, tmp_path):
        async def scenario(world):
            options = [
                dns.edns.CookieOption(b"12345678", b""),
                dns.edns.ECSOption("192.168.64.2", 32),
                dns.edns.NSIDOption(b""),
            ]
            await world.ask(query("www.example.com", use_edns=0, options=options))
            assert world.upstream.asked[0].edns == 0
            assert not world.upstream.asked[0].options

        play(scenario, tmp_path)


class TestHostility:
    def test_malformed(self, tmp_path):
        async def scenario(world):
            header = struct.pack("!HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0)
            for data in (header, header + b"\3ab", header + b"\xc0\x0c\0\1\0\1", header[:4] + b"\0\2" + header[6:]):
                assert await world.raw(data) == b"\x12\x34\x81\x81" + bytes(8)
            assert world.stats["formerr"] == 4

        play(scenario, tmp_path)

    def test_silence(self, tmp_path):
        async def scenario(world):
            sock = world.client()
            for data in (b"", b"x", b"x" * 11, answer(query("www.example.com"), "192.0.2.1").to_wire(), b"\xff" * 20):
                sock.send(data)
            await world.silent(sock)
            assert world.stats["ignored"] == 5
            assert not world.upstream.asked

        play(scenario, tmp_path)

    def test_other_opcodes(self, tmp_path):
        async def scenario(world):
            for opcode in (dns.opcode.IQUERY, dns.opcode.STATUS, dns.opcode.NOTIFY, dns.opcode.UPDATE):
                question = query("www.example.com")
                question.set_opcode(opcode)
                message = dns.message.from_wire(await world.raw(question.to_wire()))
                assert message.rcode() == dns.rcode.NOTIMP
                assert message.id == question.id

        play(scenario, tmp_path)

    @pytest.mark.parametrize("size", [4095, 4096, 4097, 65507])
    def test_a_query_of_any_size(self, tmp_path, size):
        async def scenario(world):
            data = query("vm1.vmnet.internal").to_wire()
            got = await world.raw(data + bytes(size - len(data)))
            assert got[3] & 15 in {dns.rcode.NOERROR, dns.rcode.FORMERR}
            assert not world.stats["failed"]

        play(scenario, tmp_path)

    def test_a_guest_fills_its_own_share_only(self, tmp_path, caplog):
        async def scenario(world):
            world.upstream.reply = lambda asked: None if "flood" in str(asked.question[0].name) else answer(asked)
            flooder, other = world.client("127.0.0.7"), world.client("127.0.0.8")
            for number in range(MAX_PER_CLIENT + 50):
                flooder.send(query(f"flood{number}.example.com").to_wire())
                if number % 50 == 0:
                    await asyncio.sleep(0.01)
            other.send(query("fine.example.com", "AAAA").to_wire())
            assert (await world.receive(other))[3] & 15 == 0
            assert world.stats["dropped"] == 50
            assert sum("more are dropped" in record.message for record in caplog.records) == 1

        play(scenario, tmp_path)

    def test_what_is_over_a_guests_budget_gets_silence(self, tmp_path):
        async def scenario(world):
            budget = world.service.budget
            budget.crowded = True
            budget.begin()
            budget.spend(int.from_bytes(bytes((127, 0, 0, 7))), 1.0)
            greedy, other = world.client("127.0.0.7"), world.client("127.0.0.8")
            greedy.send(query("vm1.vmnet.internal").to_wire())
            other.send(query("vm1.vmnet.internal").to_wire())
            assert (await world.receive(other))[3] & 15 == 0
            assert world.stats["over_budget"] == 1
            greedy.send(query("vm1.vmnet.internal").to_wire())  # by now an answer that costs nothing
            assert (await world.receive(greedy))[3] & 15 == 0

        play(scenario, tmp_path)

    def test_tables_have_bounds(self, tmp_path, monkeypatch):
        monkeypatch.setattr(service, "_HOT_ENTRIES", 10)

        async def scenario(world):
            for number in range(30):
                for _ in range(3):
                    await world.ask(f"n{number}.example.com")
            assert len(world.service._hot) <= 10
            for number in range(30):
                await world.ask(f"n{number}.vmnet.internal")
            assert len(world.service._hot) <= 10

        play(scenario, tmp_path)

    def test_a_mistake_of_ours_costs_one_query(self, tmp_path, caplog):
        async def scenario(world):
            def broken(_name):
                raise RuntimeError("a mistake")

            world.zone._forward = broken
            assert (await world.ask("vm1.vmnet.internal")).rcode() == dns.rcode.SERVFAIL
            assert (await world.ask("vm2.vmnet.internal")).rcode() == dns.rcode.SERVFAIL
            assert (await world.ask("www.example.com")).rcode() == dns.rcode.NOERROR
            assert world.stats["failed"] == 2
            assert sum("a mistake" in (record.exc_text or "") for record in caplog.records) == 1

        play(scenario, tmp_path)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.one_of(st.binary(max_size=80), CHANGE), min_size=1, max_size=40))
    def test_any_octets_get_one_answer_at_most(self, tmp_path, inputs):
        whole = query("vm1.vmnet.internal", use_edns=0).to_wire()

        async def scenario(world):
            world.upstream.reply = answer
            sock = world.client()
            sent = 0
            for one in inputs:
                if isinstance(one, tuple):
                    at, value, cut = one
                    data = bytearray(whole)
                    data[at % len(data)] = value
                    one = bytes(data[: len(data) - cut])
                sock.send(one)
                sent += 1
            got = 0
            with contextlib.suppress(TimeoutError):
                while data := await world.receive(sock, 0.05):
                    got += 1
                    assert len(data) >= 12
                    assert data[2] & 0x80
            assert got <= sent
            assert world.stats["failed"] == 0
            assert rdata(await world.ask("vm2.vmnet.internal")) == ["192.168.64.3"]

        play(scenario, tmp_path)


class TestSpeed:
    def test_many_at_once_from_many(self, tmp_path):
        """More queries than a batch has slots, of all kinds, each answered to its own sender."""

        async def scenario(world):
            socks = [world.client() for _ in range(50)]
            for _ in range(2):
                for number, sock in enumerate(socks):
                    for kind in ("vm1.vmnet.internal", f"n{number}.example.com", "x.local"):
                        sock.send(query(kind, id=number * 3 + 1).to_wire())
                for number, sock in enumerate(socks):
                    for _ in range(3):
                        data = await world.receive(sock)
                        assert int.from_bytes(data[:2], "big") == number * 3 + 1
            for sock in socks:
                await world.silent(sock, 0.001)
            assert world.stats["queries"] == 300
            assert world.stats["unsent"] == 0

        play(scenario, tmp_path)

    def test_the_hot_table_answers_what_it_knows(self, tmp_path):
        async def scenario(world):
            for _ in range(10):
                await world.ask("www.example.com", id=5)
                await world.ask("vm1.vmnet.internal", id=6)
            assert world.stats["hot"] == 8 + 9  # the first of each, and the cache's first
            assert world.stats["forwarded"] == 1

        play(scenario, tmp_path)


def test_a_network_without_a_way_out_asks_nobody(tmp_path):
    async def scenario(world):
        assert rdata(await world.ask("vm1.vmnet.internal")) == ["192.168.64.2"]
        asked = await world.ask("www.example.com"), *await world.ask_tcp(query("www.example.com", "A"))
        for reply in asked:
            assert reply.rcode() == dns.rcode.REFUSED
            assert not reply.answer
        assert not world.upstream.asked
        assert world.stats["refused"] == 2

    play(scenario, tmp_path, forwards=False)


def test_no_name_server_at_all(tmp_path):
    async def scenario(world):
        started = asyncio.get_running_loop().time()
        assert (await world.ask("www.example.com")).rcode() == dns.rcode.SERVFAIL
        (message,) = await world.ask_tcp(query("www.example.com"))
        assert message.rcode() == dns.rcode.SERVFAIL
        assert asyncio.get_running_loop().time() - started < 0.5
        assert rdata(await world.ask("vm1.vmnet.internal")) == ["192.168.64.2"]

    play(scenario, tmp_path, upstreams=0)


def test_resolv_conf_changes(tmp_path):
    """The change is seen within a second or so, and what the old servers said is forgotten."""

    async def scenario(world):
        world.upstreams[PRIMARY].reply = lambda asked: answer(asked, "192.0.2.1")
        world.upstreams[SECONDARY].reply = lambda asked: answer(asked, "192.0.2.2")
        world.resolvers(PRIMARY)
        assert rdata(await world.ask("www.example.com")) == ["192.0.2.1"]
        world.resolvers(SECONDARY)
        await asyncio.sleep(1.1)
        world.later(1)
        assert rdata(await world.ask("www.example.com")) == ["192.0.2.2"]
        world.resolv_conf.unlink()
        await asyncio.sleep(1.1)
        world.later(1)
        assert (await world.ask("www.example.com")).rcode() == dns.rcode.SERVFAIL
        replacement = tmp_path / "new"
        replacement.write_text(f"nameserver {PRIMARY}\n")
        replacement.rename(world.resolv_conf)
        await asyncio.sleep(1.1)
        world.later(1)
        assert rdata(await world.ask("www.example.com")) == ["192.0.2.1"]

    play(scenario, tmp_path, upstreams=2)
