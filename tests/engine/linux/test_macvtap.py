"""macvtap: the kernel's events, and the failures of its making; the rest is in tests/qemu."""

from __future__ import annotations

import errno
import functools
import json
import os
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.engine.linux import macvtap
from openvmnet.engine.linux.interfaces import Interface
from openvmnet.errors import Conflict, HostError, MissingFeature
from tests.netns import eventually, inside

if TYPE_CHECKING:
    from lab.netns import Namespace
    from lab.world import World

NIC = Interface("nic0", "veth", "macvtap", "up", "02:00:00:00:00:01", 1500)
EVENT = (
    b"add@/devices/virtual/net/vmtap0/macvtap/tap2\0ACTION=add\0DEVPATH=/devices/virtual/net/vmtap0/macvtap/tap2\0"
    b"SUBSYSTEM=macvtap\0MAJOR=246\0MINOR=3\0DEVNAME=tap2\0SEQNUM=60875\0"
)  # as Linux 6.18 sent it


def test_the_event_of_a_macvtap_has_its_number() -> None:
    assert macvtap.device_number(EVENT) == os.makedev(246, 3)
    assert macvtap.device_number(EVENT.replace(b"ACTION=add", b"ACTION=remove")) is None
    assert macvtap.device_number(EVENT.replace(b"=macvtap", b"=net")) is None
    assert macvtap.device_number(EVENT.replace(b"MINOR=3", b"MINOR=x")) is None


@given(st.binary(max_size=200))
def test_any_other_event_has_none(data: bytes) -> None:
    assert macvtap.device_number(data) is None


@pytest.mark.parametrize(
    ("number", "uid", "kind", "sentence"),
    [
        (errno.EADDRINUSE, 0, Conflict, "has the MAC already"),
        (errno.EPERM, 1000, MissingFeature, "takes root"),
        (errno.EPERM, 0, HostError, "no macvtap on nic0: why"),
        (errno.EIO, 1000, HostError, "no macvtap on nic0: why"),
    ],
)
def test_what_the_child_met_is_said(
    number: int, uid: int, kind: type[HostError], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(json.dumps({"error": "why", "errno": number}).encode())
        with pytest.raises(kind, match=sentence) as raised:
            macvtap._receive(ours, NIC)
        assert type(raised.value) is kind
        theirs.close()
        with pytest.raises(HostError, match="ended early"):
            macvtap._receive(ours, NIC)


@pytest.mark.parametrize(
    ("said", "uid", "kind", "sentence"),
    [
        ("Error: Unknown device type.", 0, MissingFeature, "CONFIG_MACVTAP"),
        ("RTNETLINK answers: Operation not supported", 0, MissingFeature, "CONFIG_MACVTAP"),
        ("RTNETLINK answers: Operation not permitted", 1000, MissingFeature, "takes root"),
        ("RTNETLINK answers: Operation not permitted", 0, HostError, "no macvtap can be made on nic0: RTNETLINK"),
        ("RTNETLINK answers: Device or resource busy", 0, HostError, "Device or resource busy"),
    ],
)
def test_what_ip_says_is_said(
    said: str, uid: int, kind: type[HostError], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(macvtap, "_ip", lambda argv: said)
    with pytest.raises(kind, match=sentence) as raised:
        macvtap._add(NIC, "52:54:00:00:00:01", 1, isolated=True)
    assert type(raised.value) is kind


@pytest.fixture(scope="module")
def host(world: World) -> Namespace:
    host = world.namespace("macvtap")
    host.batch("link add name nic0 type veth peer name far0", "link set nic0 up", "link set far0 up")
    probe = host.run(["ip", "link", "add", "link", "nic0", "name", "try0", "type", "macvtap"], check=False)
    if probe.returncode != 0:
        pytest.skip(f"this kernel has no macvtap (CONFIG_MACVTAP): {probe.stderr}")
    host.batch("link delete try0")
    return host


@pytest.mark.kernel
@pytest.mark.skipif(os.environ.get("OPENVMNET_LAB_UID") != "0", reason="a macvtap's node takes real root")
class TestKernel:
    """On a real veth."""

    def heard(self, host: Namespace) -> list[str]:
        """What of nic0 says that something is on top of it."""
        shown = json.loads(host.run(["ip", "-j", "-d", "link", "show", "nic0"]).stdout)[0]
        return [f"{name}={shown[name]}" for name in ("promiscuity", "allmulti") if shown.get(name)]

    def test_descriptors_and_links_are_as_before(self, host: Namespace) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        fds = []
        for mac, isolated in (("52:54:00:00:00:01", False), ("52:54:00:00:00:02", True)):
            open_it = functools.partial(macvtap.open_macvtap, NIC, mac, isolated=isolated)
            fds.append(inside(host, open_it))
        assert all(os.get_inheritable(fd) is False for fd in fds)
        assert len(os.listdir("/proc/self/fd")) == len(before) + 2
        assert self.heard(host)
        for fd in fds:
            os.close(fd)
        assert eventually(lambda: not self.heard(host))
        assert sorted(os.listdir("/proc/self/fd")) == before

    def test_a_link_that_cannot_be_made_leaves_nothing(self, host: Namespace) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(HostError, match="no macvtap can be made on nic0"):
            inside(host, lambda: macvtap.open_macvtap(NIC, "01:00:00:00:00:01", isolated=False))
        assert not self.heard(host)
        assert sorted(os.listdir("/proc/self/fd")) == before

    def test_the_child_may_be_done_before_its_parent_looks(
        self, host: Namespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add = macvtap._add

        def slowly(nic: Interface, mac: str, pid: int, *, isolated: bool) -> None:
            add(nic, mac, pid, isolated=isolated)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # as long as it takes, on a busy machine

        monkeypatch.setattr(macvtap, "_add", slowly)
        os.close(inside(host, lambda: macvtap.open_macvtap(NIC, "52:54:00:00:00:03", isolated=False)))
        assert eventually(lambda: not self.heard(host))
