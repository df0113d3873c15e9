"""Token buckets by port."""

from __future__ import annotations

from openvmnet.service.buckets import Bucket, Buckets


def taken(buckets: Buckets, port: int | None, now: float, tries: int) -> int:
    return sum(buckets.take(port, now) for _ in range(tries))


def test_a_bucket_gives_its_depth_at_once_and_then_its_rate():
    buckets = Buckets(4.0, 1.0)
    assert taken(buckets, 1, 100.0, 10) == 4
    assert taken(buckets, 1, 102.5, 10) == 2
    assert taken(buckets, 1, 103.0, 10) == 1  # the half of before and another
    assert taken(buckets, 1, 1000.0, 10) == 4


def test_each_port_has_its_own_and_those_unknown_one_together():
    buckets = Buckets(2.0, 1.0)
    assert [taken(buckets, port, 0.0, 3) for port in (1, 2, None, None)] == [2, 2, 2, 0]
    buckets.forget(1)
    buckets.forget(3)
    assert [taken(buckets, port, 0.0, 3) for port in (1, 2)] == [2, 0]


def test_a_clock_that_goes_back_takes_nothing():
    bucket = Bucket(2.0, 1.0, 100.0)
    assert [bucket.take(50.0) for _ in range(3)] == [True, True, False]


def test_made_up_ports_are_bounded():
    buckets = Buckets(1.0, 1.0)
    for port in range(5000):
        assert buckets.take(port, 0.0)
    assert len(buckets._of) <= 2048
