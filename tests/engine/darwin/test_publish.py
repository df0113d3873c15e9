"""`hostfwd` on a Mac: rules of vmnet's that follow a VM's lease, over the stand-in."""

from __future__ import annotations

import logging
import os
import time
import uuid
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

import pytest

from openvmnet import library, netdev
from openvmnet.attach import relays
from openvmnet.contract.interface import LinkRequest
from openvmnet.engine.darwin import leases, publish
from openvmnet.engine.darwin.framework import Mode
from openvmnet.engine.darwin.handle import Handle
from openvmnet.engine.darwin.interface import open_link
from openvmnet.engine.darwin.ports import Forward, Rules
from openvmnet.engine.darwin.publish import Publisher
from openvmnet.errors import HostError, OptionError
from openvmnet.netdev import Host, Shared, stable_mac
from openvmnet.status import Status
from tests.engine.darwin.conftest import eventually
from tests.engine.darwin.test_relay import environment, start, vmnet

if TYPE_CHECKING:
    from pathlib import Path

    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls

__all__ = ["environment"]  # a fixture

SHARED = {"vmnet_operation_mode": Mode.SHARED}
NETWORK = IPv4Network("192.168.64.0/24")
MAC = stable_mac("a", 0)
RULES = ("tcp::2222-:22", "udp::5353-192.168.64.9:53")
REMOVE, ADD = (f"vmnet_interface_{verb}_ip_port_forwarding_rule" for verb in ("remove", "add"))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """bootpd's file."""
    path = tmp_path / "dhcpd_leases"
    monkeypatch.setattr(leases, "PATH", path)
    monkeypatch.setenv("STANDIN_LEASES", str(path))
    return path


def lease(path: Path, *addresses: str, seconds: int = 3600) -> None:
    """What bootpd writes: a lease of our MAC for each address."""
    octets = ":".join(f"{int(part, 16):x}" for part in MAC.split(":"))
    ends = hex(int(time.time()) + seconds)
    entries = [f"{{\n\tip_address={one}\n\thw_address=1,{octets}\n\tlease={ends}\n}}\n" for one in addresses]
    path.write_text("".join(entries))
    os.utime(path, ns=(time.time_ns(), time.time_ns()))


@pytest.fixture
def made(framework: Framework, file: Path):
    """An interface's rules, and who adds to them."""
    handle = Handle(framework, SHARED)
    rules = Rules(framework, handle)
    yield rules, Publisher(rules, publish.forwards(Shared("n", hostfwd=RULES)), MAC, NETWORK)
    handle.stop()


def test_a_rule_that_names_its_guest_is_there_at_once_and_the_other_with_the_lease(made, file: Path) -> None:
    rules, publisher = made
    publisher.begin()
    publisher.refresh()
    named = Forward("udp", 5353, "192.168.64.9", 53)
    assert rules.get() == [named]
    lease(file, "192.168.128.2")  # the MAC's, on another network
    publisher.refresh()
    assert rules.get() == [named]
    lease(file, "192.168.128.2", "192.168.64.2")
    publisher.refresh()
    assert rules.get() == [named, Forward("tcp", 2222, "192.168.64.2", 22)]


def test_the_rule_follows_the_lease(made, file: Path) -> None:
    rules, publisher = made
    for address in ("192.168.64.2", "192.168.64.3"):
        lease(file, address)
        publisher.refresh()
        assert rules.get() == [Forward("tcp", 2222, address, 22)]
    file.unlink()
    publisher.refresh()
    assert rules.get() == [Forward("tcp", 2222, "192.168.64.3", 22)]


def test_an_unchanged_file_is_not_read_again(made, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, publisher = made
    lease(file, "192.168.64.2")
    reads = []
    read = leases.read
    monkeypatch.setattr(leases, "read", lambda: reads.append(1) or read())
    for _ in range(5):
        publisher.refresh()
    assert len(reads) == 1


def test_what_vmnet_refuses_is_said_once_and_tried_again(
    made, controls: Controls, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules, publisher = made
    controls.set(ADD, Status.SHARING_SERVICE_BUSY)
    with pytest.raises(
        HostError, match=r"^Could not set up host forwarding rule 'udp::5353-192\.168\.64\.9:53': "
    ) as e:
        publisher.begin()
    assert e.value.status is Status.SHARING_SERVICE_BUSY
    lease(file, "192.168.64.2")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            publisher.refresh()
    assert [record.message[:55] for record in caplog.records] == [
        "Could not set up host forwarding rule 'tcp::2222-:22': "
    ]
    controls.set(ADD, 0)
    publisher.refresh()
    assert rules.get() == [Forward("tcp", 2222, "192.168.64.2", 22)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Shared("n", hostfwd=("tcp:127.0.0.1:2222-:22",)), "leave 127.0.0.1 out, as in 'tcp::2222-...'"),
        (Host("n", hostfwd=("tcp::2222-:22",)), "vmnet-shared only, not of vmnet-host"),
    ],
)
def test_what_vmnet_cannot_do_is_a_sentence(options, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        publish.forwards(options)
    assert words in caught.value.message
    assert caught.value.message.startswith(f"Could not set up host forwarding rule '{options.hostfwd[0]}'")


def test_a_bridged_netdev_publishes_nothing() -> None:
    assert publish.forwards(netdev.parse("vmnet-bridged,id=n,ifname=en0")) == ()


def test_the_library_publishes_to_an_address_that_is_named(framework: Framework, controls: Controls) -> None:
    link = open_link(LinkRequest(Shared("n", hostfwd=RULES[1:]), uuid.uuid4()), framework)
    assert Rules(framework, link.handle).get() == [Forward("udp", 5353, "192.168.64.9", 53)]
    link.close()
    with pytest.raises(OptionError, match=r"as in 'tcp::2222-192\.168\.64\.2:22'"):
        open_link(LinkRequest(Shared("n", hostfwd=RULES), uuid.uuid4()), framework)
    controls.set(ADD, Status.FAILURE)
    with pytest.raises(HostError, match="Could not set up"):
        open_link(LinkRequest(Shared("n", hostfwd=RULES[1:]), uuid.uuid4()), framework)


def test_the_library_takes_a_tuple_of_text() -> None:
    for wrong in (["tcp::1-:1"], "tcp::1-:1", (1,), None):
        with pytest.raises(OptionError, match="Invalid parameter type for 'hostfwd', expected: tuple of text"):
            library.start(Shared(hostfwd=wrong))  # type: ignore[arg-type] # that is the test
    with pytest.raises(OptionError, match="Bad host port"):
        library.start(Shared(hostfwd=("tcp::x-:1",)))


@pytest.mark.usefixtures("environment")
def test_a_relay_publishes_and_show_tells(
    controls: Controls, file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STANDIN_" + REMOVE.upper(), "1001")  # so that a rule that is moved is a warning
    lease(file, "192.168.64.2")
    port = start(controls, "vmnet-shared,id=net0" + "".join(f",hostfwd={rule}" for rule in RULES))
    name = "shared-192.168.64.1"
    assert eventually(lambda: "publishes tcp 0.0.0.0:2222 to 192.168.64.2:22" in vmnet(controls, "show", name).stdout)
    (view,) = relays.networks()
    assert [(one.protocol, one.host_port, one.guest_address) for one in view.ports[0].published] == [
        ("tcp", 2222, "192.168.64.2"),
        ("udp", 5353, "192.168.64.9"),
    ]
    lease(file, "192.168.64.3")
    said = []
    assert eventually(lambda: said.append(capfd.readouterr().err) or "'tcp::2222-:22'" in "".join(said), 6)
    port.close()
    assert port.process.returncode == 0


@pytest.mark.usefixtures("environment")
def test_a_rule_that_vmnet_refuses_ends_the_start(
    controls: Controls, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_" + ADD.upper(), "1001")
    with pytest.raises(HostError, match="Could not set up host forwarding rule 'tcp::80-192"):
        start(controls, "vmnet-shared,id=net0,hostfwd=tcp::80-192.168.64.9:80")
    with pytest.raises(OptionError, match="of vmnet-shared only"):
        start(controls, "vmnet-host,id=net0,hostfwd=tcp::80-:80")
