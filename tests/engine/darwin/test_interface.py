"""What the contract's tests do not see of the link: its pipe, its end without a stop, and its failed starts."""

from __future__ import annotations

import gc
import os
import select
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from openvmnet.contract.interface import Interface, LinkRequest
from openvmnet.engine.darwin.interface import VmnetLink, open_link
from openvmnet.errors import HostError, LinkError, OptionError, Stopped
from openvmnet.netdev import Shared
from openvmnet.status import Status
from tests.engine.darwin.conftest import eventually

if TYPE_CHECKING:
    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls

ID = uuid.UUID("a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d")


def opened(framework: Framework, controls: Controls) -> VmnetLink:
    controls.library.standin_memory()
    return open_link(LinkRequest(Shared(), ID), framework)


def readable(fd: int, seconds: float = 0) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def settled(link: VmnetLink) -> bool:
    """Whether the pipe comes to rest: an event that was on its way when the last frame was read is told in vain."""
    for _ in range(3):
        if not readable(link.fileno(), 0.05):
            return True
        assert link.read(10) == []
    return False


def quiet(controls: Controls) -> bool:
    """Whether no event comes for a tenth of a second; an event that is armed comes all the time while frames wait."""
    events = controls.count("events")
    time.sleep(0.1)
    return controls.count("events") == events


def test_the_pipe_is_readable_while_frames_wait_and_comes_to_rest(framework: Framework, controls: Controls) -> None:
    link = opened(framework, controls)
    assert not readable(link.fileno(), 0.05)
    controls.library.standin_send(bytes(60), 60)
    controls.library.standin_send(bytes(61), 61)
    assert readable(link.fileno(), 5)
    assert eventually(lambda: not link.handle.armed)  # nobody reads: the event is off, and the pipe stays readable
    assert eventually(lambda: quiet(controls))  # what was under way when it was turned off has come
    events = controls.count("events")
    assert readable(link.fileno(), 0.1)
    assert controls.count("events") == events
    assert link.read(1) == [bytes(60)]
    assert readable(link.fileno())
    assert link.read(10) == [bytes(61)]
    assert settled(link)
    assert link.handle.armed
    link.close()
    assert not readable(link.fileno())


def test_identity_and_parameters(framework: Framework, controls: Controls) -> None:
    link = opened(framework, controls)
    parameters = link.parameters
    assert parameters.interface_id == ID
    assert (parameters.mtu, parameters.max_packet_size, parameters.read_max_packets) == (1500, 1514, 256)
    assert (parameters.start_address, parameters.subnet_mask) == ("192.168.64.1", "255.255.255.0")
    assert link.tap is None
    link.close()
    request = LinkRequest(Shared(), ID, allocate_mac_address=False)
    again = open_link(request, framework)
    assert again.parameters.mac_address is None
    again.close()


def test_an_interface_that_is_forgotten_is_stopped_and_leaves_no_descriptor(
    framework: Framework, controls: Controls
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        interface = Interface(opened(framework, controls))
        interface.on_packets_available(lambda: None)
        interface.on_packets_available(None)
        del interface
        gc.collect()
        assert eventually(lambda: controls.left()[0] == 0)
    gc.collect()
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_start_that_fails_leaves_nothing(framework: Framework, controls: Controls) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    controls.set("vmnet_start_interface", Status.MEM_FAILURE)
    with pytest.raises(HostError) as caught:
        open_link(LinkRequest(Shared(), ID), framework)
    assert caught.value.status is Status.MEM_FAILURE
    with pytest.raises(OptionError):
        open_link(LinkRequest(Shared(start_address="10.0.0.1"), ID), framework)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_child_of_a_fork_does_nothing_that_its_parent_notices(framework: Framework, controls: Controls) -> None:
    interface = Interface(opened(framework, controls))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "nothing"
        try:
            interface.read()
        except Stopped as error:
            said = error.message
        interface.stop()
        os.write(write, said.encode())
        os._exit(0)
    began = time.monotonic()
    assert os.waitpid(pid, 0)[1] == 0
    assert time.monotonic() - began < 2  # the child asked vmnet for nothing
    assert b"forked" in os.read(read, 500)
    os.close(read)
    os.close(write)
    controls.library.standin_send(bytes(60), 60)
    assert interface.wait(5)
    assert interface.read() == [bytes(60)]
    interface.stop()


@pytest.mark.parametrize("status", [Status.FAILURE, Status.BUFFER_EXHAUSTED, Status.TOO_MANY_PACKETS])
def test_a_failure_of_vmnets_bears_its_status(framework: Framework, controls: Controls, status: Status) -> None:
    link = opened(framework, controls)
    controls.set("vmnet_write", status)
    with pytest.raises(LinkError) as caught:
        link.write([bytes(60)])
    assert (caught.value.status, caught.value.sent) == (status, 0)
    controls.set("vmnet_write", 0)
    controls.set("vmnet_read", status)
    with pytest.raises(LinkError) as caught:
        link.read(1)
    assert caught.value.status is status
    controls.set("vmnet_read", 0)
    controls.set("exhausted", 3)  # it passes: tried again
    link.write([bytes(60)])
    link.close()
