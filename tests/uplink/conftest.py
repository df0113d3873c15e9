"""A network with guests that are namespaces, in the lab's world."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lab.netguest import PluggedNetwork

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.netns import Namespace
    from lab.world import World


@pytest.fixture(scope="module")
def network(world: World) -> Iterator[PluggedNetwork]:
    """A network of the product's, run by an unprivileged user."""
    with PluggedNetwork(world, "uplink") as made:
        yield made


@pytest.fixture(scope="module")
def guest(network: PluggedNetwork) -> Namespace:
    """A guest of it."""
    return network.plug()


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "crowded"])
def crowd(request: pytest.FixtureRequest) -> None:
    """Every test of a module that asks for it, with the guest of its `Bench` alone, and among several."""
    request.module.Bench.crowded = request.param
