"""Starting an interface: what is wrong is an error before anything is started, and a failed start leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
from ipaddress import IPv4Address, IPv6Network
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import openvmnet
from openvmnet import control, errors, messages
from openvmnet.attach import tap
from openvmnet.config import NetworkConfig, PortKind
from openvmnet.engine.linux import tap as engine_tap
from openvmnet.errors import CallerError, Conflict, Exhausted, HostError, OptionError, VmnetError
from openvmnet.netdev import Subnet
from openvmnet.status import Status
from tests.contract.test_lifetime import files

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = NetworkConfig(
    "pretended",
    subnet=Subnet(IPv4Address("10.1.0.1"), IPv4Address("10.1.0.2"), IPv4Address("10.1.0.99"), 24),
    prefix=IPv6Network("fd12:3456:789a:1::/64"),
    mtu=1400,
)


class Pretended:
    """A network whose TAPs are socket pairs; `fail` makes one step of a start fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.specs: list[messages.Spec] = []
        self.requests: list[messages.PlugRequest] = []
        self.open = 0
        self._fail: dict[str, Exception] = {}
        self._far: list[socket.socket] = []
        monkeypatch.setattr(control, "open_network", self._open)
        monkeypatch.setattr(tap, "running_config", lambda _: self._step("record") or CONFIG)
        monkeypatch.setattr(engine_tap, "_dead_end", lambda: self._step("link") or os.open("/", os.O_PATH))

    def fail(self, step: str, error: Exception) -> None:
        self._fail = {step: error}

    def _step(self, step: str) -> None:
        if step in self._fail:
            raise self._fail[step]

    def _open(self, spec: messages.Spec, *, first: PortKind, progress: Callable[[str], None]) -> Pretended:
        assert first == PortKind(isolated=first.isolated, offloads=False)
        self.specs.append(spec)
        progress("starting takes longer")
        self._step("network")
        self.open += 1
        return self

    def plug(self, request: messages.PlugRequest) -> tuple[messages.PlugReply, int]:
        self.requests.append(request)
        self._step("port")
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._far.append(far)
        return messages.PlugReply(
            "vm1", "52:54:00:aa:bb:cc" if request.allocate_mac else "", "pretended"
        ), near.detach()

    def close(self) -> None:
        self.open -= 1

    def ports(self) -> int:
        """How many ports still have an end at the interface's side."""
        alive = 0
        for far in self._far:
            far.setblocking(False)
            try:
                alive += far.recv(1) != b""
            except BlockingIOError:
                alive += 1
        return alive

    def end(self) -> None:
        for far in self._far:
            far.close()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Pretended(monkeypatch)
    yield made
    made.end()


def test_the_parameters_are_the_networks_and_the_ports(pretended: Pretended) -> None:
    ident = uuid4()
    options = openvmnet.Shared(
        start_address="10.1.0.1", end_address="10.1.0.99", subnet_mask="255.255.255.0", isolated=True, mtu=1400
    )
    with openvmnet.start(options, interface_id=str(ident), name="lab", linger=3, force=True) as interface:
        found = interface.parameters
        assert found.interface_id == ident
        assert (found.mtu, found.max_packet_size) == (1400, 1414)
        assert (found.start_address, found.end_address, found.subnet_mask) == ("10.1.0.1", "10.1.0.99", "255.255.255.0")
        assert (found.nat66_prefix, found.network) == ("fd12:3456:789a:1::", "pretended")
        assert found.mac_address == "52:54:00:aa:bb:cc"
        assert (found.read_max_packets, found.write_max_packets) == (200, 200)
        assert interface.fd is not None
        assert not os.get_inheritable(interface.fd)
        assert not os.get_blocking(interface.fd)
        with pytest.raises(AttributeError):
            found.mtu = 9000  # type: ignore[misc] # that it is frozen is the test
    (spec,), (request,) = pretended.specs, pretended.requests
    assert (spec.name, spec.linger, spec.force, spec.mtu, spec.mode) == ("lab", 3.0, True, 1400, "shared")
    assert (request.isolated, request.offloads, request.allocate_mac) == (True, False, True)
    assert pretended.open == 0


def test_host_mode_and_no_mac(pretended: Pretended) -> None:
    net = str(uuid4())
    with openvmnet.start(openvmnet.Host(net_uuid=net), allocate_mac_address=False) as interface:
        assert interface.parameters.mac_address is None
    assert (pretended.specs[0].mode, pretended.specs[0].net_uuid) == ("host", net)
    assert not pretended.requests[0].allocate_mac


def test_a_reserved_address_is_the_ports_and_needs_a_mac(pretended: Pretended) -> None:
    reserving = openvmnet.Shared(address="10.1.0.50")
    openvmnet.start(reserving).stop()
    openvmnet.start().stop()
    assert [request.address for request in pretended.requests] == ["10.1.0.50", None]
    with pytest.raises(OptionError, match="'address' goes with a MAC that is known"):
        openvmnet.start(reserving, allocate_mac_address=False)
    assert len(pretended.requests) == 2


def test_an_interface_id_decides_the_identity(pretended: Pretended) -> None:
    ident = uuid4()
    for given_id in (ident, str(ident), None, None):
        openvmnet.start(interface_id=given_id).stop()
    one, two, three, four = (request.identity for request in pretended.requests)
    assert one == two
    assert len({two, three, four}) == 3


@pytest.mark.parametrize(
    ("step", "error", "kind", "status"),
    [
        ("network", Conflict("the addresses are taken"), Conflict, Status.SHARING_SERVICE_BUSY),
        ("network", PermissionError(13, "no"), HostError, Status.FAILURE),
        ("port", Exhausted("1000 ports"), Exhausted, Status.MEM_FAILURE),
        ("record", HostError("gone"), HostError, Status.FAILURE),
        ("link", OSError(24, "Too many open files"), HostError, Status.FAILURE),
    ],
)
def test_nothing_leaks_when_start_fails_at_each_of_its_steps(
    pretended: Pretended, step: str, error: Exception, kind: type[VmnetError], status: Status
) -> None:
    gc.collect()
    before, threads = files(), threading.active_count()
    pretended.fail(step, error)
    for start in (openvmnet.start, lambda: asyncio.run(_awaited())):
        with pytest.raises(kind) as caught:
            start()
        assert caught.value.status is status
        assert pretended.open == 0
        assert pretended.ports() == 0
    pretended.end()
    gc.collect()
    assert files() == before
    assert threading.active_count() == threads


async def _awaited() -> None:
    await openvmnet.start_async()


async def test_the_asynchronous_start_gives_the_same_and_stops_it(pretended: Pretended) -> None:
    async with openvmnet.start_async() as interface:
        assert interface.running
        assert pretended.ports() == 1
    assert not interface.running
    assert pretended.ports() == 0
    awaited = await openvmnet.start_async()
    assert awaited.running
    awaited.stop()


async def test_a_cancelled_start_gives_the_port_back(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    plug = pretended.plug

    def slow(request: messages.PlugRequest) -> tuple[messages.PlugReply, int]:
        begun.set()
        go.wait(5)
        return plug(request)

    monkeypatch.setattr(pretended, "plug", slow)
    task = asyncio.ensure_future(openvmnet.start_async())
    while not begun.is_set():  # noqa: ASYNC110 - it is a thread that sets it
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    for _ in range(1000):
        await asyncio.sleep(0.002)
        if pretended.requests and not pretended.ports():
            break
    assert len(pretended.requests) == 1
    assert pretended.ports() == 0


def failure(call: Callable[[], object]) -> VmnetError | None:
    """The error that `call` ends with; any but openvmnet's own goes on."""
    try:
        call()
    except VmnetError as error:
        return error
    return None


_ODD = st.one_of(st.integers(), st.floats(), st.text(max_size=6), st.binary(max_size=4), st.lists(st.none()), st.none())


@given(
    field=st.sampled_from(["start_address", "end_address", "subnet_mask", "nat66_prefix", "isolated", "mtu", "id"]),
    value=_ODD,
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_wrong_option_is_never_an_assertion(pretended: Pretended, field: str, value: object) -> None:
    options = openvmnet.Shared(**{field: value})  # type: ignore[arg-type] # what is wrong is the test
    before = len(pretended.specs)
    error = failure(lambda: openvmnet.start(options).stop())
    if error is not None:
        assert isinstance(error, OptionError)
        assert error.status is Status.INVALID_ARGUMENT
        assert error.option == field.replace("_", "-") or "together" in error.message
        assert len(pretended.specs) == before


@given(argument=st.sampled_from(["options", "interface_id", "allocate_mac_address", "linger", "force"]), value=_ODD)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_wrong_argument_is_never_an_assertion(pretended: Pretended, argument: str, value: object) -> None:
    before = len(pretended.specs)
    error = failure(lambda: openvmnet.start(**{argument: value}).stop())  # type: ignore[arg-type] # as above
    if error is not None:
        assert isinstance(error, CallerError)
        assert error.status is Status.INVALID_ARGUMENT
        assert len(error.message) > 20
        assert len(pretended.specs) == before


def test_no_number_of_seconds_is_too_large_to_be_refused(pretended: Pretended) -> None:
    with pytest.raises(OptionError, match="'linger' expects seconds"):
        openvmnet.start(linger=10**400)
    with pytest.raises(OptionError, match=r"'name' is for .*Shared and Host"):
        openvmnet.start(openvmnet.Bridged(ifname="eth0"), name="lab")


@pytest.mark.parametrize("name", [5, b"x", True])
def test_a_name_is_text(pretended: Pretended, name: object) -> None:
    with pytest.raises(OptionError, match="'name' expects str"):
        openvmnet.start(name=name)  # type: ignore[arg-type] # that it is wrong is the test


def test_every_name_of_the_package_is_there_and_nothing_is_imported_for_it() -> None:
    program = (
        "import sys, openvmnet\n"
        "assert not {'msgspec', 'asyncio', 'socket', 'openvmnet.control'} & set(sys.modules)\n"
        "for name in openvmnet.__all__: getattr(openvmnet, name)\n"
        "assert set(openvmnet.__all__) <= set(dir(openvmnet))\n"
        "try: openvmnet.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "module 'openvmnet' has no attribute 'nothing'\n"), done.stderr


def test_interfaces_are_the_names_that_bridged_takes() -> None:
    found = openvmnet.interfaces()
    assert "lo" not in found
    assert all(isinstance(name, str) for name in found)


def test_every_error_has_a_status_and_keeps_a_given_one() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VmnetError)]
    assert len(kinds) >= 12
    for kind in kinds:
        assert kind.status in Status
    assert HostError("x", status=Status.NOT_AUTHORIZED).status is Status.NOT_AUTHORIZED
    assert HostError("x").status is Status.FAILURE
