"""IPv4 reassembly behind a kernel that has reassembled already.

The kernel puts fragments together before the firewall looks at a packet, and takes them apart again when it forwards
the packet, into pieces no larger than they came (`frag_max_size` of its ip_fragment.c and ip_output.c), whatever the
MTU of the link they leave by. So what comes through the TUN is well-formed: the pieces of one packet in order, without
gap or overlap, perhaps with other packets between them, perhaps with the end missing where the TUN's queue was full.
Putting such pieces together is appending; a piece that does not continue what is there ends the attempt.
"""

from __future__ import annotations

from collections import OrderedDict

from openvmnet.errors import Malformed
from openvmnet.wire import ip

PENDING = 64  # packets under way at once; 4 MiB at the most

_MORE = 0x2000
_OFFSET = 0x1FFF
_PIECE = (_MORE | _OFFSET) >> 8  # in the upper octet of the two


class Reassembly:
    """Packets of which not all pieces are here; the oldest gives way when there are PENDING."""

    def __init__(self) -> None:
        self._pending: OrderedDict[bytes, bytearray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, packet: bytes) -> bytes | None:
        """A whole packet, or a piece; the whole packet once it is complete, else None. `Malformed` for others."""
        if len(packet) < 20:
            raise Malformed(f"an IPv4 header has 20 octets or more, not {len(packet)}")
        if not (packet[6] & _PIECE or packet[7]):
            return packet
        fragment = int.from_bytes(packet[6:8], "big")
        more, offset = fragment & _MORE, (fragment & _OFFSET) * 8
        header = (packet[0] & 15) * 4
        total = int.from_bytes(packet[2:4], "big")
        if packet[0] >> 4 != 4 or header < 20 or not header < total <= len(packet) or (more and (total - header) % 8):
            raise Malformed(
                f"a fragment with a header of {header} octets, {total} in all, of which {len(packet)} are here"
            )
        key = packet[4:6] + packet[9:10] + packet[12:20]
        if offset == 0:
            self._pending.pop(key, None)
            if len(self._pending) >= PENDING:
                self._pending.popitem(last=False)
            self._pending[key] = bytearray(packet[:total])
            return None
        whole = self._pending.get(key)
        if whole is None:
            return None  # its beginning was lost
        start = (whole[0] & 15) * 4
        if len(whole) - start != offset or len(whole) + total - header > 0xFFFF:
            del self._pending[key]
            return None
        whole += packet[header:total]
        if more:
            return None
        del self._pending[key]
        return _sealed(whole, start)


def _sealed(whole: bytearray, header: int) -> bytes:
    """The packet with the length, the flags and the checksum of a whole one."""
    whole[2:4] = len(whole).to_bytes(2, "big")
    whole[6] &= 0x40  # do-not-fragment stays as it was
    whole[7] = 0
    whole[10:12] = b"\0\0"
    whole[10:12] = ip.checksum(bytes(whole[:header])).to_bytes(2, "big")
    return bytes(whole)
