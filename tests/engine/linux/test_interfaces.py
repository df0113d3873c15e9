"""interfaces: which links can be bridged to, from made-up hosts and from the kernel's own links."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from openvmnet.engine.linux import bridge_helper, interfaces
from openvmnet.engine.linux.bridge_helper import Obstacle
from openvmnet.errors import OptionError
from openvmnet.kernel.linkinfo import LinkInfo
from tests.netns import inside

if TYPE_CHECKING:
    from pathlib import Path

    from lab.world import World

UP = 1
LO = LinkInfo(1, "lo", "", 772, UP | 8, 65536, "00:00:00:00:00:00", True, 0, 0, "", 0.0)
ETH0 = LinkInfo(2, "eth0", "", 1, UP, 1500, "02:00:00:00:00:02", True, 0, 0, "", 0.0)
BR0 = LinkInfo(3, "br0", "bridge", 1, UP, 1500, "02:00:00:00:00:03", True, 0, 0, "", 0.0)


@pytest.fixture
def plain_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "capabilities", lambda: 0)
    monkeypatch.setattr(bridge_helper, "lacks", lambda bridge: f"allow {bridge}")


@pytest.fixture
def radio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "_radio", lambda link: link.name.startswith("wl"))


def reason(link: LinkInfo, *others: LinkInfo) -> str | None:
    return interfaces.inventory([*others, link])[-1].reason


@pytest.mark.usefixtures("radio")
def test_each_refusal_names_its_cause_and_what_to_name_instead() -> None:
    eth1 = ETH0._replace(ifindex=9, name="eth1")
    bond = BR0._replace(name="bond0", kind="bond")
    team = BR0._replace(name="team0", kind="team")
    vrf = BR0._replace(name="red", kind="vrf")
    ovs = BR0._replace(name="ovs-system", kind="openvswitch")
    assert reason(LO) == "is the loopback: nothing is at its other end"
    assert "is wireless" in str(reason(eth1._replace(name="wlan0")))
    assert "vmnet-shared" in str(reason(eth1._replace(name="wlan0")))
    assert "no Ethernet frames" in str(reason(eth1._replace(kind="tun", hardware=65534)))
    assert (
        reason(eth1._replace(kind="macvlan", lower=2), ETH0) == "is itself a macvlan on another NIC: name eth0 instead"
    )
    assert reason(eth1._replace(kind="macvtap", lower=0)) == "is itself a macvtap on another NIC"
    assert reason(eth1._replace(master=3, master_kind="bridge"), BR0) == "is a port of bridge br0: name br0 instead"
    assert reason(eth1._replace(master=3), bond) == "is a port of bond bond0: name bond0 instead"
    assert reason(eth1._replace(master=3), team) == "is a port of team team0: name team0 instead"
    assert reason(eth1._replace(master=3, master_kind="bridge")) == "is a port of a bridge elsewhere"
    assert "Open vSwitch" in str(reason(eth1._replace(master=3), ovs))
    assert "Open vSwitch" in str(reason(eth1._replace(kind="openvswitch")))
    assert "VRF" in str(reason(vrf))
    assert reason(eth1._replace(flags=0)) == "is down: sudo ip link set eth1 up"
    assert reason(BR0._replace(flags=0)) == "is down: sudo ip link set br0 up"
    for kind in ("", "veth", "vlan", "bond", "team", "dummy", "vxlan", "tun"):
        assert reason(eth1._replace(kind=kind)) is None
    assert reason(eth1._replace(master=3, master_kind="vrf"), vrf) is None


def test_the_way_the_state_and_what_is_needed(plain_user: None, radio: None) -> None:
    vlan = ETH0._replace(ifindex=5, name="eth0.5", kind="vlan", carrier=False)
    slow = BR0._replace(name="br1", settling=30.0)
    found = {each.name: each for each in interfaces.inventory([LO, ETH0, BR0, vlan, slow])}
    assert (found["br0"].how, found["br0"].needs, found["br0"].note) == ("bridge", "allow br0", None)
    assert (found["eth0"].how, found["eth0"].needs) == ("macvtap", "root")
    assert found["eth0"].note == interfaces.MACVTAP_LIMIT
    assert (found["eth0.5"].kind, found["eth0.5"].state, found["eth0.5"].how) == ("vlan", "no carrier", "macvtap")
    assert found["br1"].note == "spanning tree: a new port is silent for 30 s"
    assert (found["lo"].how, found["lo"].needs, found["lo"].kind) == (None, None, "loopback")


def test_root_needs_nothing(monkeypatch: pytest.MonkeyPatch, radio: None) -> None:
    monkeypatch.setattr(interfaces, "capabilities", lambda: (1 << 41) - 1)
    monkeypatch.setattr(interfaces, "_read", lambda path: "0 0 4294967295\n")
    monkeypatch.setattr(bridge_helper, "lacks", lambda bridge: Obstacle("never", "asked"))
    assert [each.needs for each in interfaces.inventory([ETH0, BR0])] == [None, None]
    # A user namespace's root is shown every capability, and may not make the node.
    monkeypatch.setattr(interfaces, "_read", lambda path: "0 1000 1\n")
    assert [each.needs for each in interfaces.inventory([ETH0, BR0])] == ["root", None]


def test_a_name_that_is_refused_is_answered_in_qemus_words(plain_user: None, radio: None) -> None:
    wlan = ETH0._replace(ifindex=7, name="wlan0")
    assert interfaces.find("br0", [LO, ETH0, BR0]).how == "bridge"
    with pytest.raises(OptionError) as none:
        interfaces.find("eth7", [LO, ETH0, BR0, wlan])
    assert str(none.value) == "unsupported ifname 'eth7', expected one of [ br0 eth0 ]: no link has that name"
    assert (none.value.option, none.value.value, none.value.hint) == ("ifname", "eth7", "vmnet interfaces")
    with pytest.raises(OptionError) as radio_only:
        interfaces.find("wlan0", [LO, wlan])
    assert str(radio_only.value).startswith(
        "unsupported ifname 'wlan0', no supported interfaces available: wlan0 is wireless: "
    )


def test_a_radio_is_known_by_its_directory_or_by_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "_SYSFS", str(tmp_path))
    directory = tmp_path / "eth0"
    directory.mkdir()
    (directory / "ifindex").write_text("2\n")
    (directory / "address").write_text(f"{ETH0.mac}\n")
    assert not interfaces._radio(ETH0)
    (directory / "phy80211").mkdir()
    assert interfaces._radio(ETH0)
    # Another namespace's eth0: then the link itself is asked, and the test's own has no such link.
    assert not interfaces._radio(ETH0._replace(ifindex=3))
    asked = []

    def answer(sock: object, request: int, name: bytes) -> bytes:
        asked.append((request, name.rstrip(b"\0")))
        return name

    assert interfaces._answers_wireless("wlan0", answer)
    assert asked == [(0x8B01, b"wlan0")]

    def refuse(sock: object, request: int, name: bytes) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "not a radio")

    assert not interfaces._answers_wireless("eth0", refuse)


@pytest.mark.kernel
def test_what_the_kernel_has(world: World) -> None:
    """Links of every kind that this kernel makes."""
    host = world.namespace("kinds")
    host.batch(
        "link add name br0 type bridge stp_state 1 forward_delay 400",
        "link add name nic0 type veth peer name far0",
        "link add name nic1 type veth peer name far1",
        "link set nic0 master br0",
        "link set br0 up",
        "link set nic0 up",
        "link set nic1 mtu 1400 up",
        "link set far1 up",
        "link add link nic1 name sub0 type macvlan mode bridge",
        "tuntap add dev l3 mode tun",
        "tuntap add dev l2 mode tap",
        "link set l2 up",
    )
    found = {each.name: each for each in inside(host, interfaces.inventory)}
    assert (found["br0"].kind, found["br0"].how, found["br0"].reason) == ("bridge", "bridge", None)
    assert found["br0"].note == "spanning tree: a new port is silent for 8 s"
    assert found["nic0"].reason == "is a port of bridge br0: name br0 instead"
    assert (found["nic1"].kind, found["nic1"].how, found["nic1"].mtu) == ("veth", "macvtap", 1400)
    assert (found["nic1"].state, found["l2"].state, found["l3"].state) == ("up", "no carrier", "down")
    assert found["nic1"].note == (
        f"{interfaces.MACVTAP_LIMIT}; MTU 1400: tell the guest, by -device virtio-net-pci,host_mtu=1400"
    )
    assert found["sub0"].reason == "is itself a macvlan on another NIC: name nic1 instead"
    assert found["far0"].reason == "is down: sudo ip link set far0 up"
    assert found["l3"].how is None
    assert "no Ethernet frames" in str(found["l3"].reason)
    assert (found["l2"].kind, found["l2"].how) == ("tap", "macvtap")
    assert found["lo"].kind == "loopback"
    assert not inside(host, lambda: interfaces._answers_wireless("nic1"))
