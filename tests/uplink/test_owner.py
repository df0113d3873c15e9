"""Whose packet it is: found, kept for a while, looked up no more often than allowed."""

from __future__ import annotations

from openvmnet.uplink.owner import KEEP, NOBODY, REREAD, Owners


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lease_then_neighbour_then_nobody() -> None:
    clock = Clock()
    leases, neighbours = {b"\x0a\0\0\2": 7}, {b"\x0a\0\0\3": 8}
    reads = []

    def resolved() -> dict[bytes, int]:
        reads.append(clock.now)
        return dict(neighbours)

    owners = Owners(leases.get, resolved, clock)
    assert owners.of(b"\x0a\0\0\2") == 7
    assert not reads
    assert owners.of(b"\x0a\0\0\3") == 8
    assert owners.of(b"\x0a\0\0\4") == NOBODY
    assert len(reads) == 1  # a guest that makes addresses up does not make us read the table each time
    clock.now += REREAD + 0.01
    neighbours[b"\x0a\0\0\4"] = 9
    assert owners.of(b"\x0a\0\0\4") == 9
    neighbours.clear()
    leases[b"\x0a\0\0\2"] = 11
    assert owners.of(b"\x0a\0\0\2") == 7
    clock.now += KEEP + 0.01
    assert owners.of(b"\x0a\0\0\2") == 11
    assert owners.of(b"\x0a\0\0\4") == NOBODY
    leases[b"\x0a\0\0\2"] = 12
    owners.forget()
    assert owners.of(b"\x0a\0\0\2") == 12
