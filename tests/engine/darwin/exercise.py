"""Every call of the framework and every end of it, once: what the sanitizers watch. `python -m ... LIBRARY`.

Nothing here waits on the clock, so that it may run thirty times slower. It prints which functions were called: all of
them, or it fails.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from ipaddress import IPv4Address, IPv6Network
from pathlib import Path
from uuid import uuid4

from lab import standin
from openvmnet.contract.interface import Interface, LinkRequest
from openvmnet.engine.darwin import symbols
from openvmnet.engine.darwin.batch import Batch
from openvmnet.engine.darwin.bridged import shared_interfaces
from openvmnet.engine.darwin.datapath import Relay, socketpair
from openvmnet.engine.darwin.description import Extras, describe
from openvmnet.engine.darwin.framework import Framework, Mode
from openvmnet.engine.darwin.handle import Handle, StartFailed
from openvmnet.engine.darwin.interface import open_link
from openvmnet.engine.darwin.network26 import Network, Reservation, Settings
from openvmnet.engine.darwin.ports import Forward, Rules
from openvmnet.errors import HostError
from openvmnet.netdev import Bridged, Host, Shared, Subnet
from openvmnet.status import Status

SHARED = {"vmnet_operation_mode": Mode.SHARED}
PATIENCE = 120.0  # s


class Watching:
    """Which functions were asked for."""

    def __init__(self, framework: Framework) -> None:
        self.called: set[str] = set()
        for library in (framework.vmnet, framework.system, framework.foundation):
            library.function = self._watch(library.function)

    def _watch(self, function):
        def watched(name: str):
            self.called.add(name)
            return function(name)

        return watched


def modes(framework: Framework) -> None:
    for options, extras in (
        (Shared(isolated=True, mtu=9000), Extras(interface_id=uuid4(), allocate_mac_address=True)),
        (Host(net_uuid=str(uuid4())), Extras()),
        (Bridged(ifname="en0"), Extras(virtio_header=True)),
    ):
        Handle(framework, describe(framework, options, extras), timeout=PATIENCE).stop(PATIENCE)
    assert shared_interfaces(framework) == ["en0", "en1"]


def refusals(framework: Framework, control: standin.Standin) -> None:
    for status in Status:
        control.set("vmnet_start_interface", status if status is not Status.SUCCESS else 1099)
        try:
            Handle(framework, SHARED, timeout=PATIENCE)
        except StartFailed:
            continue
        raise AssertionError(status)
    control.set("vmnet_start_interface", 0)
    handle = Handle(framework, SHARED, timeout=PATIENCE)
    batch = Batch(2, 2048)
    for status in Status:
        for name, call in (("vmnet_read", handle.read), ("vmnet_write", handle.write)):
            control.set(name, status if status is not Status.SUCCESS else 0)
            batch.renew(1)
            if name == "vmnet_write":
                batch.put(0, bytes(60))
            assert call(batch.packets, 1)[0] == status
            control.set(name, 0)
    handle.stop(PATIENCE)


def link(framework: Framework, control: standin.Standin) -> None:
    control.memory()
    with Interface(open_link(LinkRequest(Shared(), uuid4()), framework)) as interface:
        got: list[bytes] = []
        interface.on_packets_available(lambda: got.extend(interface.read()))
        for number in range(300):
            control.send(number.to_bytes(60, "big"))
        deadline = time.monotonic() + PATIENCE
        while len(got) < 300 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [int.from_bytes(each, "big") for each in got] == list(range(300))
        interface.write([bytes(60)] * 100)


def relay(framework: Framework, control: standin.Standin) -> None:
    far, wire = socketpair()
    ours, vm = socketpair()
    control.wire(wire.fileno())
    handle = Handle(framework, SHARED, timeout=PATIENCE)
    moving = Relay(framework, handle, ours)
    moving.start()
    far.settimeout(PATIENCE)
    vm.settimeout(PATIENCE)
    for number in range(200):
        far.send(number.to_bytes(42, "big"))
        vm.send(number.to_bytes(60 + number, "big"))
        assert int.from_bytes(vm.recv(2048)[:42], "big") == number
        assert int.from_bytes(far.recv(2048), "big") == number
    vm.send(bytes(3))
    vm.send(bytes(1600))
    vm.send(bytes(64))
    assert len(far.recv(2048)) == 64
    moving.stop()
    handle.stop(PATIENCE)
    for each in (far, wire, ours, vm):
        each.close()


def rules(framework: Framework, control: standin.Standin) -> None:
    handle = Handle(framework, SHARED, timeout=PATIENCE)
    published = Rules(framework, handle)
    forwards = [Forward("tcp", 80, "192.168.64.9", 8080), Forward("udp", 53, "fd00::9", 53)]
    for forward in forwards:
        published.add(forward)
    assert published.get() == forwards
    for forward in forwards:
        published.remove(forward)
    has = framework.vmnet.has
    framework.vmnet.has = lambda symbol: "_ip_port_" not in symbol and has(symbol)  # type: ignore[method-assign]
    published.add(forwards[0])
    assert published.get() == forwards[:1]
    published.remove(forwards[0])
    framework.vmnet.has = has  # type: ignore[method-assign]
    handle.stop(PATIENCE)


def networks(framework: Framework) -> None:
    gateway = IPv4Address("10.7.0.1")
    settings = Settings(
        subnet=Subnet(gateway, gateway + 1, gateway + 9, 24),
        prefix=IPv6Network("fd77::/64"),
        mtu=9000,
        external_interface="en0",
        reservations=(Reservation("52:54:00:12:34:56", gateway + 5),),
        forwards=(Forward("tcp", 80, "10.7.0.9", 8080),),
        nat44=False,
        nat66=False,
        dhcp=False,
        dns_proxy=False,
        router_advertisement=False,
    )
    with Network(framework, Mode.SHARED, settings, timeout=PATIENCE) as network:
        assert (str(network.subnet), str(network.prefix)) == ("10.7.0.0/24", "fd77::/64")
        serialization = network.serialize()
        Network.of_serialization(framework, Mode.SHARED, serialization).release()
        framework.system_call("xpc_release", framework.system_call("xpc_retain", serialization))
        framework.system_call("xpc_release", serialization)
        network.start(Extras(tso=True), timeout=PATIENCE).stop(PATIENCE)
    status = Status.SUCCESS
    try:
        Network(framework, Mode.BRIDGED, Settings(), timeout=PATIENCE)
    except HostError as error:
        status = error.status
    assert status is Status.INVALID_ARGUMENT


def values(framework: Framework, control: standin.Standin) -> None:
    from openvmnet.engine.darwin import xpc

    library = control.library
    for name in ("xpc_int64_create", "xpc_array_create"):
        getattr(library, name).restype = ctypes.c_void_p
    number = library.xpc_int64_create(ctypes.c_int64(-1))
    array = library.xpc_array_create((ctypes.c_void_p * 1)(number), ctypes.c_size_t(1))
    assert xpc.read(framework, array) == [-1]
    with xpc.dictionary(framework, {"vmnet_enable_tso": True, "vmnet_mtu": 1}) as made:
        assert xpc.read(framework, made) == {"vmnet_enable_tso": True, "vmnet_mtu": 1}
    framework.system_call("xpc_release", array)
    framework.system_call("xpc_release", number)


def main() -> None:
    logging.disable(logging.WARNING)
    control = standin.Standin(Path(sys.argv[1]))
    framework = Framework(sys.argv[1])
    watching = Watching(framework)
    modes(framework)
    refusals(framework, control)
    link(framework, control)
    relay(framework, control)
    rules(framework, control)
    networks(framework)
    values(framework, control)
    missing = {*symbols.VMNET, *symbols.SYSTEM, *symbols.FOUNDATION} - watching.called
    assert not missing, missing
    deadline = time.monotonic() + PATIENCE
    while (control.interfaces(), control.objects()) != (0, [1, 0, 0, 0, 0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (control.interfaces(), control.objects()) == (0, [1, 0, 0, 0, 0]), control.objects()  # the global queue
    print(f"{len(watching.called)} functions, nothing left")


if __name__ == "__main__":
    main()
