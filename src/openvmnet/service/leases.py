"""The lease book: who has which address, who had it, and under which name.

How it works. One *binding* per address, in one of two states: *active* (the guest may use the address) or *remembered*
(it had it, and gets it again unless it is needed elsewhere). A lease becomes remembered when it expires, is released,
or its VM's port goes; it is forgotten only when its address goes to another client or the book is full.

Who a client is. RFC 2131 section 4.2: its client identifier, else its hardware address. Two facts of virtual machines
are added. One machine speaks in several voices: firmware and boot loader have no identifier, the system later has one,
with the same MAC. So a client without identifier finds any binding of its MAC, and one with identifier also finds a
binding that was made without one. And cloned disks have cloned identifiers: an active lease that belongs to another
*port* (the switch port that a message came in through, which a guest cannot forge) is never found, so a clone, or a
hostile guest that poses as its neighbour, is a client of its own. Where ports are not known, RFC 2131 alone decides.

Names. A host name becomes one LDH label (RFC 1123 section 2.1). An active name is unique: a second VM `web` is `web-2`.

Times are seconds since the epoch, because they have to mean the same after a restart.
Every index is bounded by the number of bindings, and that by `bound`.
"""

from __future__ import annotations

import logging
import re
import time
from ipaddress import IPv4Address
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from openvmnet.errors import Exhausted
from openvmnet.service.lease_file import LeaseFile
from openvmnet.wire.ethernet import format_mac

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

MAX_LEASES = 4096
"""Bindings in a book; a Linux bridge has at most 1024 ports."""
RESERVED_NAMES = frozenset({"gateway", "localhost"})
"""Names that the network itself answers for: a VM that calls itself so gets a number."""

_VERSION = 1
_NOT_LDH = re.compile(r"[^a-z0-9-]+")
_MAX_SUFFIX = 99
_Port = int | None


class Lease(msgspec.Struct):
    """One binding. `client_id` is b"" where the MAC alone identifies the client, `hostname` "" where there is none.

    `expires` is in whole seconds since the epoch; `port` the switch port it came through, None if not known.
    """

    mac: bytes
    client_id: bytes
    ip: IPv4Address
    hostname: str
    expires: int
    port: int | None


class _Record(msgspec.Struct, omit_defaults=True):
    """A lease in the file."""

    ip: str
    mac: str
    expires: int
    hostname: str = ""
    client_id: str = ""
    port: int | None = None


class _File(msgspec.Struct):
    version: int
    leases: list[_Record]


def sanitise(name: str) -> str:
    """The first label of `name` as an LDH label of at most 59 octets (room for a suffix), "" if nothing is left."""
    label = _NOT_LDH.sub("-", name.split(".", 1)[0].lower())
    return label.strip("-")[:59].rstrip("-")


class LeaseBook:
    """Bindings by address, client, MAC and name. `on_change` is called when something changed that the file lacks."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        live_ports: Collection[int] | None = None,
        clock: Callable[[], float] = time.time,
        bound: int = MAX_LEASES,
    ) -> None:
        """The book kept in the file at `path`, in memory only without one; a damaged or foreign file is moved aside.

        `live_ports` are the ports that have lived on while the process was away: leases of all others end. None where
        that is not known: then every lease stays, without a port.
        """
        self.file = LeaseFile(path) if path is not None else None
        self.bound = bound
        self.on_change: Callable[[], None] | None = None
        self.dirty = False
        self._clock = clock
        self._leases: dict[int, Lease] = {}
        self._lines: dict[int, bytes] = {}
        self._index: dict[bytes, dict[int, Lease]] = {}
        self._names: dict[str, Lease] = {}
        self._held: dict[_Port, dict[int, Lease]] = {}  # active ones, the oldest grant first
        self._remembered: dict[int, Lease] = {}  # the others, the longest ended first
        self._next_expiry = 0
        self._generation = 0
        self.moves = 0  # counts each address that came into or out of use
        if self.file is not None:
            self._load(self.file, live_ports)

    # What others ask.

    def by_mac(self, mac: bytes, port: int | None = None) -> Lease | None:
        """The active lease of a MAC; the latest where it has several (one per client identifier).

        With `port`, none that came through another port: a hostile guest may lease under its neighbour's MAC.
        """
        now = self._clock()
        for lease in reversed(self._index.get(b"m" + mac, {}).values()):
            if lease.expires > now and (port is None or lease.port is None or lease.port == port):
                return lease
        return None

    def by_ip(self, ip: IPv4Address) -> Lease | None:
        """The active lease of an address."""
        lease = self._leases.get(int(ip))
        return lease if lease is not None and lease.expires > self._clock() else None

    def by_name(self, hostname: str) -> IPv4Address | None:
        """The address of the active lease with this name (one label, any case)."""
        lease = self._names.get(hostname.lower())
        return lease.ip if lease is not None and lease.expires > self._clock() else None

    def name_of(self, ip: IPv4Address) -> str | None:
        """The name of the active lease of an address, None where it has none."""
        lease = self.by_ip(ip)
        return lease.hostname or None if lease is not None else None

    def generation(self) -> int:
        """A number that changes whenever a name or its address may have: what was made from names is stale then."""
        self.sweep(self._clock())
        return self._generation

    def __iter__(self) -> Iterator[Lease]:
        """The active leases."""
        now = self._clock()
        return (lease for lease in list(self._leases.values()) if lease.expires > now)

    def __len__(self) -> int:
        """All bindings, active and remembered."""
        return len(self._leases)

    def release_mac(self, mac: bytes) -> None:
        """End the active leases of a MAC, because its port is gone; their addresses stay remembered."""
        for lease in list(self._index.get(b"m" + mac, {}).values()):
            self.end(lease, self._clock())

    def release_port(self, port: int) -> None:
        """End every active lease that came through a port, whatever its MAC."""
        for lease in list(self._held.get(port, {}).values()):
            self.end(lease, self._clock())

    # What the server asks; `now` is the same clock.

    def find(self, mac: bytes, client_id: bytes, port: int | None, now: float) -> Lease | None:
        """The binding of a client, active or remembered, by the rules above; the latest of its own MAC comes first."""
        if client_id:
            candidates = [*self._latest(b"c" + client_id), *self._latest(b"n" + mac)]
            candidates.sort(key=lambda lease: lease.mac != mac)
        else:
            candidates = self._latest(b"m" + mac)
        for lease in candidates:
            ours = lease.port is None or port is None or lease.port == port
            if ours or lease.expires <= now:
                return lease
        return None

    def at(self, ip: int) -> Lease | None:
        """The binding of an address, active or remembered."""
        return self._leases.get(ip)

    def held(self, port: int | None) -> int:
        """How many active leases a port has."""
        return len(self._held.get(port, ()))

    def ports(self) -> Collection[_Port]:
        """The ports that have active leases."""
        return self._held.keys()

    def active_count(self) -> int:
        """How many leases are active."""
        return len(self._leases) - len(self._remembered)

    def oldest(self, port: int | None) -> Iterator[Lease]:
        """The active leases of a port, the longest granted or renewed first."""
        return iter(self._held.get(port, {}).values())

    def remembered(self) -> Iterator[Lease]:
        """The bindings that are not active, the longest ended first."""
        return iter(self._remembered.values())

    def grant(self, lease: Lease, name: str, now: float) -> None:
        """Make `lease` active; whatever was bound to its address is forgotten.

        Its name becomes what `free_name()` says, `lease.hostname` being the name it had. `Exhausted` when the book has
        `bound` active leases already.
        """
        address = int(lease.ip)
        before = self._leases.get(address)
        if before is None and len(self._leases) >= self.bound:
            before = next(self.remembered(), None)
            if before is None:
                raise Exhausted(f"the lease book has {self.bound} active leases, and no room for {lease.ip}")
        if before is not None:
            self.forget(before)
        lease.hostname = self.free_name(name, lease.hostname, now)
        self._insert(lease, now)
        self._changed(address)

    def free_name(self, name: str, current: str, now: float, own: Lease | None = None) -> str:
        """What a VM that calls itself `name` is called: `current` if that is a variant of it and free, else the first
        free of NAME, NAME-2 ... NAME-99, else nothing. A name that only `own` has is free."""
        base = sanitise(name)
        if not base:
            return ""
        numbered = (f"{base}-{suffix}" for suffix in range(2, _MAX_SUFFIX + 1))
        for label in chain([current] if _variant(current, base) else [], [base], numbered):
            holder = self._names.get(label)
            if label not in RESERVED_NAMES and (holder is None or holder is own or holder.expires <= now):
                return label
        return ""

    def end(self, lease: Lease, now: float) -> None:
        """An active lease becomes remembered; one that is not in the book, or not active, is left alone."""
        address = int(lease.ip)
        if self._leases.get(address) is lease and address not in self._remembered:
            lease.expires = min(lease.expires, int(now))
            self._retire(lease)
            self._changed(address)

    def forget(self, lease: Lease) -> None:
        """Remove a binding altogether."""
        address = int(lease.ip)
        if self._leases.get(address) is not lease:
            return
        self._retire(lease)
        del self._remembered[address], self._leases[address]
        self._lines.pop(address, None)
        for key in _keys(lease):
            entries = self._index[key]
            del entries[address]
            if not entries:
                del self._index[key]
        self._note()

    def sweep(self, now: float) -> None:
        """Turn what has expired into remembered bindings. Costs nothing before the next expiry is due."""
        if now < self._next_expiry:
            return
        self._next_expiry = 1 << 62
        for lease in [lease for held in self._held.values() for lease in held.values()]:
            if lease.expires <= now:
                self._retire(lease)
            else:
                self._next_expiry = min(self._next_expiry, lease.expires)

    def restrict(self, inside: Callable[[int], bool]) -> None:
        """Forget bindings whose address is not of this pool: the network's addresses were changed."""
        for address in [address for address in self._leases if not inside(address)]:
            self.forget(self._leases[address])

    def snapshot(self) -> bytes:
        """The file's content, JSON, one lease a line; the book is clean from here on."""
        self.dirty = False
        return b'{"version":%d,"leases":[\n%b\n]}\n' % (_VERSION, b",\n".join(self._lines.values()))

    # Inside.

    def _latest(self, key: bytes) -> list[Lease]:
        entries = self._index.get(key)
        return list(reversed(entries.values())) if entries else []

    def _insert(self, lease: Lease, now: float) -> None:
        address = int(lease.ip)
        self._leases[address] = lease
        self.moves += 1
        for key in _keys(lease):
            self._index.setdefault(key, {})[address] = lease
        if lease.expires > now:
            self._held.setdefault(lease.port, {})[address] = lease
            self._next_expiry = min(self._next_expiry, lease.expires)
            if lease.hostname:
                self._names[lease.hostname] = lease
                self._generation += 1
        else:
            self._remembered[address] = lease

    def _retire(self, lease: Lease) -> None:
        """Active to remembered, in memory."""
        address = int(lease.ip)
        self.moves += 1
        held = self._held.get(lease.port, {})
        if held.pop(address, None) is not None and not held:
            del self._held[lease.port]
        if self._names.get(lease.hostname) is lease:
            del self._names[lease.hostname]
            self._generation += 1
        self._remembered[address] = lease

    def _changed(self, address: int) -> None:
        lease = self._leases[address]
        record = _Record(
            str(lease.ip), format_mac(lease.mac), lease.expires, lease.hostname, lease.client_id.hex(), lease.port
        )
        self._lines[address] = msgspec.json.encode(record)
        self._note()

    def _note(self) -> None:
        if not self.dirty:
            self.dirty = True
            if self.on_change is not None:
                self.on_change()

    def _load(self, file: LeaseFile, live_ports: Collection[int] | None) -> None:
        try:
            data = file.read()
            leases = [] if data is None else _decode(data)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            file.set_aside(str(error))
            return
        now = self._clock()
        leases.sort(key=lambda lease: lease.expires)
        for lease in leases[-self.bound :]:
            if lease.port is not None and (live_ports is None or lease.port not in live_ports):
                lease.port = None
                if live_ports is not None:
                    lease.expires = min(lease.expires, int(now))
            if int(lease.ip) in self._leases:
                self.forget(self._leases[int(lease.ip)])
            if lease.hostname in self._names:
                lease.hostname = ""
            self._insert(lease, now)
            self._changed(int(lease.ip))


def _decode(data: bytes) -> list[Lease]:
    """The file's leases; ValueError or MsgspecError for anything that is not such a file."""
    file = msgspec.json.decode(data, type=_File)
    if file.version != _VERSION:
        raise ValueError(f"version {file.version}, not {_VERSION}")
    return [
        Lease(
            bytes.fromhex(record.mac.replace(":", "")),
            bytes.fromhex(record.client_id),
            IPv4Address(record.ip),
            sanitise(record.hostname),
            record.expires,
            record.port,
        )
        for record in file.leases
    ]


def _keys(lease: Lease) -> list[bytes]:
    """Index keys: m any binding of a MAC, n one made without a client identifier, c the client identifier."""
    return [b"m" + lease.mac, b"c" + lease.client_id if lease.client_id else b"n" + lease.mac]


def _variant(label: str, name: str) -> bool:
    """`label` is what `name` was once called: the same, or with a number behind it."""
    base = sanitise(name)
    head, _, tail = label.rpartition("-")
    return bool(base) and (label == base or (head == base and tail.isdecimal()))
