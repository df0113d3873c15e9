"""The server under any sequence of what guests may do: a model keeps what each guest believes to have."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from openvmnet.service.dhcp import DhcpConfig, DhcpServer
from openvmnet.service.leases import Lease, LeaseBook
from openvmnet.wire import dhcp4
from tests.service.dhcp_guest import GATEWAY, Guest, packed

POOL = [f"192.168.64.{last}" for last in range(2, 22)]
PORTS = (1, 2, 3)
CONFIG = DhcpConfig(
    gateway=IPv4Address(GATEWAY),
    prefixlen=24,
    first=IPv4Address(POOL[0]),
    last=IPv4Address(POOL[-1]),
    gateway_mac=b"\x5a\0\0\0\0\1",
    rate=1_000_000,
    lease_time=3600,
)
GUESTS = st.integers(0, 35)
ADDRESSES = st.sampled_from([*POOL, GATEWAY, "192.168.64.200", "10.0.0.5"])


@dataclass
class Belief:
    """What a guest thinks it has; `until` by the last ACK."""

    ip: str
    until: float


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1_700_000_000.0
        self.book = LeaseBook(clock=lambda: self.now)
        self.kept: dict[int, str] = {}
        self.guests: list[Guest] = []
        self.start()
        # Of each port's twelve guests two have the identifier of a guest behind another port: cloned disks.
        self.guests = [
            Guest(
                self.server,
                b"\x52\x54\0\0\0" + bytes([number]),
                PORTS[number % 3],
                b"\xffclone%d" % (number // 3) if number < 6 else b"\xff%d" % number if number % 2 else b"",
            )
            for number in range(36)
        ]
        self.beliefs: dict[int, Belief] = {}
        self.offers: dict[int, str] = {}
        self.statics: dict[str, float] = {}

    def start(self) -> None:
        self.server = DhcpServer(CONFIG, self.book)
        for port in PORTS:
            self.server.port_added(port)
        for number, ip in self.kept.items():
            self.tell(number, ip)

    def tell(self, number: int, ip: str) -> None:
        self.server.reserve(IPv4Address(ip), self.guests[number].mac, self.guests[number].port)

    def holders(self, ip: str) -> list[int]:
        return [n for n, belief in self.beliefs.items() if belief.ip == ip and belief.until > self.now]

    def request(self, number: int, ip: str, how: str) -> None:
        """Send a REQUEST and judge the answer."""
        guest = self.guests[number]
        guest.server = self.server
        self.book.sweep(self.now)
        held = {port: self.book.held(port) for port in PORTS}
        holder = self.book.by_ip(IPv4Address(ip))
        own = self.book.find(guest.mac, guest.client_id, guest.port, self.now)
        evicted = self.server.counters["evicted"]
        answer = getattr(guest, how)(ip, self.now)
        assert answer is not None, "an authoritative server always answers a REQUEST for an address"
        if answer.type() == dhcp4.NAK:
            kept = self.kept.get(number, ip)
            assert kept != ip or number not in self.holders(ip), "a NAK for what the guest holds"
            assert self.kept.get(number) != ip, "a NAK for what is kept for the guest"
            self.beliefs.pop(number, None)
            return
        assert str(IPv4Address(answer.yiaddr)) == ip
        assert ip in POOL
        if number in self.kept:
            assert ip == self.kept[number], "another address than what is kept for the guest"
        else:
            assert ip not in self.kept.values(), "an address that is kept for another"
            assert self.statics.get(ip, 0) <= self.now, "an address that somebody else uses"
        if holder is None or holder is own:
            assert self.server.counters["evicted"] == evicted
            assert self.holders(ip) in ([], [number])
        else:
            assert how == "select"
            assert self.server.counters["evicted"] == evicted + 1
            assert held[holder.port] * len(PORTS) > len(POOL), "evicted from a port within its share"
            assert held[holder.port] > held[guest.port]
            for other in self.holders(ip):
                del self.beliefs[other]
        self.beliefs[number] = Belief(ip, self.now + 3600)

    @rule(number=GUESTS, asked=st.none() | ADDRESSES)
    def discover(self, number: int, asked: str | None) -> None:
        guest = self.guests[number]
        guest.server = self.server
        offered = guest.discover(self.now, {50: packed(asked)} if asked else {})
        if offered is None:
            assert number not in self.beliefs or self.beliefs[number].until <= self.now
            assert number not in self.kept
            return
        self.offers[number] = offered
        if number in self.kept:
            assert offered == self.kept[number]
            return
        assert offered in POOL
        assert offered not in self.kept.values()
        assert self.statics.get(offered, 0) <= self.now
        belief = self.beliefs.get(number)
        if belief is not None and belief.until > self.now:
            assert offered == belief.ip, "a guest is offered what it has"

    @rule(number=GUESTS)
    def select(self, number: int) -> None:
        if number in self.offers:
            self.request(number, self.offers.pop(number), "select")

    @rule(number=GUESTS)
    def lease(self, number: int) -> None:
        self.discover(number, None)
        self.select(number)

    @rule(port=st.sampled_from(PORTS))
    def crowd(self, port: int) -> None:
        """Every guest of a port wants a lease."""
        for number, guest in enumerate(self.guests):
            if guest.port == port:
                self.lease(number)

    @rule(port=st.sampled_from(PORTS), then=st.sampled_from(PORTS))
    def ask_in_turn(self, port: int, then: int) -> None:
        """Offers of two ports are out at the same time."""
        crowd = [number for number, guest in enumerate(self.guests) if guest.port in {port, then}]
        for number in crowd:
            self.discover(number, None)
        for number in crowd:
            self.select(number)

    @rule(number=GUESTS, ip=ADDRESSES)
    def reboot(self, number: int, ip: str) -> None:
        self.request(number, ip, "reboot")

    @rule(number=GUESTS)
    def renew(self, number: int) -> None:
        if number in self.beliefs:
            self.request(number, self.beliefs[number].ip, "renew")

    @rule(number=GUESTS)
    def release(self, number: int) -> None:
        belief = self.beliefs.pop(number, None)
        if belief is not None:
            self.guests[number].server, self.guests[number].ip = self.server, belief.ip
            self.guests[number].release(self.now)

    @rule(number=GUESTS)
    def decline(self, number: int) -> None:
        belief = self.beliefs.pop(number, None)
        if belief is not None and belief.until > self.now:
            self.guests[number].server = self.server
            self.guests[number].decline(belief.ip, self.now)
            if max(self.server.pool._conflict_count.values(), default=0) >= 8:
                self.statics.clear()  # one of them may have been dropped for this one
            self.statics[belief.ip] = self.now + 600

    @rule(number=GUESTS, ip=ADDRESSES)
    def steal(self, number: int, ip: str) -> None:
        """Decline and release what another guest has."""
        guest = self.guests[number]
        if number not in self.holders(ip) and not (number in self.offers and self.offers[number] == ip):
            guest.server = self.server
            known = self.book.find(guest.mac, guest.client_id, guest.port, self.now)
            if known is None or str(known.ip) != ip:
                guest.decline(ip, self.now)
                guest.ip = ip
                guest.release(self.now)

    @rule(ip=st.sampled_from(POOL))
    def static(self, ip: str) -> None:
        self.server.seen_arp(packed(ip), b"\x02\0\0\0\0\x77", port=1, now=self.now)
        # A port's bound of conflicts drops an older one for each one more; the model keeps only what is sure.
        if self.holders(ip) or self.book.by_ip(IPv4Address(ip)) is not None or ip in self.statics:
            return
        if self.server.pool._conflict_count[1] >= 8:
            self.statics.clear()
        else:
            self.statics[ip] = self.now + 3600

    @rule(port=st.sampled_from(PORTS))
    def unplug(self, port: int) -> None:
        self.server.port_gone(port)
        self.server.port_added(port)
        for number, guest in enumerate(self.guests):
            if guest.port == port:
                self.beliefs.pop(number, None)
                self.offers.pop(number, None)
                self.kept.pop(number, None)
        self.statics.clear()

    @rule(number=GUESTS, ip=st.sampled_from(POOL))
    def keep(self, number: int, ip: str) -> None:
        """Keep an address for a guest, as the network does: for one guest of a port, and not what another has."""
        port = self.guests[number].port
        if ip in self.kept.values() or any(self.guests[other].port == port for other in self.kept):
            return
        if self.holders(ip) in ([], [number]) and self.book.by_ip(IPv4Address(ip)) in (None, self.own(number)):
            self.kept[number] = ip
            self.tell(number, ip)

    def own(self, number: int) -> Lease | None:
        guest = self.guests[number]
        lease = self.book.by_mac(guest.mac)
        return lease if lease is not None and lease.port == guest.port else None

    @rule(seconds=st.sampled_from([1, 9, 11, 500, 1799, 3599, 3601]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def restart(self) -> None:
        self.start()
        self.statics.clear()

    @invariant()
    def nobody_shares_an_address(self) -> None:
        live = [belief.ip for belief in self.beliefs.values() if belief.until > self.now]
        assert len(live) == len(set(live))

    @invariant()
    def the_book_has_what_the_guests_believe(self) -> None:
        for number, belief in self.beliefs.items():
            if belief.until > self.now:
                lease = self.book.by_ip(IPv4Address(belief.ip))
                assert lease is not None
                assert (lease.mac, lease.port) == (self.guests[number].mac, self.guests[number].port)

    @invariant()
    def no_port_has_more_than_half(self) -> None:
        self.book.sweep(self.now)
        for port in PORTS:
            kept = sum(self.guests[number].port == port for number in self.kept)
            assert self.book.held(port) <= len(POOL) // 2 + kept

    @invariant()
    def the_tables_agree(self) -> None:
        pool, book = self.server.pool, self.book
        assert set(pool._offered.values()) == set(pool._offers)
        assert sum(pool._offer_count.values()) == len(pool._offers)
        assert sum(pool._conflict_count.values()) == len(pool._conflicts)
        assert len(book) == book.active_count() + sum(1 for _ in book.remembered())
        assert sum(book.held(port) for port in book.ports()) == book.active_count()
        assert set(book._lines) == set(book._leases)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestMachine = Machine.TestCase
