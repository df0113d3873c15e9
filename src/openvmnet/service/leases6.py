"""The book of DHCPv6 leases: which address a client has, or had, under which name.

How it works. A client is an identity association: DUID and IAID (RFC 8415 section 12), and the MAC of its VM, which a
guest cannot choose where ports are known: cloned disks have cloned DUIDs, and a hostile guest can copy one, but each
port's clients are its own. The address follows from a hash of all three, so that a client gets the same one even from
an empty book; if that is taken, from the next free one.

As in the book of IPv4 leases, a lease that has ended is remembered, and its address comes back with its client, until
the place is needed. A port holds at most its share of the book, and never more than MAX_PER_PORT; what is said of that
is said once. Times are seconds since the epoch. The file is replaced whole by `lease_file`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from openvmnet.notice import Notice
from openvmnet.service.lease_file import LeaseFile
from openvmnet.service.leases import sanitise

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

MAX_LEASES = 4096
MAX_PER_PORT = 64
"""Active leases of one port: a VM has one or two, a VM with guests of its own some more."""
_MIN_PER_PORT = 4  # a bridge has at most 1,024 ports
DECLINE_TIME = 600
"""Seconds that an address which somebody else was found at is kept back."""
_MAX_DECLINED = 256
_VERSION = 1


class Client(NamedTuple):
    """Who asks: DUID, IAID (4 bytes), the VM's MAC (b"" where it is not known) and its port (None likewise)."""

    duid: bytes
    iaid: bytes
    mac: bytes
    port: int | None

    @property
    def key(self) -> bytes:
        """What tells this client from all others, whatever its port is numbered."""
        return self.iaid + bytes([len(self.mac)]) + self.mac + self.duid


class Lease6(msgspec.Struct):
    """One binding: active until `expires`, whole seconds since the epoch. `hostname` is a label, "" for none."""

    client: Client
    ip: IPv6Address
    hostname: str
    expires: int


class _Record(msgspec.Struct, omit_defaults=True):
    ip: str
    duid: str
    iaid: str
    expires: int
    mac: str = ""
    hostname: str = ""
    port: int | None = None


class _File(msgspec.Struct):
    version: int
    leases: list[_Record]


class LeaseBook6:
    """Leases in `first`..`last`, by client and address. `on_change` is called when the file lacks something."""

    def __init__(
        self,
        first: IPv6Address,
        last: IPv6Address,
        path: Path | None = None,
        *,
        live_ports: Collection[int] | None = None,
        clock: Callable[[], float] = time.time,
        bound: int = MAX_LEASES,
    ) -> None:
        """The book kept at `path`, in memory only without one; leases of ports that are not `live_ports` have ended."""
        self.file = LeaseFile(path) if path is not None else None
        self.on_change: Callable[[], None] | None = None
        self.dirty = False
        self.moves = 0  # counts each address or name that came into or out of use
        self.ports: set[int] = set(live_ports or ())
        self._first, self._span = int(first), int(last) - int(first) + 1
        self._bound = min(bound, self._span)
        self._clock = clock
        self._clients: dict[bytes, Lease6] = {}  # those that ended longest ago come first, as far as that is known
        self._addresses: dict[int, Lease6] = {}
        self._held: Counter[int | None] = Counter()
        self._active: set[int] = set()
        self._names: dict[str, Client] = {}
        self._declined: dict[int, float] = {}
        self._next_expiry = 0
        self._exhausted = Notice(log)
        if self.file is not None:
            self._load(self.file)

    def __iter__(self) -> Iterator[Lease6]:
        """The active leases."""
        now = self._clock()
        return (self._addresses[one] for one in list(self._active) if self._addresses[one].expires > now)

    def __len__(self) -> int:
        """All bindings, active and remembered."""
        return len(self._addresses)

    def __contains__(self, address: int) -> bool:
        return 0 <= address - self._first < self._span

    def find(self, client: Client) -> Lease6 | None:
        """The client's binding, active or remembered."""
        return self._clients.get(client.key)

    def at(self, ip: IPv6Address) -> Lease6 | None:
        """The active lease of an address."""
        lease = self._addresses.get(int(ip))
        return lease if lease is not None and lease.expires > self._clock() else None

    def named(self, hostname: str) -> Client | None:
        """Who has this name, by the first of its active leases that has it."""
        self.sweep(self._clock())
        return self._names.get(hostname)

    def choose(self, client: Client, wanted: int | None, now: float) -> int | None:
        """The address for a client: what it has or had, what it asks for if nobody had that, else its own by hash.

        None where its port, or the book, has no room.
        """
        self.sweep(now)
        lease = self.find(client)
        active = lease is not None and int(lease.ip) in self._active
        if not active and not self._has_room(client.port):
            return None
        if lease is not None and not self._is_declined(int(lease.ip), now):
            return int(lease.ip)
        if wanted is not None and wanted in self and self._is_free(wanted, now):
            return wanted
        at = int.from_bytes(hashlib.blake2b(client.key, digest_size=8).digest(), "big") % self._span
        if len(self._addresses) < self._bound:
            for _ in range(min(self._span, self._bound + _MAX_DECLINED + 1)):
                if self._is_free(self._first + at, now):
                    return self._first + at
                at = (at + 1) % self._span
        for other in self._clients.values():
            if int(other.ip) not in self._active and not self._is_declined(int(other.ip), now):
                return int(other.ip)
        self._exhausted.warn("no IPv6 address is left: %d are leased; stop a machine", len(self._active))
        return None

    def grant(self, client: Client, address: int, hostname: str, expires: int, now: float) -> Lease6:
        """Make the lease active; whatever was bound to its address or client is forgotten.

        A name that another VM has is nobody else's: the lease has none then.
        """
        for before in (self.find(client), self._addresses.get(address)):
            if before is not None:
                self._remove(before)
        while len(self._addresses) >= self._bound:
            victim = next((one for one in self._clients.values() if int(one.ip) not in self._active), None)
            if victim is None:
                break  # `choose` gives no address then
            self._remove(victim)
        name = sanitise(hostname)
        holder = self._names.get(name)
        if holder is not None and (holder.mac, holder.port) != (client.mac, client.port):
            name = ""
        lease = Lease6(client, IPv6Address(address), name, expires)
        self._insert(lease, now)
        self._note()
        return lease

    def end(self, lease: Lease6, now: float) -> None:
        """An active lease becomes a remembered one."""
        if int(lease.ip) in self._active and self._addresses.get(int(lease.ip)) is lease:
            lease.expires = min(lease.expires, int(now))
            self._retire(lease)
            self._note()

    def decline(self, lease: Lease6, now: float) -> None:
        """Somebody else was found at this address: nobody gets it for a while."""
        self._remove(lease)
        if len(self._declined) >= _MAX_DECLINED:
            del self._declined[next(iter(self._declined))]
        self._declined[int(lease.ip)] = now + DECLINE_TIME
        self._note()

    def release_port(self, port: int) -> None:
        """The port is gone: its leases end."""
        self.ports.discard(port)
        now = self._clock()
        for lease in [self._addresses[one] for one in self._active]:
            if lease.client.port == port:
                self.end(lease, now)

    def sweep(self, now: float) -> None:
        """Turn what has expired into remembered bindings. Costs nothing before the next expiry is due."""
        if now < self._next_expiry:
            return
        self._next_expiry = 1 << 62
        for lease in [self._addresses[one] for one in self._active]:
            if lease.expires <= now:
                self._retire(lease)
            else:
                self._next_expiry = min(self._next_expiry, lease.expires)

    def snapshot(self) -> bytes:
        """The file's content, JSON, one lease a line; the book is clean from here on."""
        self.dirty = False
        lines = [
            msgspec.json.encode(
                _Record(
                    ip=str(lease.ip),
                    duid=lease.client.duid.hex(),
                    iaid=lease.client.iaid.hex(),
                    expires=lease.expires,
                    mac=lease.client.mac.hex(":"),
                    hostname=lease.hostname,
                    port=lease.client.port,
                )
            )
            for lease in self._clients.values()
        ]
        return b'{"version":%d,"leases":[\n%b\n]}\n' % (_VERSION, b",\n".join(lines))

    def _has_room(self, port: int | None) -> bool:
        share = max(_MIN_PER_PORT, min(MAX_PER_PORT, self._bound // max(1, len(self.ports))))
        if self._held[port] < share:
            return True
        self._exhausted.warn("port %s has %d IPv6 leases; it gets no more", port, self._held[port])
        return False

    def _is_free(self, address: int, now: float) -> bool:
        return address not in self._addresses and not self._is_declined(address, now)

    def _is_declined(self, address: int, now: float) -> bool:
        until = self._declined.get(address)
        if until is not None and until <= now:
            del self._declined[address]
            return False
        return until is not None

    def _insert(self, lease: Lease6, now: float) -> None:
        address = int(lease.ip)
        self._clients[lease.client.key] = self._addresses[address] = lease
        if lease.expires > now:
            self._active.add(address)
            self._held[lease.client.port] += 1
            self._next_expiry = min(self._next_expiry, lease.expires)
            if lease.hostname:
                self._names.setdefault(lease.hostname, lease.client)
            self.moves += 1

    def _retire(self, lease: Lease6) -> None:
        """Active to remembered: the last to be forgotten."""
        address, port = int(lease.ip), lease.client.port
        if address not in self._active:
            return
        self._active.discard(address)
        self._held[port] -= 1
        if not self._held[port]:
            del self._held[port]
        self._clients[lease.client.key] = self._clients.pop(lease.client.key)
        if self._names.get(lease.hostname) == lease.client:
            del self._names[lease.hostname]
        self.moves += 1

    def _remove(self, lease: Lease6) -> None:
        self._retire(lease)
        if self._addresses.get(int(lease.ip)) is lease:
            del self._addresses[int(lease.ip)]
        if self._clients.get(lease.client.key) is lease:
            del self._clients[lease.client.key]

    def _note(self) -> None:
        if not self.dirty:
            self.dirty = True
            if self.on_change is not None:
                self.on_change()

    def _load(self, file: LeaseFile) -> None:
        try:
            data = file.read()
            leases = [] if data is None else _decode(data)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            file.set_aside(str(error))
            return
        now = self._clock()
        leases.sort(key=lambda lease: lease.expires)
        for lease in leases[-self._bound :]:
            if lease.client.port not in self.ports:
                lease.client = lease.client._replace(port=None)
                lease.expires = min(lease.expires, int(now))
            if int(lease.ip) in self and int(lease.ip) not in self._addresses and self.find(lease.client) is None:
                self._insert(lease, now)
        self.dirty = bool(leases)


def _decode(data: bytes) -> list[Lease6]:
    """The file's leases; ValueError or MsgspecError for anything that is not such a file."""
    file = msgspec.json.decode(data, type=_File)
    if file.version != _VERSION:
        raise ValueError(f"version {file.version}, not {_VERSION}")
    return [
        Lease6(
            Client(
                bytes.fromhex(record.duid),
                bytes.fromhex(record.iaid),
                bytes.fromhex(record.mac.replace(":", "")),
                record.port,
            ),
            IPv6Address(record.ip),
            sanitise(record.hostname),
            record.expires,
        )
        for record in file.leases
    ]
