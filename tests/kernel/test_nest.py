"""A nest of descriptors: turns of a few, rests of all, and what the lane's rules say of handlers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING

import pytest

from openvmnet.kernel.loop import READ, Lane
from openvmnet.kernel.nest import Nest

if TYPE_CHECKING:
    from collections.abc import Iterator


class Bench:
    """A nest of `count` descriptors, all ready, of which each turn serves `most`."""

    def __init__(self, count: int, most: int) -> None:
        self.lane = Lane()
        self.most = most
        self.resting = False
        self.served: list[int] = []
        self.nest = Nest(self.lane, self.on_ready)
        self.pairs = [socket.socketpair() for _ in range(count)]
        for number, (one, other) in enumerate(self.pairs):
            self.nest.watch(one.fileno(), READ, lambda _, number=number: self.served.append(number))
            other.send(b"x")

    def on_ready(self) -> None:
        if self.resting:
            self.nest.rest()
        else:
            self.nest.serve(self.most)

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.lane.select(0)

    def close(self) -> None:
        self.nest.close()
        for ends in self.pairs:
            for end in ends:
                end.close()
        self.lane.close()


@contextlib.contextmanager
def benched(count: int, most: int) -> Iterator[Bench]:
    before = set(os.listdir("/proc/self/fd"))
    bench = Bench(count, most)
    try:
        yield bench
    finally:
        bench.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_each_turn_serves_a_few_and_all_have_theirs():
    with benched(10, 4) as bench:
        bench.turns(1)
        assert len(bench.served) == 4
        bench.turns(4)
        assert [bench.served.count(number) for number in range(10)] == [2] * 10


def test_who_is_beside_the_nest_does_not_wait_for_all_of_it():
    with benched(100, 1) as bench:
        bench.turns(1)
        one, other = socket.socketpair()
        heard = []
        with one, other:
            bench.lane.watch(one.fileno(), READ, heard.append)
            other.send(b"x")
            bench.turns(2)
            assert heard
            assert len(bench.served) <= 3
            bench.lane.forget(one.fileno())


def test_a_rest_is_of_all_until_it_ends():
    with benched(3, 3) as bench:
        bench.resting = True
        bench.turns(3)
        assert bench.served == []
        bench.resting = False
        bench.turns(3)
        assert bench.served == []  # the lane does not even ask
        bench.nest.go_on()
        bench.turns(1)
        assert sorted(bench.served) == [0, 1, 2]


def test_a_rest_that_ends_after_the_nest():
    lane = Lane()
    nest = Nest(lane, lambda: None)
    nest.rest()
    nest.close()
    nest.go_on()
    lane.select(0)
    lane.close()


def test_forgotten_and_dropped_ones_are_not_called():
    with benched(3, 3) as bench:
        bench.nest.forget(bench.pairs[0][0].fileno())
        bench.nest.dropped(bench.pairs[1][0].fileno())
        bench.pairs[1][0].close()
        bench.turns(2)
        assert set(bench.served) == {2}


def test_one_closed_by_an_earlier_handler_of_the_turn():
    """And another that gets its number at once: what was fetched is not about it."""
    with benched(0, 8) as bench:
        bench.pairs = [socket.socketpair() for _ in range(2)]
        called: list[str] = []

        def handler(mine: int) -> None:
            called.append("old")
            other = 1 - mine
            number = bench.pairs[other][0].fileno()
            bench.nest.dropped(number)
            for end in bench.pairs[other]:
                end.close()
            bench.pairs[other] = socket.socketpair()
            assert bench.pairs[other][0].fileno() == number
            bench.nest.watch(number, READ, lambda _: called.append("new"))
            bench.nest.forget(bench.pairs[mine][0].fileno())

        for mine, (one, other) in enumerate(bench.pairs):
            bench.nest.watch(one.fileno(), READ, lambda _, mine=mine: handler(mine))
            other.send(b"x")
        bench.turns(3)
        assert called == ["old"]


def test_a_handler_that_raises_is_forgotten_and_said(caplog):
    with benched(1, 2) as bench:

        def fail(_: int) -> None:
            raise ZeroDivisionError

        one, other = socket.socketpair()
        with one, other, caplog.at_level(logging.ERROR):
            bench.nest.watch(one.fileno(), READ, fail)
            other.send(b"x")
            bench.turns(3)
            assert len(caplog.records) == 1
            bench.nest.dropped(one.fileno())  # who closes it need not know
        assert len(bench.served) == 3


def test_a_closed_lane_takes_no_nest():
    before = set(os.listdir("/proc/self/fd"))
    lane = Lane()
    lane.close()
    with pytest.raises(ValueError, match="closed"):
        Nest(lane, lambda: None)
    assert set(os.listdir("/proc/self/fd")) == before
