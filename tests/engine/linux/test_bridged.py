"""bridged: a port in a real bridge, and what is left when making it fails; a macvtap's is in test_macvtap."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from typing import TYPE_CHECKING, Any

import pytest

from openvmnet.engine.linux import bridge_helper, bridged
from openvmnet.errors import HostError, MissingFeature, OptionError
from tests.netns import eventually, inside

if TYPE_CHECKING:
    from lab.netns import Namespace
    from lab.world import World

pytestmark = pytest.mark.kernel
MAC = "52:54:00:00:00:01"
_TUNGETIFF, _IFF_VNET_HDR = 0x800454D2, 0x4000


@pytest.fixture(scope="module")
def host(world: World) -> Namespace:
    made = world.namespace("taps")
    made.batch("link add name br0 address 02:00:00:00:00:01 type bridge", "link set br0 mtu 1400 up")
    return made


def links(host: Namespace) -> dict[str, Any]:
    shown = json.loads(host.run(["ip", "-j", "-d", "addr"]).stdout)
    return {link["ifname"]: link for link in shown}


@pytest.mark.parametrize(("isolated", "offloads"), [(False, True), (True, False)])
def test_a_tap_in_a_bridge(host: Namespace, isolated: bool, offloads: bool) -> None:
    before = links(host)
    port = inside(host, lambda: bridged.open_port("br0", MAC, isolated=isolated, offloads=offloads))
    try:
        assert (port.how, port.ifname) == ("bridge", "br0")
        assert port.link == bridged.tap_name(port.fd)
        made = links(host)[str(port.link)]
        assert (made["master"], made["mtu"], made["address"]) == ("br0", 1400, "fe:54:00:00:00:01")
        assert made["linkinfo"]["info_slave_data"]["isolated"] is isolated
        assert made["addr_info"] == []  # no link-local address of its own
        assert "UP" in made["flags"]
        bridge = links(host)["br0"]
        assert (bridge["mtu"], bridge["address"]) == (before["br0"]["mtu"], before["br0"]["address"])
        (flags,) = struct.unpack_from("16xH", fcntl.ioctl(port.fd, _TUNGETIFF, bytes(40)))
        assert bool(flags & _IFF_VNET_HDR) is offloads
        assert not os.get_inheritable(port.fd)
    finally:
        os.close(port.fd)
    assert eventually(lambda: links(host).keys() == before.keys())


def test_two_ports_have_two_names(host: Namespace) -> None:
    ports = [inside(host, lambda: bridged.open_port("br0", MAC, isolated=False)) for _ in range(2)]
    assert len({port.link for port in ports}) == 2
    for port in ports:
        os.close(port.fd)


def test_a_failure_at_any_step_leaves_nothing(host: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = links(host).keys()
    descriptors = sorted(os.listdir("/proc/self/fd"))
    real = bridged._ip
    for step in range(3):
        left = [step]

        def fail(*words: str, left: list[int] = left) -> None:
            if left[0] == 0:
                raise HostError("at this step")
            left[0] -= 1
            real(*words)

        monkeypatch.setattr(bridged, "_ip", fail)
        with pytest.raises(HostError, match="at this step"):
            inside(host, lambda: bridged.open_port("br0", MAC, isolated=True))
        assert eventually(lambda: links(host).keys() == before)
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


def test_without_the_right_the_helper_is_asked_and_never_for_isolation(
    host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def deny(*words: str) -> None:
        raise PermissionError("RTNETLINK answers: Operation not permitted")

    def helper(bridge: str, *, offloads: bool) -> int:
        asked.append((bridge, offloads))
        raise MissingFeature("the helper's own words")

    monkeypatch.setattr(bridged, "_ip", deny)
    monkeypatch.setattr(bridge_helper, "open_tap", helper)
    with pytest.raises(MissingFeature, match="the helper's own words"):
        inside(host, lambda: bridged.open_port("br0", MAC, isolated=False))
    with pytest.raises(MissingFeature, match="isolated=on on bridge 'br0' takes CAP_NET_ADMIN"):
        inside(host, lambda: bridged.open_port("br0", MAC, isolated=True))
    assert asked == [("br0", True)]


def test_a_link_that_is_not_there(host: Namespace) -> None:
    with pytest.raises(OptionError, match="unsupported ifname 'br7', expected one of"):
        inside(host, lambda: bridged.open_port("br7", MAC, isolated=False))
