"""What the tests of the lane share."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture
def pair():
    one, other = socket.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    with one, other:
        yield one, other
