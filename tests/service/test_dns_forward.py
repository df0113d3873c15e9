"""Upstream servers that are down, silent, slow, wrong or hostile."""

from __future__ import annotations

import asyncio
import itertools
import os

import dns.flags
import dns.message
import dns.rcode
import pytest

from openvmnet.service import dns_forward
from tests.service.dns_world import PRIMARY, SECONDARY, THIRD, answer, nothing, play, query


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Time-outs of a fifth, so that the tests are."""
    monkeypatch.setattr(dns_forward, "RETRY", 0.2)
    monkeypatch.setattr("openvmnet.service.dns_upstream.QUIET", 1.0)


def failure(rcode):
    def reply(asked):
        message = dns.message.make_response(asked)
        message.set_rcode(rcode)
        return message

    return reply


def addresses(message) -> list[str]:
    return [str(one) for rrset in message.answer for one in rrset]


def now() -> float:
    return asyncio.get_running_loop().time()


class Elapsed:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = now()

    def __call__(self) -> float:
        return now() - self._start


async def silence(world, address) -> None:
    world.upstreams[address].reply = lambda _asked: None


def test_one_down_the_next_at_once(tmp_path):
    async def scenario(world):
        await world.upstreams[PRIMARY].stop()
        elapsed = Elapsed()
        for number in range(5):
            assert addresses(await world.ask(f"n{number}.example.com")) == ["192.0.2.1"]
        assert elapsed() < 0.15
        (message,) = await world.ask_tcp(query("tcp.example.com"))
        assert addresses(message) == ["192.0.2.1"]

    play(scenario, tmp_path, upstreams=2)


def test_all_down_is_servfail_at_once(tmp_path):
    async def scenario(world):
        for address in (PRIMARY, SECONDARY):
            await world.upstreams[address].stop()
        elapsed = Elapsed()
        assert (await world.ask("a.example.com")).rcode() == dns.rcode.SERVFAIL
        (message,) = await world.ask_tcp(query("a.example.com"))
        assert message.rcode() == dns.rcode.SERVFAIL
        assert elapsed() < 0.15
        await world.upstreams[SECONDARY].start()
        assert addresses(await world.ask("a.example.com")) == ["192.0.2.1"]  # failures are not remembered

    play(scenario, tmp_path, upstreams=2)


def test_no_route_is_as_good_as_a_refusal(tmp_path):
    async def scenario(world):
        world.resolvers("255.255.255.255", PRIMARY)  # connect(2): EACCES
        elapsed = Elapsed()
        assert addresses(await world.ask("a.example.com")) == ["192.0.2.1"]
        assert elapsed() < 0.15

    play(scenario, tmp_path)


def test_silence_costs_one_query_its_time(tmp_path):
    async def scenario(world):
        await silence(world, PRIMARY)
        elapsed = Elapsed()
        assert addresses(await world.ask("a.example.com")) == ["192.0.2.1"]
        assert 0.15 < elapsed() < 0.5
        elapsed = Elapsed()
        for number in range(10):
            await world.ask(f"n{number}.example.com")
        assert elapsed() < 0.15  # the quiet server is not asked first any more
        assert len(world.upstreams[PRIMARY].asked) == 1

    play(scenario, tmp_path, upstreams=2)


def test_a_quiet_server_is_tried_again_at_nobodys_cost(tmp_path):
    async def scenario(world):
        first = world.upstreams[PRIMARY]
        await silence(world, PRIMARY)
        world.upstreams[SECONDARY].reply = lambda asked: answer(asked, "192.0.2.2")
        await world.ask("a.example.com")
        await asyncio.sleep(1.1)
        elapsed = Elapsed()
        await world.ask("b.example.com")
        assert elapsed() < 0.15
        assert len(first.asked) == 2
        await asyncio.sleep(0.3)  # the trial ends in silence
        await world.ask("c.example.com")
        assert len(first.asked) == 2
        # Back, and slower than the other: it is heard although its answer comes too late.
        first.reply = lambda asked: answer(asked, "192.0.2.1")
        first.delay = 0.05
        await asyncio.sleep(1.1)
        assert addresses(await world.ask("d.example.com")) == ["192.0.2.2"]
        await asyncio.sleep(0.1)
        assert addresses(await world.ask("e.example.com")) == ["192.0.2.1"]
        assert not any(exchange.open for _, exchange, _ in world.service._forwarder._timeouts if exchange.waiters == [])

    play(scenario, tmp_path, upstreams=2)


def test_all_silent_ends(tmp_path):
    async def scenario(world):
        for address in (PRIMARY, SECONDARY):
            await silence(world, address)
        elapsed = Elapsed()
        assert (await world.ask("a.example.com")).rcode() == dns.rcode.SERVFAIL
        assert 0.7 < elapsed() < 1.2
        assert len(world.upstreams[PRIMARY].asked) == len(world.upstreams[SECONDARY].asked) == 2
        assert len(world.service._forwarder) == 0

    play(scenario, tmp_path, upstreams=2)


def test_one_server_is_asked_again(tmp_path):
    """A lost datagram is not a lost question; each try has another port and another id."""

    async def scenario(world):
        upstream = world.upstream
        upstream.reply = lambda asked: answer(asked, "192.0.2.7") if len(upstream.asked) == 3 else None
        assert addresses(await world.ask("a.example.com")) == ["192.0.2.7"]
        assert len(set(upstream.sources)) == 3
        assert len({asked.id for asked in upstream.asked}) == 3

    play(scenario, tmp_path)


def test_a_late_answer_counts(tmp_path):
    async def scenario(world):
        world.upstreams[PRIMARY].delay = 0.3
        await silence(world, SECONDARY)
        elapsed = Elapsed()
        assert addresses(await world.ask("a.example.com")) == ["192.0.2.1"]
        assert 0.25 < elapsed() < 0.39

    play(scenario, tmp_path, upstreams=2)


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NOTIMP, dns.rcode.FORMERR])
def test_a_server_that_cannot_is_not_the_last_word(tmp_path, rcode):
    async def scenario(world):
        world.upstreams[PRIMARY].reply = failure(rcode)
        assert addresses(await world.ask("a.example.com")) == ["192.0.2.1"]
        (message,) = await world.ask_tcp(query("b.example.com"))
        assert addresses(message) == ["192.0.2.1"]
        world.upstreams[SECONDARY].reply = failure(dns.rcode.REFUSED)
        elapsed = Elapsed()
        assert (await world.ask("c.example.com")).rcode() == dns.rcode.REFUSED  # theirs, not a SERVFAIL of ours
        assert elapsed() < 0.15

    play(scenario, tmp_path, upstreams=2)


def test_a_failure_with_a_bare_header(tmp_path):
    async def scenario(world):
        world.upstream.reply = lambda asked: asked.to_wire()[:2] + b"\x81\x81" + bytes(8)
        message = await world.ask("a.example.com")
        assert message.rcode() == dns.rcode.FORMERR
        assert message.question

    play(scenario, tmp_path)


def test_no_such_name_is_an_answer(tmp_path):
    async def scenario(world):
        world.upstreams[PRIMARY].reply = nothing
        assert (await world.ask("a.example.com")).rcode() == dns.rcode.NXDOMAIN
        assert not world.upstreams[SECONDARY].asked

    play(scenario, tmp_path, upstreams=2)


def test_what_is_not_the_answer_is_ignored(tmp_path):
    async def scenario(world):
        def reply(asked):
            other = answer(query("evil.example.com", id=asked.id), "192.0.2.66")
            wrong_type = answer(query(asked.question[0].name, "TXT", id=asked.id), '"evil"', kind="TXT")
            wrong_id = answer(asked, "192.0.2.66")
            wrong_id.id ^= 1
            echo = asked
            torn = answer(asked, "192.0.2.66").to_wire()[:-3]
            return [other, wrong_type, wrong_id, echo, torn, b"x", os.urandom(40), answer(asked, "192.0.2.1")]

        world.upstream.reply = reply
        assert addresses(await world.ask("a.example.com")) == ["192.0.2.1"]
        assert world.stats["mismatched"] == 7
        assert (await world.ask("a.example.com")).answer
        assert world.stats["cached"] == 1

    play(scenario, tmp_path)


def test_an_answer_from_elsewhere_is_ignored(tmp_path):
    """Right id, right question, right port: but not the server that was asked."""

    async def scenario(world):
        forger = world.upstreams[THIRD]
        await forger.start()

        def reply(asked):
            where = world.upstream.sources[-1]
            forger._transport.sendto(answer(asked, "192.0.2.66").to_wire(), where)
            return None if len(world.upstream.asked) == 1 else answer(asked, "192.0.2.1")

        world.upstream.reply = reply
        assert addresses(await world.ask("a.example.com")) == ["192.0.2.1"]

    play(scenario, tmp_path)


def test_ports_and_ids_are_not_predictable(tmp_path):
    async def scenario(world):
        for number in range(200):
            await world.ask(f"n{number}.example.com")
        ports = [port for _, port in world.upstream.sources]
        ids = [asked.id for asked in world.upstream.asked]
        for numbers, spread in ((ports, 10_000), (ids, 30_000)):
            assert len(set(numbers)) > 190
            assert max(numbers) - min(numbers) > spread
            steps = [other - one for one, other in itertools.pairwise(numbers)]
            assert len(set(steps)) > 150

    play(scenario, tmp_path)


def test_exchanges_are_bounded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dns_forward, "MAX_EXCHANGES", 20)

    async def scenario(world):
        await silence(world, PRIMARY)
        sock = world.client()
        for number in range(50):
            sock.send(query(f"n{number}.example.com").to_wire())
        await asyncio.sleep(0.05)
        assert len(world.service._forwarder) == 20
        assert world.stats["dropped"] == 30
        await asyncio.sleep(1.0)
        assert len(world.service._forwarder) == 0
        assert not world.service._forwarder._clients
        assert world.service._forwarder._waiting == 0
        world.upstream.reply = lambda asked: answer(asked, "192.0.2.1")
        assert addresses(await world.ask("again.example.com")) == ["192.0.2.1"]

    play(scenario, tmp_path)


def test_no_descriptor_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(dns_forward, "RETRY", 0.03)

    async def scenario(world):
        await world.ask("warm.example.com")
        before = len(os.listdir("/proc/self/fd"))
        await silence(world, SECONDARY)
        replies = [answer, failure(2), lambda _: None, lambda asked: [asked, nothing(asked)]]
        for number in range(20):
            world.upstream.reply = replies[number % 4]
            await world.raw(query(f"n{number}.example.com").to_wire(), 6)
        for sock in world._socks:
            sock.close()
        await asyncio.sleep(0.5)
        assert len(os.listdir("/proc/self/fd")) <= before - 1

    play(scenario, tmp_path, upstreams=2)


def test_tcp_that_breaks_off(tmp_path):
    async def scenario(world):
        world.upstreams[PRIMARY].reply_tcp = lambda asked: []
        (message,) = await world.ask_tcp(query("a.example.com"))
        assert addresses(message) == ["192.0.2.1"]
        world.upstreams[PRIMARY].reply_tcp = lambda asked: answer(query("evil.example.com", id=asked.id), "192.0.2.66")
        (message,) = await world.ask_tcp(query("b.example.com"))
        assert addresses(message) == ["192.0.2.1"]

    play(scenario, tmp_path, upstreams=2)


def test_tcp_in_silence_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(dns_forward, "_TCP_EACH", 0.2)

    async def scenario(world):
        for upstream in list(world.upstreams.values())[:2]:
            upstream.reply_tcp = lambda asked: []
            upstream.delay = 0.6
        elapsed = Elapsed()
        (message,) = await world.ask_tcp(query("a.example.com"))
        assert message.rcode() == dns.rcode.SERVFAIL
        assert 0.3 < elapsed() < 0.8
        await asyncio.sleep(0.7)

    play(scenario, tmp_path, upstreams=2)


def test_an_answer_from_before_the_change_is_not_kept(tmp_path):
    """A question is on its way when the host changes its resolvers: who asked gets the answer, the cache does not."""

    async def scenario(world):
        world.upstream.delay = 0.15
        asking = asyncio.create_task(world.ask("a.example.com"))
        await asyncio.sleep(0.05)
        world.service._resolvers.generation += 1
        assert addresses(await asking) == ["192.0.2.1"]
        await world.ask("a.example.com")
        assert len(world.upstream.asked) == 2

    play(scenario, tmp_path)


def test_the_queries_that_go_out(tmp_path):
    async def scenario(world):
        await world.ask(query("A.example.com", flags=dns.flags.RD | dns.flags.CD))
        (asked,) = world.upstream.asked
        assert asked.flags == dns.flags.RD | dns.flags.CD
        assert asked.question[0].name.to_text() == "A.example.com."

    play(scenario, tmp_path)
