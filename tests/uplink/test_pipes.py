"""The pool of pipes."""

from __future__ import annotations

import fcntl
import os

import pytest

from openvmnet.uplink import pipes
from openvmnet.uplink.pipes import PipePool


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_pipes_have_the_size_and_do_not_block():
    pool = PipePool(limit=2, size=1 << 18)
    pipe = pool.borrow()
    assert pipe is not None
    assert fcntl.fcntl(pipe[0], pipes.F_SETPIPE_SZ + 1) >= 1 << 18
    assert not os.get_blocking(pipe[0])
    assert not os.get_blocking(pipe[1])
    assert not os.get_inheritable(pipe[0])
    pool.give_back(pipe)
    pool.close()


def test_at_most_limit_and_again_after_return():
    before = descriptors()
    pool = PipePool(limit=3, size=1 << 16)
    lent = [pool.borrow() for _ in range(3)]
    assert all(lent)
    assert pool.borrow() is None
    pool.give_back(lent[1])
    assert pool.borrow() == lent[1]  # the same one, no new descriptors
    for pipe in lent:
        pool.give_back(pipe)
    assert pool.lent == 0
    pool.close()
    assert descriptors() == before


def test_a_lost_pipe_is_closed_and_makes_room():
    before = descriptors()
    pool = PipePool(limit=1, size=1 << 16)
    pipe = pool.borrow()
    os.write(pipe[1], b"of a broken flow")
    pool.lose(pipe)
    assert descriptors() == before
    fresh = pool.borrow()
    with pytest.raises(BlockingIOError):
        os.read(fresh[0], 1)  # nobody else's bytes in it
    pool.give_back(fresh)
    pool.close()
    assert descriptors() == before


@pytest.mark.parametrize("what", ["pipe", "size"])
def test_what_the_kernel_refuses_is_none(monkeypatch, what):
    before = descriptors()
    pool = PipePool(limit=4, size=1 << 16)

    def refuse(*_):
        raise PermissionError(1, "no more pages")

    monkeypatch.setattr(*((os, "pipe2", refuse) if what == "pipe" else (fcntl, "fcntl", refuse)))
    assert pool.borrow() is None
    assert pool.lent == 0
    assert descriptors() == before


def test_the_kernel_may_round_the_size():
    pool = PipePool(limit=2, size=5000)
    pipe = pool.borrow()
    assert 4096 <= pool.size <= fcntl.fcntl(pipe[0], pipes.F_SETPIPE_SZ + 1)
    pool.give_back(pipe)
    pool.close()
