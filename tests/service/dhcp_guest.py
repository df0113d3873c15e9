"""A DHCP client for the server's unit tests: it builds messages and reads answers, with no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address
from itertools import count
from typing import TYPE_CHECKING

from msgspec.structs import replace

from openvmnet.service.dhcp import DhcpConfig, DhcpServer
from openvmnet.service.leases import LeaseBook
from openvmnet.wire import dhcp4
from openvmnet.wire.dhcp4 import Message

if TYPE_CHECKING:
    from openvmnet.service.dhcp import Reply

_XIDS = count(1)
GATEWAY = "192.168.64.1"
NOW = 1_700_000_000.0
CONFIG = DhcpConfig(
    gateway=IPv4Address(GATEWAY),
    prefixlen=24,
    first=IPv4Address("192.168.64.2"),
    last=IPv4Address("192.168.64.254"),
    gateway_mac=b"\x5a\0\0\0\0\1",
    dns=(IPv4Address(GATEWAY),),
    search=("vmnet.internal", "example.org"),
    mtu=1400,
    rate=100_000,
)


def packed(ip: str | IPv4Address) -> bytes:
    return IPv4Address(ip).packed


@dataclass
class Guest:
    """One client. `ip` is what the last ACK gave, `reply` the last answer as the server made it."""

    server: DhcpServer
    mac: bytes
    port: int | None = None
    client_id: bytes = b""
    options: dict[int, bytes] = field(default_factory=dict)
    ip: str | None = None
    reply: Reply | None = None

    def send(self, kind: int, options: dict[int, bytes] | None = None, *, now: float, **fields) -> Message | None:
        """Send a message; the answer, parsed, or None."""
        known = {dhcp4.MESSAGE_TYPE: bytes([kind])}
        if self.client_id:
            known[dhcp4.CLIENT_ID] = self.client_id
        message = Message(
            op=fields.pop("op", dhcp4.BOOTREQUEST),
            xid=next(_XIDS),
            chaddr=self.mac,
            options=known | self.options | (options or {}),
            **fields,
        )
        octets = dhcp4.build(message, limit=1472)[0]
        self.reply = self.server.handle(octets, source_mac=None, port=self.port, now=now)
        if self.reply is None:
            return None
        answer = dhcp4.parse(self.reply.payload)
        assert answer.op == dhcp4.BOOTREPLY
        assert (answer.xid, answer.chaddr, answer.giaddr) == (message.xid, self.mac, message.giaddr)
        assert answer.options.get(dhcp4.CLIENT_ID) == message.options.get(dhcp4.CLIENT_ID)
        assert answer.address(dhcp4.SERVER_ID) == packed(self.server.config.gateway)
        return answer

    def discover(self, now: float, options: dict[int, bytes] | None = None, **fields) -> str | None:
        """The address offered, or None."""
        answer = self.send(dhcp4.DISCOVER, options, now=now, **fields)
        if answer is None:
            return None
        assert answer.type() == dhcp4.OFFER
        return str(IPv4Address(answer.yiaddr))

    def select(self, ip: str, now: float, options: dict[int, bytes] | None = None, **fields) -> Message | None:
        chosen = {dhcp4.REQUESTED_ADDRESS: packed(ip), dhcp4.SERVER_ID: packed(GATEWAY)}
        return self.take(self.send(dhcp4.REQUEST, chosen | (options or {}), now=now, **fields))

    def reboot(self, ip: str, now: float, **fields) -> Message | None:
        return self.take(self.send(dhcp4.REQUEST, {dhcp4.REQUESTED_ADDRESS: packed(ip)}, now=now, **fields))

    def renew(self, ip: str, now: float, **fields) -> Message | None:
        return self.take(self.send(dhcp4.REQUEST, now=now, ciaddr=packed(ip), **fields))

    def take(self, answer: Message | None) -> Message | None:
        if answer is not None and answer.type() == dhcp4.ACK:
            self.ip = str(IPv4Address(answer.yiaddr))
        elif answer is not None:
            assert answer.type() == dhcp4.NAK
            self.ip = None
        return answer

    def lease(self, now: float) -> str:
        """The four-way exchange, which has to succeed."""
        offered = self.discover(now)
        assert offered is not None
        answer = self.select(offered, now)
        assert answer is not None
        assert answer.type() == dhcp4.ACK
        assert str(IPv4Address(answer.yiaddr)) == offered
        return offered

    def release(self, now: float) -> None:
        assert self.ip is not None
        assert self.send(dhcp4.RELEASE, {54: packed(GATEWAY)}, now=now, ciaddr=packed(self.ip)) is None
        self.ip = None

    def decline(self, ip: str, now: float) -> None:
        assert self.send(dhcp4.DECLINE, {50: packed(ip), 54: packed(GATEWAY)}, now=now) is None
        self.ip = None


class World:
    """A server, its clock and as many guests as are asked for."""

    def __init__(self, config: DhcpConfig = CONFIG) -> None:
        self.now = NOW
        self.book = LeaseBook(clock=lambda: self.now)
        self.server = DhcpServer(config, self.book)

    def guest(self, number: int, *, port: int | None = None, client_id: bytes = b"") -> Guest:
        return Guest(self.server, b"\x52\x54\0\0" + number.to_bytes(2, "big"), port, client_id)

    def restart(self) -> DhcpServer:
        """The same leases, a new process."""
        self.server = DhcpServer(self.server.config, self.book)
        return self.server


def small(last: int, **changes: object) -> World:
    """A world with the pool 192.168.64.2 .. 192.168.64.LAST."""
    return World(replace(CONFIG, last=IPv4Address(f"192.168.64.{last}"), **changes))
