"""Where a published port leads, whatever its protocol: whose it is, and how its guest is reached."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Target(msgspec.Struct, frozen=True):
    """`owner` is the number of the VM's port, whose bounds hold; `port` the guest's, 2 octets in network order.

    `reach()` gives the guest's address (4 or 16 octets) as it is now, None where it has none; `connector(size)` a fresh
    transparent socket of the namespace, TCP or UDP as the port is, for addresses of that size; `counters` are those of
    all published ports.
    """

    owner: int
    port: bytes
    reach: Callable[[], bytes | None]
    connector: Callable[[int], int]
    counters: dict[str, int]
