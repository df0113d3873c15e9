"""The engine: ports that come and go, takeover, and the agent's death."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket

import pytest

from openvmnet.config import PortKind
from openvmnet.engine.linux import agent, namespace, steps
from openvmnet.engine.linux.engine import LinuxEngine
from openvmnet.engine.linux.namespace import Namespace
from openvmnet.errors import HostError
from openvmnet.kernel import netlink
from tests.engine.taps import BROADCAST, CONFIG, GATEWAY_MAC, SUBNET, Net, net

pytestmark = pytest.mark.kernel


@pytest.fixture
def world(lab, tmp_path):
    with net(tmp_path) as made:
        yield made


def elements(world: Net, name: str) -> list[str]:
    text = world.do(world.engine.namespace.run(["nft", "-j", "list", "set" if name != "marks" else "map", "bridge",
                                                "vmnet", name], ""))  # fmt: skip
    found = [item for item in json.loads(text)["nftables"] if "set" in item or "map" in item]
    (entry,) = (item.get("set") or item.get("map") for item in found)
    return sorted(one[0] if isinstance(one, list) else one for one in entry.get("elem", []))


def test_a_port_is_on_the_bridge_and_in_the_rules(world):
    world.plug()
    world.plug(isolated=True)
    assert sorted(world.engine.links()) == ["vm1", "vm2"]
    assert elements(world, "marks") == ["vm1", "vm2"]
    assert elements(world, "isolated") == ["vm2"]


def test_a_closed_tap_departs_and_leaves_the_rules(world):
    one, other = world.plug(isolated=True), world.plug()
    os.close(one.fd)
    world.guests.remove(one)
    world.turn()
    assert set(world.departed) == {"vm1"}
    world.do(world.engine.unplug("vm1"))
    assert elements(world, "marks") == ["vm2"]
    assert elements(world, "isolated") == []
    assert sorted(world.engine.links()) == [other.link]


class TestTheFirstPort:
    """It is made with the network, while its process is still loading."""

    KIND = PortKind(isolated=True, offloads=True)

    @pytest.fixture
    def begun(self, lab, tmp_path):
        class Begun(Net):
            async def _up(self) -> LinuxEngine:
                namespace = Namespace(self.path)
                namespace.begin(steps.network(self.config, GATEWAY_MAC, (), {}, TestTheFirstPort.KIND))
                engine = LinuxEngine(namespace, self.config, GATEWAY_MAC)
                await engine.up({}, TestTheFirstPort.KIND)
                engine.watch(self.lane, self.departed.append, lambda: self.gone.append(True))
                return engine

        with contextlib.closing(Begun(tmp_path)) as made:
            yield made

    def test_it_is_there_and_goes_to_who_asks_for_it(self, begun):
        before = begun.engine.links()["vm1"]
        link, fd = begun.do(begun.engine.plug(1, self.KIND))
        assert (link, begun.engine.links()["vm1"].ifindex) == ("vm1", before.ifindex)
        assert (elements(begun, "marks"), elements(begun, "isolated")) == (["vm1"], ["vm1"])
        _, other = begun.do(begun.engine.plug(2, self.KIND))
        assert sorted(begun.engine.links()) == ["vm1", "vm2"]
        os.close(fd)
        begun.turn()
        assert begun.departed == ["vm1"]
        os.close(other)

    @pytest.mark.parametrize(
        ("number", "kind"),
        [(1, PortKind(isolated=False, offloads=True)), (1, PortKind(isolated=True, offloads=False)), (2, KIND)],
        ids=["not-isolated", "without-headers", "after-a-failure"],
    )
    def test_it_goes_where_another_is_wanted(self, begun, number, kind):
        first = begun.engine.links()["vm1"]
        link, fd = begun.do(begun.engine.plug(number, kind))
        begun.turn()
        assert begun.departed == []
        (left,) = begun.engine.links().values()
        assert (left.name, left.ifindex == first.ifindex) == (link, False)
        assert elements(begun, "marks") == [link]
        assert elements(begun, "isolated") == ([link] if kind.isolated else [])
        os.close(fd)

    def test_it_ends_with_the_network(self, begun):
        descriptor = begun.engine._first[1]
        os.fstat(descriptor)
        begun.engine.down()
        begun.engine.down = lambda: None  # it has ended
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_what_begins_in_vain_leaves_nothing(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("openvmnet.engine.linux.firewall.add_port", lambda *_, **__: "no rule\n")
    before = len(os.listdir("/proc/self/fd"))
    path = tmp_path / "agent.sock"
    pid = agent.fork(str(path))
    begun = Namespace(path)
    begun.begin(steps.network(CONFIG, GATEWAY_MAC, (), {}, TestTheFirstPort.KIND))
    with pytest.raises(HostError, match="syntax error"):
        asyncio.run(begun.finish())
    begun.quit()
    os.waitpid(pid, 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_agent_that_is_silent_is_not_waited_for_and_its_late_answer_is_nobodys(lab, tmp_path, monkeypatch):
    path = tmp_path / "agent.sock"
    pid = agent.fork(str(path))
    asked = Namespace(path)

    async def live() -> None:
        assert (await asked.ask("links")).values["links"] == ["lo"]
        monkeypatch.setattr(namespace, "_TIMEOUT", 0.1)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(HostError, match=r"the agent did not answer 'run' within"):
            await asked.run(["ip", "-batch", "-"], "link add br0 type bridge\n")
        os.kill(pid, signal.SIGCONT)
        monkeypatch.undo()
        assert (await asked.ask("links")).values["links"] == ["lo", "br0"]

    try:
        asyncio.run(live())
    finally:
        os.kill(pid, signal.SIGCONT)
        asked.quit()
        os.waitpid(pid, 0)


def test_a_port_that_cannot_be_made_leaves_no_device(world, monkeypatch):
    monkeypatch.setattr("openvmnet.engine.linux.firewall.add_port", lambda *_, **__: "no rule\n")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="syntax error"):
        world.do(world.engine.plug(1, PortKind(isolated=False, offloads=True)))
    world.turn()
    assert world.engine.links() == {}
    assert len(os.listdir("/proc/self/fd")) == before


def test_departures_are_seen_although_the_kernel_lost_its_words(world, monkeypatch):
    """ENOBUFS: what happened is not told again, so the engine has to look."""
    guests = [world.plug() for _ in range(3)]
    world.turn()
    world.engine._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # room for one message
    for guest in guests[:2]:
        os.close(guest.fd)
        world.guests.remove(guest)
    world.turn(0.1)
    assert set(world.departed) == {"vm1", "vm2"}


def test_links_count_what_passes(world):
    one, other = world.plug(), world.plug()
    world.quiet()
    before = world.engine.links()
    for _ in range(20):
        one.send(one.marker(other))
    assert len(other.frames(0.1)) == 20  # a TAP counts a frame as sent when its holder has read it
    after = world.engine.links()
    assert after["vm1"].rx_packets - before["vm1"].rx_packets == 20  # from the guest
    assert after["vm2"].tx_packets - before["vm2"].tx_packets == 20


def test_neighbours_that_the_gateway_has_resolved(world):
    from scapy.layers.l2 import ARP, Ether

    one = world.plug()
    one.send(Ether(src=one.mac, dst=BROADCAST) / ARP(op=1, hwsrc=one.mac, psrc=one.ip, pdst=str(SUBNET.gateway)))
    one.frames(0.1)
    assert netlink.Neighbour(one.ip, one.mac, world.engine.neighbours()[0].link) in world.engine.neighbours()


def test_the_gateways_mac_is_the_given_one(world):
    from scapy.layers.l2 import ARP, Ether

    one = world.plug()
    one.send(Ether(src=one.mac, dst=BROADCAST) / ARP(op=1, hwsrc=one.mac, psrc=one.ip, pdst=str(SUBNET.gateway)))
    answers = [Ether(frame) for frame in one.frames(0.3) if Ether(frame).haslayer(ARP)]
    assert {answer[ARP].hwsrc for answer in answers} == {GATEWAY_MAC}


def test_the_next_engine_takes_over_what_is_there(world):
    """As a process does that comes after one that was killed: same bridge, same ports, new rules."""
    one, other = world.plug(), world.plug()
    first = world.engine
    os.close(first.tun)  # the dead process had them
    first.listener.close()
    first.namespace.close()

    async def up() -> LinuxEngine:
        engine = LinuxEngine(Namespace(world.path), CONFIG, GATEWAY_MAC)
        await engine.up({"vm1": True})  # of vm2 nobody knows, and who knows nothing isolates
        return engine

    second = world.do(up())
    world.engine = second
    second.watch(world.lane, world.departed.append, lambda: world.gone.append(True))
    assert sorted(second.adopted) == ["vm1", "vm2"]
    assert elements(world, "isolated") == ["vm1", "vm2"]
    one.send(one.marker(other))
    assert other.frames(0.1) == []
    assert world.plug().link == "vm3"
    for sock in (first._netlink, first._events):
        if sock.fileno() >= 0:
            world.lane.forget(sock.fileno())
            sock.close()


def test_the_agents_death_is_seen(world):
    os.kill(world.agent, signal.SIGKILL)
    world.turn()
    assert world.gone == [True]
    with pytest.raises(HostError, match="agent is gone"):
        world.engine.namespace.request("links")


def test_transparent_sockets_come_in_batches_and_do_not_block(world):
    fds = [world.engine.transparent() for _ in range(70)]
    assert len(set(fds)) == 70
    assert not any(os.get_blocking(fd) for fd in fds)
    for fd in fds:
        os.close(fd)
