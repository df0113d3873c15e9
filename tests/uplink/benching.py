"""What the benches of the uplinks' tests share: a loop that is turned by hand, and no descriptor left at the end."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openvmnet.kernel.loop import Lane


class Closing(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=Closing)


def turn(lane: Lane, seconds: float) -> None:
    """Let the lane do what there is for some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lane.select(0.002)


@contextlib.contextmanager
def closed(make: Callable[[], _T]) -> Iterator[_T]:
    """What `make` gives, closed at the end, with every descriptor that it opened."""
    before = set(os.listdir("/proc/self/fd"))
    made = make()
    try:
        yield made
    finally:
        made.close()
    assert set(os.listdir("/proc/self/fd")) == before
