"""The guest and the way to command it, on QEMU's own user network."""

from __future__ import annotations

import time

import pytest

from lab.guest import GuestError, virtio
from lab.world import PAGE, WEB

pytestmark = [pytest.mark.kernel, pytest.mark.qemu]


def test_guest_obeys_and_reaches_the_world(boot):
    guest = boot(*virtio("user"))
    result = guest.run("echo out; echo err >&2; exit 3")
    assert (result.out, result.status) == ("out\nerr\n", 3)
    assert len(guest.run("head -c 50000 /dev/zero | tr '\\0' x").out) == 50000
    with pytest.raises(GuestError, match="no answer"):
        guest.run("sleep 2", timeout=0.2)
    assert guest.run("echo still there").out == "still there\n"
    with pytest.raises(GuestError, match="ended with 1"):
        guest.run("false", check=True)
    lease = guest.dhcp()
    assert (lease.address, lease.prefix, lease.gateway, lease.dns) == ("10.0.2.15", 24, "10.0.2.2", ["10.0.2.3"])
    assert guest.run("wget -qO- http://www.example.test/", check=True).out == PAGE
    assert guest.run(f"wget -qO- http://{WEB}/whoami", check=True).out == "192.0.2.2\n"


def test_guest_that_does_not_start_tells_why(boot):
    with pytest.raises(GuestError, match=r"did not boot \(QEMU ended\).*nonsense"):
        boot("-nonsense")


def test_killed_guest_is_gone_at_once(world, boot):
    guest = boot(*virtio("user"), wait=False)
    begun = time.monotonic()
    guest.kill()
    assert time.monotonic() - begun < 2
    assert guest.process.returncode == -9
    assert not world.leftovers()
