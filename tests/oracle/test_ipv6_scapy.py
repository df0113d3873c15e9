"""Router advertisements and DHCPv6 messages against scapy's."""

from __future__ import annotations

from ipaddress import IPv6Address

from scapy.layers import dhcp6 as scapy_dhcp
from scapy.layers import inet6 as scapy

from openvmnet.wire import dhcp6, icmp6
from openvmnet.wire.dhcp6 import Address, Ia, Message
from openvmnet.wire.icmp6 import Advertisement, Neighbour, Prefix

MAC = bytes.fromhex("525400123456")
PREFIX = bytes.fromhex("fd00112233440000") + bytes(8)
GATEWAY = PREFIX[:15] + b"\1"
SOURCE, EVERYBODY = "fe80::1", "ff02::1"


def test_scapy_reads_our_advertisement():
    ours = Advertisement(
        1800, (Prefix(PREFIX, 64, 86400, 14400),), managed=True, other=True, mtu=1400, mac=MAC, dns=(GATEWAY,),
        search=("vmnet.internal", "example.org"), dns_lifetime=900,
    )  # fmt: skip
    message = icmp6.build_advertisement(ours)
    packed = [IPv6Address(one).packed for one in (SOURCE, EVERYBODY)]
    summed = message[:2] + icmp6.checksum(*packed, message).to_bytes(2, "big") + message[4:]
    theirs = scapy.IPv6(bytes(scapy.IPv6(src=SOURCE, dst=EVERYBODY, nh=58, hlim=255, plen=len(summed))) + summed)
    one = theirs[scapy.ICMPv6ND_RA]
    assert (one.M, one.O, one.routerlifetime) == (1, 1, 1800)
    prefix = theirs[scapy.ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("fd00:1122:3344::", 64, 1, 1)
    assert (prefix.validlifetime, prefix.preferredlifetime) == (86400, 14400)
    assert theirs[scapy.ICMPv6NDOptMTU].mtu == 1400
    assert theirs[scapy.ICMPv6NDOptSrcLLAddr].lladdr == MAC.hex(":")
    dns = theirs[scapy.ICMPv6NDOptRDNSS]
    assert (dns.dns, dns.lifetime) == (["fd00:1122:3344::1"], 900)
    assert theirs[scapy.ICMPv6NDOptDNSSL].searchlist == ["vmnet.internal.", "example.org."]
    # The checksum is scapy's own.
    again = scapy.IPv6(src=SOURCE, dst=EVERYBODY, hlim=255) / scapy.ICMPv6ND_RA(message)
    del again[scapy.ICMPv6ND_RA].cksum
    assert bytes(again)[40:] == summed


def test_we_read_scapys_solicitations():
    bare = scapy.ICMPv6ND_RS() / scapy.ICMPv6NDOptSrcLLAddr(lladdr=MAC.hex(":"))
    assert icmp6.parse_solicitation(bytes(bare)) == MAC
    asks = scapy.ICMPv6ND_NS(tgt="fd00:1122:3344::1") / scapy.ICMPv6NDOptSrcLLAddr(lladdr=MAC.hex(":"))
    assert icmp6.parse_neighbour(bytes(asks)) == Neighbour(135, GATEWAY, MAC)


def test_we_read_scapys_dhcp():
    iaid = 0x01020304
    theirs = (
        scapy_dhcp.DHCP6_Solicit(trid=0x123456)
        / scapy_dhcp.DHCP6OptClientId(duid=scapy_dhcp.DUID_LL(lladdr=MAC.hex(":")))
        / scapy_dhcp.DHCP6OptIA_NA(
            iaid=iaid,
            T1=5,
            T2=6,
            ianaopts=[scapy_dhcp.DHCP6OptIAAddress(addr="fd00:1122:3344::1", preflft=7, validlft=8)],
        )
        / scapy_dhcp.DHCP6OptOptReq(reqopts=[23, 24, 59])
        / scapy_dhcp.DHCP6OptElapsedTime(elapsedtime=3)
        / scapy_dhcp.DHCP6OptRapidCommit()
        / scapy_dhcp.DHCP6OptUserClass(userclassdata=[scapy_dhcp.USER_CLASS_DATA(data=b"iPXE")])
        / scapy_dhcp.DHCP6OptClientFQDN(flags=1, fqdn="alpha.example.org")
    )
    message = dhcp6.parse(bytes(theirs))
    assert (message.type, message.transaction) == (dhcp6.SOLICIT, bytes.fromhex("123456"))
    assert message.duid(dhcp6.CLIENT_ID) == dhcp6.duid_ll(MAC)
    assert message.ias() == [Ia(iaid.to_bytes(4, "big"), 5, 6, (Address(GATEWAY, 7, 8),))]
    assert message.requested() == {23, 24, 59}
    assert message.get(dhcp6.RAPID_COMMIT) == b""
    fqdn = message.fqdn()
    assert fqdn is not None
    assert (fqdn.name.rstrip("."), fqdn.server_updates) == ("alpha.example.org", True)


def test_scapy_reads_our_dhcp():
    ours = Message(
        dhcp6.REPLY,
        b"\1\2\3",
        [
            (dhcp6.SERVER_ID, dhcp6.duid_ll(MAC)),
            (dhcp6.IA_NA, dhcp6.encode_ia(Ia(b"\0\0\0\7", 1, 2, (Address(GATEWAY, 3, 4),), (0, "fine")))),
            (dhcp6.DNS_SERVERS, GATEWAY),
            (dhcp6.DOMAIN_LIST, icmp6.encode_domain("vmnet.internal")),
        ],
    )
    theirs = scapy_dhcp.DHCP6_Reply(dhcp6.build(ours))
    assert theirs.trid == 0x010203
    assert theirs[scapy_dhcp.DHCP6OptServerId].duid.lladdr == MAC.hex(":")
    ia = theirs[scapy_dhcp.DHCP6OptIA_NA]
    assert (ia.iaid, ia.T1, ia.T2) == (7, 1, 2)
    address, status = ia.ianaopts
    assert (address.addr, address.preflft, address.validlft) == ("fd00:1122:3344::1", 3, 4)
    assert (status.statuscode, status.statusmsg) == (0, b"fine")
    assert theirs[scapy_dhcp.DHCP6OptDNSServers].dnsservers == ["fd00:1122:3344::1"]
    assert theirs[scapy_dhcp.DHCP6OptDNSDomains].dnsdomains == ["vmnet.internal."]
