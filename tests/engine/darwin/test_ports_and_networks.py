"""Published ports by both sets of calls, and the network objects of macOS 26, function by function."""

from __future__ import annotations

import ctypes
import socket
import threading
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import TYPE_CHECKING

import pytest

from openvmnet.contract.interface import Interface
from openvmnet.engine.darwin.description import Extras
from openvmnet.engine.darwin.framework import Mode
from openvmnet.engine.darwin.handle import Handle, StartFailed
from openvmnet.engine.darwin.interface import open_on
from openvmnet.engine.darwin.network26 import Network, Reservation, Settings
from openvmnet.engine.darwin.patience import Late
from openvmnet.engine.darwin.ports import Forward, Rules
from openvmnet.errors import HostError, MissingFeature, OptionError, Stopped
from openvmnet.netdev import Subnet
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls

SHARED = {"vmnet_operation_mode": Mode.SHARED}
WEB = Forward("tcp", 8080, "192.168.64.7", 80)
DNS = Forward("udp", 5353, "192.168.64.8", 53)
SIX = Forward("tcp", 8443, "fd0c:5f2a::7", 443)
SUBNET = Subnet(IPv4Address("10.7.0.1"), IPv4Address("10.7.0.2"), IPv4Address("10.7.0.254"), 24)


def test_rules_are_added_listed_and_removed(framework: Framework, controls: Controls) -> None:
    handle = Handle(framework, SHARED)
    rules = Rules(framework, handle)
    assert rules.get() == []
    for forward in (WEB, DNS, SIX):
        rules.add(forward)
    assert rules.get() == [WEB, DNS, SIX]
    rules.remove(DNS)
    assert rules.get() == [WEB, SIX]
    with pytest.raises(HostError, match="general failure") as caught:
        rules.add(WEB)
    assert caught.value.status is Status.FAILURE
    with pytest.raises(HostError, match="invalid argument"):
        rules.remove(DNS)
    handle.stop()
    with pytest.raises(Stopped):
        rules.get()


def test_the_older_calls_serve_where_the_newer_are_missing(macos: Callable[[int], tuple[Controls, Framework]]) -> None:
    _, older = macos(1015)
    handle = Handle(older, SHARED)
    rules = Rules(older, handle)
    rules.add(WEB)
    rules.add(DNS)
    assert rules.get() == [WEB, DNS]
    rules.remove(WEB)
    assert rules.get() == [DNS]
    for call in (rules.add, rules.remove):
        with pytest.raises(MissingFeature, match=r"IPv6 addresses need macOS 11\.0"):
            call(SIX)
    handle.stop()


def test_rules_are_for_shared_mode(framework: Framework, controls: Controls) -> None:
    handle = Handle(framework, {"vmnet_operation_mode": Mode.HOST})
    with pytest.raises(HostError, match="invalid argument"):
        Rules(framework, handle).add(WEB)
    handle.stop()


@pytest.mark.parametrize(
    "forward",
    [Forward("tcp", 0, "10.0.0.1", 80), Forward("tcp", 80, "10.0.0.1", 65536), Forward("tcp", 80, "guest", 80)],
)
def test_what_is_no_port_or_address_is_refused(framework: Framework, controls: Controls, forward: Forward) -> None:
    handle = Handle(framework, SHARED)
    with pytest.raises(OptionError):
        Rules(framework, handle).add(forward)
    handle.stop()


@pytest.mark.parametrize(
    ("function", "use"),
    [
        ("vmnet_interface_add_ip_port_forwarding_rule", lambda rules: rules.add(WEB)),
        ("vmnet_interface_remove_ip_port_forwarding_rule", lambda rules: rules.remove(WEB)),
        ("vmnet_interface_get_ip_port_forwarding_rules", lambda rules: rules.get()),
    ],
)
def test_a_call_that_vmnet_refuses_bears_its_status(
    framework: Framework, controls: Controls, function: str, use: Callable[[Rules], object]
) -> None:
    handle = Handle(framework, SHARED)
    controls.set(function, Status.NOT_AUTHORIZED)
    with pytest.raises(HostError, match="not authorized") as caught:
        use(Rules(framework, handle))
    assert caught.value.status is Status.NOT_AUTHORIZED
    handle.stop()


# Network objects.


def configuration(controls: Controls, pointer: int, what: int) -> int:
    function = controls.library.standin_configuration
    function.restype, function.argtypes = ctypes.c_long, (ctypes.c_void_p, ctypes.c_int)
    return int(function(pointer, what))


def test_every_setting_reaches_the_configuration(
    framework: Framework, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[int, int] = {}
    create = Network._create

    def spy(self: Network, name: str, argument: int) -> int:
        if name == "vmnet_network_create":
            said.update({what: configuration(controls, argument, what) for what in range(8)})
        return create(self, name, argument)

    monkeypatch.setattr(Network, "_create", spy)
    settings = Settings(
        subnet=SUBNET,
        prefix=IPv6Network("fd77::/64"),
        mtu=9000,
        external_interface="en5",
        reservations=(Reservation("52:54:00:12:34:56", IPv4Address("10.7.0.50")),),
        forwards=(Forward("tcp", 8080, "10.7.0.50", 80),),
        nat44=False,
        nat66=False,
        dhcp=False,
        dns_proxy=False,
        router_advertisement=False,
    )
    with Network(framework, Mode.SHARED, settings) as network:
        assert (network.subnet, network.prefix) == (IPv4Network("10.7.0.0/24"), IPv6Network("fd77::/64"))
    assert said == {0: 0, 1: 9000, 2: 8080, 3: 80, 4: int(IPv4Address("10.7.0.50")), 5: 0x56, 6: ord("5"), 7: 50}


def test_defaults_leave_every_service_on(framework: Framework, controls: Controls) -> None:
    with Network(framework, Mode.HOST, Settings()) as network:
        assert network.subnet.prefixlen == 24
        assert network.prefix.prefixlen == 64


def test_interfaces_start_on_a_network_and_keep_it(framework: Framework, controls: Controls) -> None:
    network = Network(framework, Mode.SHARED, Settings(subnet=SUBNET, mtu=4000))
    one = network.start(Extras(), isolated=True)
    two = network.start(Extras(tso=True))
    assert one.text("vmnet_start_address") == "10.7.0.1"
    assert (one.mtu, one.largest, two.largest) == (4000, 4014, 65550)
    network.release()
    network.release()
    with pytest.raises(Stopped):
        network.start(Extras())
    with pytest.raises(StartFailed):  # pinned: it is the network's as long as anybody is on it
        Network(framework, Mode.SHARED, Settings(subnet=SUBNET))
    one.stop()
    two.stop()
    Network(framework, Mode.SHARED, Settings(subnet=SUBNET)).release()


def test_the_library_works_on_a_network(framework: Framework, controls: Controls) -> None:
    with Network(framework, Mode.SHARED, Settings(dhcp=False)) as network:
        controls.library.standin_memory()
        with Interface(open_on(network, isolated=True)) as interface:
            assert interface.parameters.mac_address is not None
            assert controls.library.standin_send(bytes(60), 60)
            assert interface.wait(5)
            assert interface.read() == [bytes(60)]
            interface.write([bytes(100)])


def test_a_network_is_found_again_by_its_serialization(framework: Framework, controls: Controls) -> None:
    network = Network(framework, Mode.SHARED, Settings(subnet=SUBNET))
    serialization = network.serialize()
    same = Network.of_serialization(framework, Mode.SHARED, serialization)
    framework.system_call("xpc_release", serialization)
    network.release()
    assert same.subnet == IPv4Network("10.7.0.0/24")
    same.start(Extras()).stop()
    same.release()
    controls.set("vmnet_network_copy_serialization", Status.FAILURE)
    with Network(framework, Mode.SHARED, Settings()) as other, pytest.raises(StartFailed):
        other.serialize()


def test_what_is_no_serialization_is_refused(framework: Framework, controls: Controls) -> None:
    empty = framework.system_call("xpc_dictionary_create", None, None, 0)
    with pytest.raises(StartFailed) as caught:
        Network.of_serialization(framework, Mode.SHARED, empty)
    assert caught.value.status is Status.INVALID_ARGUMENT
    framework.system_call("xpc_release", empty)


@pytest.mark.parametrize(
    ("mode", "settings", "status"),
    [
        (Mode.BRIDGED, Settings(), Status.INVALID_ARGUMENT),
        (Mode.HOST, Settings(external_interface="en0"), Status.INVALID_ARGUMENT),
        (Mode.SHARED, Settings(mtu=70000), Status.INVALID_ARGUMENT),
        (Mode.SHARED, Settings(prefix=IPv6Network("2001:db8::/64")), Status.INVALID_ARGUMENT),
        (Mode.SHARED, Settings(forwards=(Forward("tcp", 0, "10.0.0.1", 80),)), Status.INVALID_ARGUMENT),
        (Mode.SHARED, Settings(reservations=(Reservation("nonsense", IPv4Address("10.0.0.1")),)), 1003),
    ],
)
def test_a_setting_that_is_wrong_is_an_error_and_leaves_nothing(
    framework: Framework, controls: Controls, mode: Mode, settings: Settings, status: int
) -> None:
    with pytest.raises((HostError, OptionError)) as caught:
        Network(framework, mode, settings)
    assert caught.value.status == status


def test_the_subnets_own_address_fails_without_a_word_and_so_the_gateways_is_passed(
    framework: Framework, controls: Controls
) -> None:
    wrong = Subnet(IPv4Address("10.8.0.0"), IPv4Address("10.8.0.1"), IPv4Address("10.8.0.9"), 24)
    with pytest.raises(StartFailed) as caught:
        Network(framework, Mode.SHARED, Settings(subnet=wrong))
    assert caught.value.status is Status.FAILURE
    Network(framework, Mode.SHARED, Settings(subnet=wrong, dhcp=False)).release()


def test_without_an_entitlement_it_is_a_memory_failure(framework: Framework, controls: Controls) -> None:
    controls.set("not_root", 1)
    with pytest.raises(StartFailed) as caught:
        Network(framework, Mode.SHARED, Settings())
    assert caught.value.status is Status.MEM_FAILURE


def test_a_create_that_hangs_is_given_up(framework: Framework, controls: Controls) -> None:
    controls.set("hang_network", 1)
    with pytest.raises(Late, match="vmnet_network_create"):
        Network(framework, Mode.SHARED, Settings(), timeout=0.2)
    controls.set("hang_network", 0)
    for thread in threading.enumerate():
        if thread.name == "vmnet_network_create":
            thread.join(5)
    # What came too late is released: the fixture finds none left.


def test_older_macos_has_no_networks(macos: Callable[[int], tuple[Controls, Framework]]) -> None:
    _, older = macos(1504)
    with pytest.raises(MissingFeature, match=r"vmnet_network_configuration_create: it came with macOS 26\.0"):
        Network(older, Mode.SHARED, Settings())
    assert socket.AF_INET == 2  # what vmnet's family numbers are for IPv4 on every system
