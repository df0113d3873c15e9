"""IPv6 with real guests: their own kernel's autoconfiguration, and everything a guest does with it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from lab.guest import qemu, virtio
from lab.world import BLACKHOLE6, PAGE, PROHIBITED6, ROUTER6, SERVER6, UNREACHABLE6, WEB, WEB6
from tests.netns import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.guest import Guest
    from lab.world import World

pytestmark = pytest.mark.qemu
PREFIX = "fd12:3456:789a:1::"


def boot(world: World, netdev: str, name: str, *run: str) -> Guest:
    guest = world.guest(["vmnet", "run", *run, "--", *qemu(*virtio(netdev)), "-name", name], name=name)
    guest.wait_boot()
    return guest


def address(guest: Guest) -> str:
    """The guest's global address, once its kernel has one that it may use."""
    guest.run("ip link set eth0 up")
    found = ""
    deadline = time.monotonic() + 8
    while not found and time.monotonic() < deadline:
        for line in guest.run("ip -6 addr show dev eth0 scope global").out.splitlines():
            words = line.split()
            if words[:1] == ["inet6"] and "tentative" not in words:
                found = words[1].partition("/")[0]
        time.sleep(0.1)
    assert found, guest.run("ip -6 addr; ip -6 route").out
    return found


def show(world: World, name: str) -> dict:
    return json.loads(world.product_run(["vmnet", "show", name, "--json"]).stdout)


@pytest.fixture(scope="module")
def six(world: World) -> Iterator[Guest]:
    with boot(world, f"vmnet-shared,nat66-prefix={PREFIX}", "six", "--name", "six") as guest:
        guest.dhcp(hostname="six")
        address(guest)
        yield guest


def test_the_prefix_is_the_one_that_was_asked_for(world: World, six: Guest) -> None:
    own = address(six)
    assert own.startswith(PREFIX.removesuffix("::") + ":")
    assert f"{PREFIX}1" in six.run("ping -6 -c 1 -W 2 fd12:3456:789a:1::1", check=True).out
    view = show(world, "six")
    assert (view["prefix6"], view["gateway6"]) == (f"{PREFIX}/64", f"{PREFIX}1")
    assert eventually(lambda: own in show(world, "six")["ports"][0]["addresses6"])
    assert own in world.product_run(["vmnet", "show", "six"]).stdout


def test_page_ping_name_and_hops(six: Guest) -> None:
    assert six.run(f"wget -q -O - http://[{WEB6}]/", check=True).out.strip() == PAGE.strip()
    assert "1 packets received" in six.run(f"ping -6 -c 1 -W 2 {SERVER6}", check=True).out
    assert WEB6 in six.run("nslookup -type=aaaa www.example.test", check=True).out
    assert WEB6 in six.run(f"nslookup -type=aaaa www.example.test {PREFIX}1", check=True).out
    hops = six.run(f"traceroute6 -n -q 1 -w 2 -m 5 {SERVER6}").out
    assert [line.split()[1] for line in hops.splitlines() if line.strip()[:1].isdigit()] == [
        f"{PREFIX}1",
        ROUTER6,
        SERVER6,
    ]


def test_errors_are_the_outsides_own(six: Guest) -> None:
    assert "refused" in six.run(f"nc -w 5 {SERVER6} 81 </dev/null").out
    assert "timed out" in six.run(f"nc -w 2 {BLACKHOLE6} 80 </dev/null").out
    for where in (UNREACHABLE6, PROHIBITED6):
        begun = time.monotonic()
        found = six.run(f"nc -w 10 {where} 80 </dev/null")
        assert found.status != 0
        assert "timed out" not in found.out
        assert time.monotonic() - begun < 5, found.out


def test_siblings_meet_and_an_isolated_one_is_alone(world: World, six: Guest) -> None:
    with (
        boot(world, "vmnet-shared", "kin", "--name", "six") as kin,
        boot(world, "vmnet-shared,isolated=on", "alone", "--name", "six") as alone,
    ):
        kin.dhcp(hostname="kin")
        there, lonely = address(kin), address(alone)
        assert "1 packets received" in six.run(f"ping -6 -c 1 -W 2 {there}", check=True).out
        assert six.run(f"ping -6 -c 1 -W 1 {lonely}").status != 0
        assert alone.run(f"ping -6 -c 1 -W 1 {there}").status != 0
        assert "1 packets received" in alone.run(f"ping -6 -c 1 -W 2 {SERVER6}", check=True).out
        # It has not spoken to the gateway in IPv6: that it took the address is enough.
        assert eventually(lambda: there in six.run("nslookup -type=aaaa kin.vmnet.internal").out)


def test_a_host_without_ipv6_says_so_at_once(world: World, six: Guest) -> None:
    world.ipv6(on=False)
    try:
        begun = time.monotonic()
        found = six.run(f"nc -w 10 {SERVER6} 80 </dev/null")
        assert found.status != 0
        assert "nreachable" in found.out
        assert time.monotonic() - begun < 2
        assert six.run(f"wget -q -O - http://{WEB}/", check=True).out.strip() == PAGE.strip()
    finally:
        world.ipv6(on=True)
    assert "1 packets received" in six.run(f"ping -6 -c 1 -W 2 {SERVER6}", check=True).out


def test_a_random_prefix_stays_with_the_network(world: World) -> None:
    prefixes = []
    for _ in range(2):
        with boot(world, "vmnet-host", "once", "--name", "kept", "--linger", "0") as guest:
            own = address(guest)
            prefixes.append(show(world, "kept")["prefix6"])
            assert own.startswith("fd")
            assert "default" not in guest.run("ip -6 route").out
        assert eventually(lambda: "kept" not in world.product_run(["vmnet", "ls"]).stdout, 8)
    assert prefixes[0] == prefixes[1]
