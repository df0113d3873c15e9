"""Our DHCP and Ethernet octets, read and written by scapy."""

from __future__ import annotations

import random
from ipaddress import IPv4Address

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Ether

from openvmnet.wire import dhcp4, ethernet, ip
from openvmnet.wire.dhcp4 import Message

MAC = bytes.fromhex("525400123456")


def theirs(octets: bytes) -> tuple[BOOTP, dict[str, object]]:
    packet = BOOTP(octets)
    options = {
        option[0]: option[1] if len(option) == 2 else option[1:] for option in packet[DHCP].options if len(option) > 1
    }
    return packet, options


def test_scapy_reads_our_ack():
    message = Message(
        op=dhcp4.BOOTREPLY,
        xid=0xDEADBEEF,
        chaddr=MAC,
        yiaddr=bytes([192, 168, 64, 2]),
        flags=dhcp4.BROADCAST_FLAG,
        options={
            53: bytes([dhcp4.ACK]),
            54: bytes([192, 168, 64, 1]),
            51: (3600).to_bytes(4, "big"),
            58: (1800).to_bytes(4, "big"),
            59: (3150).to_bytes(4, "big"),
            1: bytes([255, 255, 255, 0]),
            3: bytes([192, 168, 64, 1]),
            6: bytes([192, 168, 64, 1, 9, 9, 9, 9]),
            12: b"web",
            15: b"vmnet.internal",
            26: (1400).to_bytes(2, "big"),
            121: dhcp4.encode_routes([(IPv4Address("10.0.0.0"), 8, IPv4Address("192.168.64.1"))]),
            61: b"\1" + MAC,
            82: b"\1\2ab",
        },
    )
    packet, options = theirs(dhcp4.build(message)[0])
    assert (packet.op, packet.xid, packet.yiaddr, packet.chaddr[:6]) == (2, 0xDEADBEEF, "192.168.64.2", MAC)
    assert packet.flags == "B"
    assert options["message-type"] == 5
    assert options["server_id"] == options["router"] == "192.168.64.1"
    assert options["name_server"] == ("192.168.64.1", "9.9.9.9")
    assert (options["lease_time"], options["renewal_time"], options["rebinding_time"]) == (3600, 1800, 3150)
    assert (options["subnet_mask"], options["interface-mtu"]) == ("255.255.255.0", 1400)
    assert (options["hostname"], options["domain"]) == (b"web", b"vmnet.internal")
    assert options["classless_static_routes"] == ["10.0.0.0/8:192.168.64.1"]
    assert options["client_id"] == b"\1" + MAC
    assert "end" in packet[DHCP].options


def test_we_read_scapys_request():
    options = [
        ("message-type", "request"),
        ("requested_addr", "192.168.64.9"),
        ("server_id", "192.168.64.1"),
        ("param_req_list", [1, 3, 6, 121]),
        ("max_dhcp_size", 1472),
        ("hostname", "web"),
        ("client_id", b"\1" + MAC),
        "end",
    ]
    octets = bytes(BOOTP(op=1, xid=7, flags="B", secs=2, chaddr=MAC, ciaddr="10.1.2.3") / DHCP(options=options))
    message = dhcp4.parse(octets)
    assert message.type() == dhcp4.REQUEST
    assert (message.xid, message.secs, message.broadcast, message.ciaddr) == (7, 2, True, bytes([10, 1, 2, 3]))
    assert message.address(dhcp4.REQUESTED_ADDRESS) == bytes([192, 168, 64, 9])
    assert message.number(dhcp4.MAX_MESSAGE_SIZE, 2) == 1472
    assert message.options[55] == bytes([1, 3, 6, 121])
    assert message.options[61] == b"\1" + MAC


def test_random_option_sets_agree_with_scapy():
    rng = random.Random(2131)
    for _ in range(200):
        # Codes that scapy has no type for come back as (code, octets).
        codes = rng.sample([224, 225, 226, 227, 228, 229, 230], rng.randrange(1, 6))
        ours = {code: rng.randbytes(rng.randrange(1, 60)) for code in codes}
        octets, dropped = dhcp4.build(Message(op=1, xid=rng.getrandbits(32), chaddr=MAC, options=ours), limit=1472)
        assert not dropped
        seen = [option for option in BOOTP(octets)[DHCP].options if isinstance(option, tuple)]
        assert dict(seen) == ours
        again = bytes(BOOTP(op=1, chaddr=MAC) / DHCP(options=[*ours.items(), "end"]))
        assert dhcp4.parse(again).options == ours


def test_a_whole_frame_is_what_scapy_builds():
    payload = dhcp4.build(Message(op=2, xid=1, chaddr=MAC, options={53: b"\2"}))[0]
    source, destination = bytes([192, 168, 64, 1]), bytes([192, 168, 64, 2])
    frame = ethernet.build(MAC, bytes(6), ethernet.IPV4, ip.build_udp(source, destination, 67, 68, payload))
    built = Ether(dst=MAC.hex(":"), src="00:00:00:00:00:00") / IP(
        src="192.168.64.1", dst="192.168.64.2", flags="DF", id=0, ttl=64
    )
    assert frame == bytes(built / UDP(sport=67, dport=68) / payload)


@pytest.mark.parametrize("operation", [1, 2])
def test_arp_is_what_scapy_builds(operation):
    arp = ethernet.Arp(operation, MAC, bytes([10, 0, 0, 1]), bytes(6), bytes([10, 0, 0, 2]))
    built = ARP(op=operation, hwsrc=MAC.hex(":"), psrc="10.0.0.1", hwdst="00:00:00:00:00:00", pdst="10.0.0.2")
    assert ethernet.build_arp(arp) == bytes(built)
    assert ethernet.parse_arp(bytes(built)) == arp
