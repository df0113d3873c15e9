"""ICMPv6 of a guest, through a whole network, to an internet of the lab's: as ICMP over IPv4."""

from __future__ import annotations

import re

import pytest

from lab.world import BLACKHOLE6, PROHIBITED6, ROUTER6, SERVER6, UNREACHABLE6, WEB6

pytestmark = pytest.mark.kernel


def ping(guest, *words: str) -> str:
    return guest.run(["ping", "-6", "-n", "-i", "0.05", *words], check=False).stdout


def test_echo_has_a_real_round_trip(guest):
    out = ping(guest, "-c", "4", SERVER6)
    assert "4 received" in out
    assert {int(value) for value in re.findall(r"ttl=(\d+)", out)} == {62}  # the router's and the gateway's hop


@pytest.mark.parametrize("size", [0, 8, 56, 1452, 1453, 8000, 65527])
def test_echo_of_any_size(guest, size):
    assert "2 received" in ping(guest, "-c", "2", "-s", str(size), SERVER6)


def test_many_at_once_are_told_apart(guest):
    command = ["ping", "-6", "-n", "-c", "5", "-i", "0.02"]
    processes = [guest.popen([*command, where], stdout=-1) for where in (SERVER6, WEB6) * 4]
    assert all(b"5 received" in process.communicate(timeout=10)[0] for process in processes)


def test_the_gateway_answers_itself(guest, network):
    assert "2 received" in ping(guest, "-c", "2", network.gateway6)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (UNREACHABLE6, f"From {ROUTER6} icmp_seq=1 Destination unreachable: No route"),
        (PROHIBITED6, f"From {ROUTER6} icmp_seq=1 Destination unreachable: Administratively prohibited"),
        ("fec0::1", "Destination unreachable: No route"),
    ],
    ids=["unreachable", "prohibited", "site-local"],
)
def test_errors_come_back_from_the_router_that_sent_them(guest, where, said):
    out = ping(guest, "-c", "1", "-W", "1", where)
    assert said in out
    assert "0 received" in out


def test_silence_is_silence(guest):
    out = ping(guest, "-c", "1", "-W", "0.5", BLACKHOLE6)
    assert "0 received" in out
    assert "From" not in out


def test_a_host_without_ipv6_says_so(guest, world):
    world.ipv6(on=False)
    try:
        assert "No route" in ping(guest, "-c", "1", "-W", "1", SERVER6)
    finally:
        world.ipv6(on=True)


@pytest.mark.parametrize("hops", [1, 2])
def test_time_exceeded(guest, network, hops):
    out = ping(guest, "-c", "1", "-W", "1", "-t", str(hops), SERVER6)
    assert f"From {(network.gateway6, ROUTER6)[hops - 1]} icmp_seq=1 Time exceeded: Hop limit" in out


@pytest.mark.parametrize("how", ["-U", "-I", "-T"], ids=["udp", "icmp", "tcp"])
def test_traceroute_shows_gateway_router_and_target(guest, network, how):
    words = ["traceroute", "-6", "-n", "-w", "1", "-q", "1", "-m", "5"]
    words += {"-U": ["-U", "-p", "33434"], "-I": ["-I"], "-T": ["-T", "-p", "7"]}[how]
    out = guest.run([*words, SERVER6]).stdout
    hops = re.findall(r"^ *\d+  ([\da-f:*]+)", out, re.MULTILINE)
    if how == "-T":  # a SYN is answered by the gateway in the target's name, so the hops between do not show
        assert (hops[0], hops[-1]) == (network.gateway6, SERVER6)
    else:
        assert hops == [network.gateway6, ROUTER6, SERVER6]


def test_a_narrow_path_is_told(guest, world):
    world.narrow(1300)
    try:
        command = ["ping", "-6", "-n", "-c", "4", "-i", "0.1", "-W", "0.5", "-M", "do", "-s", "1400", SERVER6]
        done = guest.run(command, check=False)
        assert re.search(r"mtu ?= ?1300", done.stdout + done.stderr)
    finally:
        world.narrow(1500)
        for namespace in (guest, world.host, world.internet):
            namespace.run(["ip", "-6", "route", "flush", "cache"])
