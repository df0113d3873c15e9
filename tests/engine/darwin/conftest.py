"""Fixtures of the macOS engine's tests: the stand-in, built from source, and a framework over it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from lab import standin
from openvmnet import engine
from openvmnet.engine.darwin.framework import Framework

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_REST = [0, 1, 0, 0, 0, 0]  # nothing but the global queue
_loaded: dict[int, tuple[standin.Standin, Framework]] = {}


def loaded(macos: int) -> tuple[standin.Standin, Framework]:
    """The stand-in for one macOS and a framework over it, once for the process."""
    if engine.DARWIN:
        pytest.skip("the stand-in is Linux's, and this is a Mac")
    if macos not in _loaded:
        if standin.compiler() is None:
            pytest.skip("needs a C compiler (package gcc)")
        control = standin.Standin(standin.library(macos))
        _loaded[macos] = (control, Framework(str(control.path)))
    return _loaded[macos]


class Controls:
    """The stand-in's settings, all of them at rest again after the test."""

    def __init__(self, control: standin.Standin) -> None:
        self._control = control
        self._changed: set[str] = set()
        self.library = control.library
        self.path = control.path

    def set(self, name: str, value: int) -> None:
        self._changed.add(name)
        self._control.set(name, value)

    def rest(self) -> None:
        for name in self._changed:
            self._control.set(name, 0)

    def count(self, name: str) -> int:
        return self._control.count(name)

    def wire(self, fd: int) -> None:
        self._control.wire(fd)

    def left(self) -> list[int]:
        """What lives: interfaces, then objects by kind; the global queue, which is for ever, not counted."""
        return [self._control.interfaces(), *self._control.objects()]


def _fixture(macos: int) -> Iterator[tuple[Controls, Framework]]:
    control, framework = loaded(macos)
    controls = Controls(control)
    control.library.dispatch_get_global_queue(0, 0)
    eventually(lambda: controls.left() == _REST)
    before = controls.left()  # at rest, unless an earlier test failed: what it holds is not this one's
    yield controls, framework
    controls.rest()
    eventually(lambda: controls.left() in (_REST, before))
    assert controls.left() in (_REST, before), "interfaces, queues, semaphores, xpc objects, configurations, networks"


@pytest.fixture
def _newest() -> Iterator[tuple[Controls, Framework]]:
    yield from _fixture(2600)


@pytest.fixture
def controls(_newest: tuple[Controls, Framework]) -> Controls:
    """The controls of the stand-in for macOS 26; at the test's end nothing of it may be left."""
    return _newest[0]


@pytest.fixture
def framework(_newest: tuple[Controls, Framework]) -> Framework:
    """A framework over it."""
    return _newest[1]


@pytest.fixture
def macos() -> Iterator[Callable[[int], tuple[Controls, Framework]]]:
    """The same for another macOS: `macos(1015)`."""
    running: list[Iterator[tuple[Controls, Framework]]] = []

    def start(version: int) -> tuple[Controls, Framework]:
        running.append(_fixture(version))
        return next(running[-1])

    yield start
    for each in running:
        next(each, None)


def eventually(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    """Whether `condition` comes to hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
