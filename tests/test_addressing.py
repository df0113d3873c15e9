"""Which addresses a network gets, with a host's routes and other networks in the way."""

from __future__ import annotations

import os
import socket
from ipaddress import IPv4Network

import msgspec
import pytest

from openvmnet import addressing, netdev, state
from openvmnet.config import NetworkConfig
from openvmnet.errors import Conflict, HostError, OptionError
from openvmnet.messages import Spec
from openvmnet.netdev import Subnet

LISTENERS: list[socket.socket] = []


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The host's routes, to be changed by the test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    routes: list[IPv4Network] = []
    monkeypatch.setattr(addressing, "_routes", lambda: routes)
    yield routes
    while LISTENERS:
        LISTENERS.pop().close()


def given(start: str, end: str, *, force: bool = False) -> Spec:
    return Spec(start_address=start, end_address=end, subnet_mask="255.255.255.0", force=force)


def running(name: str, third: int) -> None:
    """Another network that runs."""
    subnet = Subnet.from_options(f"192.168.{third}.1", f"192.168.{third}.254", "255.255.255.0")
    record(NetworkConfig(name, subnet=subnet), "control.sock")


def record(config: NetworkConfig, *listening: str) -> None:
    """A network's record, and the sockets on which somebody listens; without any it is dead."""
    directory = state.runtime(config.name)
    state.write(directory / "network.json", {"config": config}, durable=False)
    for name in ("control.sock", "agent.sock"):
        (directory / name).unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if name == "agent.sock" else socket.SOCK_STREAM)
        sock.bind(str(directory / name))
        if name in listening:
            sock.listen()
            LISTENERS.append(sock)
        else:
            sock.close()


def network(choice: addressing.Choice) -> str:
    return str(choice.config.subnet.network)


def test_the_first_that_is_free(host):
    assert network(addressing.choose("x", Spec())) == "192.168.64.0/24"
    host.append(IPv4Network("192.168.64.0/20"))
    assert network(addressing.choose("x", Spec())) == "192.168.80.0/24"
    running("other", 80)
    assert network(addressing.choose("x", Spec())) == "192.168.81.0/24"


def test_a_name_keeps_what_it_had(host):
    addressing.remember(addressing.choose("x", Spec()).config)
    assert network(addressing.choose("y", Spec())) == "192.168.65.0/24"  # kept for x, though it does not run
    assert network(addressing.choose("x", Spec())) == "192.168.64.0/24"


def test_what_it_had_and_cannot_have_any_more_is_said(host):
    addressing.remember(addressing.choose("x", Spec()).config)
    host.append(IPv4Network("192.168.64.128/25"))
    choice = addressing.choose("x", Spec())
    assert network(choice) == "192.168.65.0/24"
    assert "had 192.168.64.0/24, which now overlaps this host's route to 192.168.64.128/25" in choice.note


def test_given_ones_are_taken(host):
    choice = addressing.choose("x", given("10.1.2.1", "10.1.2.99"))
    assert (str(choice.config.subnet.gateway), str(choice.config.subnet.last)) == ("10.1.2.1", "10.1.2.99")


def test_given_ones_may_be_what_is_kept_for_another_name(host):
    addressing.remember(addressing.choose("y", Spec()).config)
    assert network(addressing.choose("x", given("192.168.64.1", "192.168.64.9"))) == "192.168.64.0/24"


@pytest.mark.parametrize("what", ["route", "network"])
def test_given_ones_that_are_taken(host, what):
    if what == "route":
        host.append(IPv4Network("192.168.0.0/16"))
    else:
        running("other", 70)
    spec = given("192.168.70.1", "192.168.70.9")
    with pytest.raises(Conflict, match=r"192\.168\.70\.1 ") as caught:
        addressing.choose("x", spec)
    assert {"route": "this host's route", "network": "running network 'other'"}[what] in caught.value.message
    assert "--force" in caught.value.hint
    assert network(addressing.choose("x", msgspec.structs.replace(spec, force=True))) == "192.168.70.0/24"


def test_a_private_network_is_one(host):
    uuid = "a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d"
    config = NetworkConfig("other", mode="host", net_uuid=uuid)
    record(config, "control.sock")
    spec = Spec(mode="host", net_uuid=uuid)
    with pytest.raises(Conflict, match=f"net-uuid={uuid} is running network 'other'"):
        addressing.choose("x", spec)
    assert addressing.choose("other", spec).config == config
    assert addressing.choose("x", msgspec.structs.replace(spec, net_uuid=uuid.replace("a", "b"))).config.name == "x"


def test_a_dead_network_is_in_nobodys_way(host):
    subnet = Subnet.from_options("192.168.64.1", "192.168.64.254", "255.255.255.0")
    config = NetworkConfig("other", subnet=subnet)
    record(config)
    assert network(addressing.choose("x", given("192.168.64.1", "192.168.64.9"))) == "192.168.64.0/24"
    assert network(addressing.choose("x", Spec())) == "192.168.64.0/24"
    record(config, "agent.sock")  # its guests go on, and the next command takes it over
    assert network(addressing.choose("x", Spec())) == "192.168.65.0/24"


def test_its_own_record_is_not_in_its_way(host):
    running("x", 70)
    assert network(addressing.choose("x", given("192.168.70.1", "192.168.70.9"))) == "192.168.70.0/24"


def test_wrong_ones(host):
    with pytest.raises(OptionError):
        addressing.choose("x", Spec(start_address="10.0.0.1"))


def test_none_is_free(host):
    host.append(IPv4Network("192.168.0.0/16"))
    with pytest.raises(Conflict, match="is taken"):
        addressing.choose("x", Spec())


def test_where_names_have_all_of_them_the_longest_unused_gives_way(host):
    for third in range(64, 128):
        addressing.remember(addressing.choose(f"n{third}", Spec()).config)
        log = state.remembered(f"n{third}") / "log"
        log.touch()
        os.utime(log, (1000 + third, 1000 + third))
    os.utime(state.remembered("n70") / "log", (5, 5))
    assert network(addressing.choose("new", Spec())) == "192.168.70.0/24"
    running("n70", 70)
    addressing.remember(addressing.choose("new", Spec()).config)
    assert network(addressing.choose("new", Spec())) == "192.168.64.0/24"
    running("new", 64)
    assert "now overlaps running network 'new'" in addressing.choose("n64", Spec()).note


def test_force_takes_what_is_free_where_anything_is(host):
    running("other", 64)
    assert network(addressing.choose("x", Spec(force=True))) == "192.168.65.0/24"
    host.append(IPv4Network("192.168.0.0/16"))
    assert network(addressing.choose("x", Spec(force=True))) == "192.168.64.0/24"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"subnet": 5}', b'{"subnet": {"gateway": "x"}}'])
def test_a_damaged_memory_is_none(host, content):
    (state.remembered("x") / "network.json").write_bytes(content)
    assert network(addressing.choose("x", Spec())) == "192.168.64.0/24"
    (state.remembered("y") / "network.json").write_bytes(content)
    assert network(addressing.choose("x", Spec())) == "192.168.64.0/24"


def routes_from(monkeypatch, text: str) -> list[IPv4Network]:
    class Done:
        stdout = text

    monkeypatch.setattr(addressing.subprocess, "run", lambda *_, **__: Done())
    return addressing._routes()


def test_routes_are_read(monkeypatch):
    text = """[{"dst":"default","gateway":"10.0.0.1"},{"dst":"10.0.0.0/24"},{"dst":"10.8.0.7"},{"dst":"0.0.0.0/1"},
               {"dst":"128.0.0.0/1"},{"dst":"224.0.0.0/4"},{"dst":"192.168.64.0/18","table":"52"}]"""
    assert [str(one) for one in routes_from(monkeypatch, text)] == ["10.0.0.0/24", "10.8.0.7/32", "192.168.64.0/18"]


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_host_without_routes(monkeypatch, text):
    assert routes_from(monkeypatch, text) == []


def test_routes_that_cannot_be_read(monkeypatch):
    with pytest.raises(HostError, match="routes cannot be read"):
        routes_from(monkeypatch, "no JSON")

    def missing(*_, **__):
        raise FileNotFoundError("ip")

    monkeypatch.setattr(addressing.subprocess, "run", missing)
    with pytest.raises(HostError, match="routes cannot be read"):
        addressing._routes()


def test_every_candidate_is_what_macos_chooses_from():
    assert [str(one.network) for one in netdev.candidates()][::63] == ["192.168.64.0/24", "192.168.127.0/24"]
