"""IPv6 fragments: reassembly behind a kernel that has reassembled already, the twin of `wire.fragments`, and splitting.

What comes through the TUN is in order, without gap or overlap, as that module says. A fragment bears the headers of the
whole up to the fragment header (RFC 8200, 4.5); the whole packet is those headers, with the fragment header left out,
and what all fragments have behind it. Splitting is for what has no sender's kernel to do it: no router fragments IPv6.
"""

from __future__ import annotations

import struct
from collections import OrderedDict

from openvmnet.errors import Malformed
from openvmnet.wire import ip6
from openvmnet.wire.fragments import PENDING

_FRAGMENT = struct.Struct("!BBHI")
_BEFORE = (ip6.HOP_BY_HOP, ip6.ROUTING, ip6.DESTINATION_OPTIONS)  # what may stand before a fragment header


class Reassembly6:
    """Packets of which not all pieces are here; the oldest gives way when there are PENDING."""

    def __init__(self) -> None:
        self._pending: OrderedDict[bytes, bytearray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, packet: bytes) -> bytes | None:
        """A whole packet, or a piece; the whole packet once it is complete, else None. `Malformed` for others."""
        if len(packet) < 40:
            raise Malformed(f"an IPv6 header has 40 octets, not {len(packet)}")
        at, announced = _fragment_header(packet)
        if at == 0:
            return packet
        total = 40 + int.from_bytes(packet[4:6], "big")
        field = int.from_bytes(packet[at + 2 : at + 4], "big")
        more, offset, start = field & 1, field & 0xFFF8, at + 8
        if packet[0] >> 4 != 6 or not start < total <= len(packet) or (more and (total - start) % 8):
            raise Malformed(f"a fragment of {total} octets with its header at {at}, of which {len(packet)} are here")
        key = packet[8:40] + packet[at + 4 : at + 8]
        if offset == 0:
            self._pending.pop(key, None)
            if not more:
                return bytes(_sealed(bytearray(_without(packet, at, announced)[: total - 8])))  # an atomic one
            if len(self._pending) >= PENDING:
                self._pending.popitem(last=False)
            self._pending[key] = bytearray(_without(packet[:total], at, announced))
            return None
        whole = self._pending.get(key)
        if whole is None:
            return None  # its beginning was lost
        if len(whole) - at != offset or len(whole) - 40 + total - start > 0xFFFF:
            del self._pending[key]
            return None
        whole += packet[start:total]
        if more:
            return None
        del self._pending[key]
        return bytes(_sealed(whole))


def split(packet: bytes, mtu: int, identification: int) -> list[bytes]:
    """A packet without extension headers in pieces for a link of `mtu` octets (1280 or more): RFC 8200 section 4.5."""
    if len(packet) <= mtu:
        return [packet]
    payload, size = packet[40:], (mtu - 48) & ~7
    pieces = []
    for offset in range(0, len(payload), size):
        part = payload[offset : offset + size]
        more = offset + size < len(payload)
        header = _FRAGMENT.pack(packet[6], 0, offset | more, identification)
        length = (8 + len(part)).to_bytes(2, "big")
        pieces.append(packet[:4] + length + bytes([ip6.FRAGMENT]) + packet[7:40] + header + part)
    return pieces


def _fragment_header(packet: bytes) -> tuple[int, int]:
    """Where the fragment header is, 0 for nowhere, and where it is announced."""
    announced, at = 6, 40
    while packet[announced] in _BEFORE:
        if at + 8 > len(packet):
            raise Malformed(f"an extension header at {at} of {len(packet)} octets")
        announced, at = at, at + (packet[at + 1] + 1) * 8
    if packet[announced] != ip6.FRAGMENT:
        return 0, 0
    if at + 8 > len(packet):
        raise Malformed(f"a fragment header at {at} of {len(packet)} octets")
    return at, announced


def _without(packet: bytes, at: int, announced: int) -> bytes:
    """The packet without its fragment header at `at`, which the octet at `announced` announces."""
    return packet[:announced] + packet[at : at + 1] + packet[announced + 1 : at] + packet[at + 8 :]


def _sealed(whole: bytearray) -> bytearray:
    """The packet with the length of a whole one."""
    whole[4:6] = (len(whole) - 40).to_bytes(2, "big")
    return whole
