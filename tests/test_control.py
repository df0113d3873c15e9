"""The control socket, both ends, over a network that is only pretended."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from ipaddress import IPv6Network

import msgspec
import pytest

from openvmnet import control, errors, messages, state
from openvmnet.config import NetworkConfig
from openvmnet.control import Client
from openvmnet.controlserver import _CLIENTS, ControlServer
from openvmnet.errors import Conflict, HostError, NotFound
from openvmnet.kernel.loop import run
from openvmnet.messages import NetworkView, PlugReply, PlugRequest, Spec
from openvmnet.netdev import Subnet

REQUEST = PlugRequest(vm="v", netdev="n0", mac=None, identity="v", index=0, isolated=False, pid=1)
VIEW = NetworkView("x", "shared", "10.0.0.0/24", "10.0.0.1", "10.0.0.2", "10.0.0.9", "10.0.0.1", "d", 1500, 1, 1.0)


class Pretended:
    """A network whose TAPs are pipes."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.plugged = 0

    async def plug(self, request: PlugRequest) -> tuple[PlugReply, int]:
        if self.error is not None:
            raise self.error
        await asyncio.sleep(0.001)
        self.plugged += 1
        read, write = os.pipe()
        os.write(write, b"the TAP")
        os.close(write)
        return PlugReply(f"vm{self.plugged}", request.mac or "52:54:00:00:00:01", "x"), read

    async def view(self) -> NetworkView:
        return VIEW


class Served:
    """The server in a thread of its own."""

    def __init__(self, path) -> None:
        self.path = path
        self.network = Pretended()
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: run(self._main))
        self._thread.start()
        assert self._up.wait(5)

    async def _main(self, _) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        server = ControlServer(self.network, self.path)
        await server.start()
        self._up.set()
        await self._end.wait()
        server.close()
        await asyncio.sleep(0)

    def dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        sock.settimeout(3)
        return sock

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return state.runtime("x")


@pytest.fixture
def served(directory):
    before = set(os.listdir("/proc/self/fd"))
    made = Served(directory / "control.sock")
    yield made
    made.close()
    assert set(os.listdir("/proc/self/fd")) == before


def client(served: Served) -> Client:
    return Client("x", served.dial())


def test_plug_brings_the_descriptor(served):
    with_one = client(served)
    for number in (1, 2, 3):
        reply, fd = with_one.plug(REQUEST)
        assert (reply.port, os.read(fd, 100)) == (f"vm{number}", b"the TAP")
        os.close(fd)
    assert with_one.show() == VIEW
    with_one.close()


@pytest.mark.parametrize("error", [Conflict("no", hint="do"), errors.Exhausted("full"), HostError("broken")])
def test_an_error_arrives_as_what_it_was(served, error):
    served.network.error = error
    one = client(served)
    with pytest.raises(type(error)) as caught:
        one.plug(REQUEST)
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
    one.close()


def test_a_failure_of_the_networks_is_an_answer_too(served):
    served.network.error = ZeroDivisionError("oops")
    one = client(served)
    with pytest.raises(HostError, match="oops"):
        one.plug(REQUEST)
    assert one.show() == VIEW  # and the connection goes on
    one.close()


@pytest.mark.parametrize(
    "line", [b"\n", b"{}\n", b"[]\n", b'{"op":"fly"}\n', b"\xff\n", b'{"op":"plug"}\n', b"x" * 9 + b"\n"]
)
def test_nonsense_is_a_fault(served, line):
    with served.dial() as sock:
        sock.sendall(line)
        answer = msgspec.json.decode(sock.recv(1 << 16), type=messages.Answer)
        assert answer.fault.kind == "CallerError"


def test_a_request_in_pieces_and_one_too_long(served):
    with served.dial() as sock:
        for octet in msgspec.json.encode(messages.ShowRequest()) + b"\n":
            sock.sendall(bytes([octet]))
        assert msgspec.json.decode(sock.recv(1 << 16), type=messages.Answer).network == VIEW
    with served.dial() as sock:
        with_error = False
        try:
            for _ in range(100):
                sock.sendall(b"x" * 4096)
        except OSError:
            with_error = True
        assert with_error or sock.recv(10) == b""


def test_a_client_that_leaves_before_its_answer_loses_the_port(served):
    for _ in range(20):
        with served.dial() as sock:
            sock.sendall(msgspec.json.encode(REQUEST) + b"\n")
    deadline = time.monotonic() + 2
    while served.network.plugged < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_socket_is_the_users_alone(served):
    assert served.path.stat().st_mode & 0o077 == 0


def test_clients_beyond_the_bound_wait_without_turning_the_loop(served):
    socks = [served.dial() for _ in range(_CLIENTS + 5)]
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    socks[0].close()
    last = socks[_CLIENTS]
    last.sendall(msgspec.json.encode(messages.ShowRequest()) + b"\n")
    assert msgspec.json.decode(last.recv(1 << 16), type=messages.Answer).network == VIEW
    for sock in socks:
        sock.close()


def test_a_network_that_hangs_up(directory):
    here, there = socket.socketpair()
    there.close()
    one = Client("x", here)
    with pytest.raises(HostError, match=r"'x' (hung up|does not answer)"):
        one.show()
    one.close()


@pytest.mark.parametrize("left", [[], ["control.sock"], ["agent.sock", "control.sock", "network.json"]])
def test_what_a_dead_network_left_is_swept_away_and_said(directory, left):
    for name in left:
        if name.endswith(".sock"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if "agent" in name else socket.SOCK_STREAM)
            sock.bind(str(directory / name))
            sock.close()
        else:
            (directory / name).write_text("{}")
    with pytest.raises(NotFound, match="no network 'x' is running") as caught:
        control.connect("x")
    assert ("ended without cleaning up" in caught.value.message) == bool(left)
    assert not directory.exists()
    with pytest.raises(NotFound):
        control.connect("x")


def test_listing_passes_over_what_is_dead(directory, served):
    state.runtime("dead")
    views, silent = control.list_networks()
    assert ([view.name for view in views], silent) == (["x"], [])


def test_listing_tells_of_a_network_that_does_not_answer_and_goes_on(directory, served, monkeypatch):
    monkeypatch.setattr(control, "_CALL_TIMEOUT", 0.3)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(state.runtime("deaf") / "control.sock"))
        deaf.listen()
        views, silent = control.list_networks()
    assert [view.name for view in views] == ["x"]
    assert [error.message for error in silent] == ["network 'deaf' does not answer: timed out"]


UUID = "a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d"
SUBNET = Subnet.from_options("10.0.0.1", "10.0.0.9", "255.255.255.0")
GIVEN = {"start_address": "10.0.0.1", "end_address": "10.0.0.9", "subnet_mask": "255.255.255.0"}


def runs(directory, **config) -> None:
    """The record of network x."""
    config = NetworkConfig("x", **{"subnet": SUBNET, "prefix": IPv6Network("fd00:1::/64"), **config})
    state.write(directory / "network.json", {"config": config}, durable=False)


@pytest.mark.parametrize(
    ("config", "spec", "words"),
    [
        ({}, {"mode": "host"}, "network 'x' is vmnet-shared, not vmnet-host"),
        ({"mode": "host"}, {}, "network 'x' is vmnet-host, not vmnet-shared"),
        ({}, GIVEN | {"end_address": "10.0.0.8"}, "runs with end-address=10.0.0.9, not with 10.0.0.8"),
        ({}, GIVEN | {"start_address": "10.0.0.2"}, "runs with start-address=10.0.0.1, not with 10.0.0.2"),
        ({}, GIVEN | {"subnet_mask": "255.255.0.0"}, "runs with subnet-mask=255.255.255.0, not with 255.255.0.0"),
        ({"subnet": None}, GIVEN, "runs with start-address=none, not with 10.0.0.1"),
        ({"mode": "host"}, {"mode": "host", "net_uuid": UUID}, f"runs with net-uuid=none, not with {UUID}"),
        ({"mode": "host", "net_uuid": UUID}, {"mode": "host"}, f"runs with net-uuid={UUID}, not with none"),
        ({"mtu": 9000}, {"mtu": 1500}, "runs with mtu=9000, not with 1500"),
        ({}, {"nat66_prefix": "fd00:2::"}, "runs with nat66-prefix=fd00:1::/64, not with fd00:2::/64"),
        ({}, {"host_loopback": True}, "runs with --host-loopback=off, not with on"),
    ],
)
def test_a_running_network_that_is_another_is_a_conflict(served, directory, config, spec, words):
    runs(directory, **config)
    with pytest.raises(Conflict) as caught:
        control.open_network(Spec(name="x", **spec), progress=lambda _: None)
    assert words in caught.value.message


@pytest.mark.parametrize(("config", "other"), [({}, "--name"), ({"net_uuid": UUID}, "net-uuid")])
def test_the_hint_of_a_conflict_leads_to_another_network(served, directory, config, other):
    """By another name, a UUID would still mean the network that runs."""
    runs(directory, mode="host", **config)
    with pytest.raises(Conflict) as caught:
        control.open_network(Spec(name="x", mode="host", mtu=9000, **config), progress=lambda _: None)
    assert caught.value.hint.startswith(f"give another {other}, or")


def test_a_running_network_that_is_the_same_is_joined(served, directory):
    runs(directory, mtu=9000, host_loopback=True)
    for spec in ({}, GIVEN, {"mtu": 9000}, {"nat66_prefix": "fd00:1::/64"}, {"host_loopback": True}):
        control.open_network(Spec(name="x", **spec), progress=lambda _: None).close()


def test_a_path_that_is_too_long_gets_a_sentence(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(HostError, match=r"control\.sock is longer than the 107 octets") as caught:
        control.open_network(Spec(name="x"), progress=lambda _: None)
    assert "XDG_RUNTIME_DIR" in caught.value.hint


def test_the_same_addresses_mean_the_same_network(served, directory):
    runs(directory)
    one = control.open_network(Spec(**GIVEN), progress=lambda _: None)
    assert one.name == "x"
    one.close()


def test_the_same_uuid_means_the_same_network_and_is_a_name_for_it(served, directory):
    runs(directory, mode="host", net_uuid=UUID, subnet=None, prefix=None)
    one = control.open_network(Spec(mode="host", net_uuid=UUID), progress=lambda _: None)
    assert one.name == "x"
    one.close()
    for name in (UUID, UUID.upper()):
        again = control.connect(name)
        assert again.name == "x"
        again.close()
    with pytest.raises(NotFound, match="no network 'b0e6b6f29f0e4f5c8d8e2f2a6d4b1c3d' is running"):
        control.connect(UUID.replace("a0", "b0", 1))
