"""The library on the LAN: a program with an address of the LAN's own DHCP server, over a bridge and over a NIC."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from lab.lan import GATEWAY, Lan
from tests.netns import eventually
from tests.qemu.test_bridged import macvtap_or_skip
from tests.qemu.test_library import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.world import World

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.environ.get("OPENVMNET_LAB_UID") != "0", reason="bridging to a host's links takes real root"),
]


@pytest.fixture(scope="module")
def lan(world: World) -> Iterator[Lan]:
    made = Lan(world)
    yield made
    made.close()


def run(lan: Lan, **asked: Any) -> dict[str, Any]:
    pipe = subprocess.PIPE
    process = lan.root(["python", "-c", PROGRAM, json.dumps(asked)], stdout=pipe, stderr=pipe, text=True)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[0])


def guest_of(lan: Lan, ifname: str) -> None:
    before = lan.links()
    found = run(lan, do="be a guest", options=f"vmnet-bridged,id=n0,ifname={ifname}", ping=[GATEWAY])
    assert found["address"].startswith("198.18.0.")
    assert lan.macs()[found["mac"]] == found["address"]
    assert found[GATEWAY]
    assert eventually(lambda: lan.links() == before)


def test_a_program_in_a_bridge(lan: Lan) -> None:
    guest_of(lan, "br0")


def test_a_program_on_a_nic(lan: Lan) -> None:
    macvtap_or_skip(lan)
    guest_of(lan, "nic0")


def test_the_interfaces_are_those_that_can_be_bridged(lan: Lan) -> None:
    found = run(lan, do="interfaces")["interfaces"]
    assert {"br0", "nic0"} <= set(found)
    assert not {"lo", "trunk0"} & set(found)  # trunk0 is the bridge's already


def test_in_a_bridge_any_mac_may_be_used_and_on_a_nic_one_has_to_be_known(lan: Lan) -> None:
    start = {"allocate_mac_address": False}
    found = run(lan, do="be a guest", options="vmnet-bridged,id=n0,ifname=br0", start=start, ping=[GATEWAY])
    assert found["mac"] == "52:54:00:de:ad:01"
    assert found[GATEWAY]
    with pytest.raises(AssertionError, match="a macvtap hears one MAC only"):
        run(lan, do="be a guest", options="vmnet-bridged,id=n0,ifname=nic0", start=start)
