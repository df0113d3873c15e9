"""Fixtures of the tests that need the lab: its world, and real guests in it.

`scripts/test` runs pytest in the lab. Run plainly, pytest skips what needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lab import enter
from lab.guest import Guest, qemu
from lab.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of a test that failed, report what the consoles of the world's guests said."""
    report = yield
    world = getattr(item, "funcargs", {}).get("world")
    if report.failed and isinstance(world, World):
        for guest in world.guests:
            report.sections.append((f"console of {guest.name}", guest.log()[-5000:]))
    return report


@pytest.fixture(scope="session")
def lab() -> None:
    """Nothing but a guarantee: what uses it runs in the lab, or is skipped."""
    if not enter.inside():
        pytest.skip("needs the lab: run scripts/test")


@pytest.fixture(scope="module")
def world(lab: None) -> Iterator[World]:
    """A world for the tests of one module, with nothing of the product left at its end."""
    with World() as made:
        yield made


@pytest.fixture
def boot(world: World) -> Iterator[Callable[..., Guest]]:
    """Start a guest in the world, killed at the test's end: `boot(*network, name=..., wrap=["vmnet", "run", "--"])`.

    Waits for its boot unless `wait=False`.
    """
    guests: list[Guest] = []

    def start(
        *network: str, wrap: list[str] | None = None, name: str = "", wait: bool = True, **options: object
    ) -> Guest:
        env = options.pop("env", None)
        argv = [*(wrap or []), *qemu(*network, **options)]
        guest = world.guest(argv, name=name or f"guest{len(guests) + 1}", env=env)
        guests.append(guest)
        if wait:
            guest.wait_boot()
        return guest

    yield start
    for guest in guests:
        guest.kill()
