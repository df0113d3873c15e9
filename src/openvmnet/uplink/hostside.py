"""Where a guest's destinations are found: the gateway's address is this host.

A port there that no service of the network's own has is the same port on one of the host's own addresses: a guest meets
what any neighbour of the host would meet, and not what listens on the host's loopback alone. Who wants that too says so
(`loopback`): then the loopback address is tried first, where a listener on all addresses answers as well, and an own
address after it.

The host's addresses change while a network runs. They are read again when a flow opens and a second has passed.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import TYPE_CHECKING

from openvmnet.errors import HostError
from openvmnet.kernel import addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

_FRESH = 1.0  # s
_LOOPBACK = {4: socket.inet_pton(socket.AF_INET, "127.0.0.1"), 16: socket.inet_pton(socket.AF_INET6, "::1")}
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}


class HostSide:
    """The way from a guest's destination to the host's: `gateways` are the addresses that mean the host.

    An address is 4 or 16 octets. `outside`: other destinations are themselves; without, there is only the gateway.
    """

    def __init__(
        self,
        gateways: Iterable[bytes],
        *,
        outside: bool,
        loopback: bool,
        own: Callable[[int], list[bytes]] = addresses.own,
    ) -> None:
        self._gateways = frozenset(gateways)
        self._outside = outside
        self._loopback = loopback
        self._own = own
        self._known: dict[int, tuple[float, bytes | None]] = {}

    def destination(self, address: bytes, _: int) -> bytes | None:
        """The host's address for a guest's destination; None where there is none."""
        if address not in self._gateways:
            return address if self._outside else None
        return _LOOPBACK[len(address)] if self._loopback else self._first(len(address))

    def second(self, address: bytes, _: int) -> bytes | None:
        """Where else to look when nobody listens at the first."""
        return self._first(len(address)) if self._loopback and address in self._gateways else None

    def _first(self, size: int) -> bytes | None:
        now = time.monotonic()
        known = self._known.get(size)
        if known is None or known[0] + _FRESH < now:
            try:
                found = self._own(_FAMILY[size])
            except (OSError, HostError) as error:
                log.warning("this host's addresses cannot be read: %s", error)
                found = []
            known = self._known[size] = (now, found[0] if found else None)
        return known[1]
