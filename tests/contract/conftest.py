"""The contract's tests run over each engine: `rig` is its wire, `interface` an interface on it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from openvmnet.contract.interface import Interface
from tests.contract.engines import ENGINES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.contract.engines import Rig


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.kernel if "tap" in name else ()) for name in ENGINES])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """One engine's wire, in a short path: it holds a unix socket."""
    with tempfile.TemporaryDirectory() as directory, ENGINES[request.param](Path(directory)) as made:
        yield made


@pytest.fixture
def interface(rig: Rig) -> Iterator[Interface]:
    """An interface on the rig, stopped at the end."""
    with Interface(rig.link()) as made:
        yield made


def until(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    """Wait for `condition`; whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@contextlib.contextmanager
def cpu() -> Iterator[Callable[[], float]]:
    """The share of a CPU that this process takes, asked at the end."""
    began, used = time.monotonic(), time.process_time()
    yield lambda: (time.process_time() - used) / (time.monotonic() - began)
