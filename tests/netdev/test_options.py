"""netdev: what is read is what was written, and every refusal word for word."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Network

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet import netdev
from openvmnet.errors import OptionError
from openvmnet.netdev import Bridged, Host, Shared
from tests.netdev.strategies import IDS, addresses, options, triples


@given(options())
def test_what_is_formatted_is_read_back(shared: Shared) -> None:
    assert netdev.parse(shared.format()) == shared


@given(options())
def test_both_forms_mean_the_same(shared: Shared) -> None:
    members = {"type": "vmnet-shared", "id": shared.id, "isolated": shared.isolated}
    for name, field in (
        ("start-address", "start_address"),
        ("end-address", "end_address"),
        ("subnet-mask", "subnet_mask"),
        ("nat66-prefix", "nat66_prefix"),
        ("address", "address"),
    ):
        if (value := getattr(shared, field)) is not None:
            members[name] = value
    if shared.mtu is not None:
        members["mtu"] = shared.mtu
    if shared.hostfwd:
        members["hostfwd"] = [{"str": rule} for rule in shared.hostfwd]
    text = msgspec.json.encode(members).decode()
    assert netdev.parse(text) == shared
    assert netdev.parse(text.replace('"', "'")) == shared


@given(st.text(max_size=60) | st.text(alphabet="{}'\":,=vmnet-shared,id=", max_size=60))
def test_any_text_is_a_value_or_an_option_error(text: str) -> None:
    for candidate in (text, "vmnet-shared," + text, "{" + text):
        with contextlib.suppress(OptionError):
            assert isinstance(netdev.parse(candidate), Shared | Host | Bridged)


@pytest.mark.parametrize(
    ("value", "isolated"),
    [
        ("isolated=on", True),
        ("isolated=yes", True),
        ("isolated=true", True),
        ("isolated=y", True),
        ("isolated", True),
        ("isolated=off", False),
        ("isolated=no", False),
        ("isolated=false", False),
        ("isolated=n", False),
        ("noisolated", False),
        ("isolated=on,isolated=off", False),
    ],
)
def test_isolated(value: str, isolated: bool) -> None:
    assert netdev.parse(f"vmnet-shared,id=net0,{value}").isolated is isolated


def test_the_first_id_counts_and_of_other_keys_the_last() -> None:
    text = "vmnet-shared,id=a,id=b,nat66-prefix=fd00::,nat66-prefix=fd01::"
    assert netdev.parse(text) == Shared("a", nat66_prefix="fd01::")


def test_the_type_may_stand_anywhere() -> None:
    assert netdev.parse("id=a,type=vmnet-shared") == Shared("a")
    assert netdev.parse("user,id=a,type=vmnet-shared") == Shared("a")


TRIPLE = "vmnet-shared,id=n,start-address={},end-address={},subnet-mask={}"
RFC1918 = "a private address of RFC 1918 (in 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16)"
TOGETHER = "'start-address', 'end-address', 'subnet-mask' should be provided together: "
MASK = "Parameter 'subnet-mask' expects a contiguous mask from 255.0.0.0 (/8) to 255.255.255.252 (/30), not "
NAT66 = (
    "Parameter 'nat66-prefix' expects a unique local IPv6 prefix (fd00::/8) of 64 bits such as fd12:3456:789a:1::, not "
)
UUID = "a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d"
UUID_ = f"Invalid UUID provided in 'net-uuid': it expects 32 hexadecimal digits such as {UUID}, not '{{}}'"
FORWARD = "Invalid host forwarding rule '{}' ({}): "
SYNTAX = "it expects [tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport, such as tcp::2222-:22"
ZONE = "it expects an IPv6 address without a zone, "
ADDRESS = "it expects an IPv4 address such as 192.168.64.2, or an IPv6 address in brackets, "
PORT = "it expects a number from 1 to 65535, "
IDENTIFIER = "Parameter 'id' expects an identifier (letters, digits, '-', '.', '_', starting with a letter), not '{}'"


@pytest.mark.parametrize(
    ("text", "message", "option"),
    [
        ("vmnet-shared", "Parameter 'id' is missing: give the netdev a name, as in vmnet-shared,id=net0", "id"),
        ("vmnet-shared,id=", IDENTIFIER.format(""), "id"),
        ("vmnet-shared,id=0x", IDENTIFIER.format("0x"), "id"),
        ("vmnet-shared,id=a/b", IDENTIFIER.format("a/b"), "id"),
        ("vmnet-shared,id=ä", IDENTIFIER.format("ä"), "id"),
        ("vmnet-bridged,id=n,ifname=en0,hostfwd=tcp::22-:22", "Invalid parameter 'hostfwd'", "hostfwd"),
        (
            '{"type":"vmnet-bridged","id":"n","ifname":"en0","hostfwd":[]}',
            "Parameter 'hostfwd' is unexpected",
            "hostfwd",
        ),
        (
            '{"type":"vmnet-shared","id":"n","hostfwd":"tcp::1-:1"}',
            "Invalid parameter type for 'hostfwd', expected: array",
            "hostfwd",
        ),
        *(
            (
                f'{{"type":"vmnet-shared","id":"n","hostfwd":[{member}]}}',
                'Invalid parameter type for \'hostfwd\', expected: objects such as {"str":"tcp::2222-:22"}',
                "hostfwd",
            )
            for member in ('"tcp::1-:1"', '{"str":1}', "{}", '{"str":"tcp::1-:1","more":1}', "null")
        ),
        ("vmnet-shared,id=n,hostfwd", FORWARD.format("on", "No : separators") + SYNTAX, "hostfwd"),
        ("vmnet-shared,id=n,hostfwd=22", FORWARD.format("22", "No : separators") + SYNTAX, "hostfwd"),
        (
            "vmnet-host,id=n,hostfwd=sctp::1-:2",
            FORWARD.format("sctp::1-:2", "Bad protocol name") + "it expects tcp or udp, not 'sctp'",
            "hostfwd",
        ),
        ("vmnet-shared,id=n,hostfwd=tcp:22", FORWARD.format("tcp:22", "Missing : separator") + SYNTAX, "hostfwd"),
        ("vmnet-shared,id=n,hostfwd=::22", FORWARD.format("::22", "Bad host port separator") + SYNTAX, "hostfwd"),
        ("vmnet-shared,id=n,hostfwd=::1-22", FORWARD.format("::1-22", "Missing guest address") + SYNTAX, "hostfwd"),
        *(
            (
                f"vmnet-shared,id=n,hostfwd=tcp:{host}:1-:2",
                FORWARD.format(f"tcp:{host}:1-:2", "Bad host address") + ADDRESS + f"not '{host}'",
                "hostfwd",
            )
            for host in ("localhost", "127.1", "192.168.64.01")
        ),
        (
            "vmnet-shared,id=n,hostfwd=tcp:[fe80::1%eth0]:1-:2",
            FORWARD.format("tcp:[fe80::1%eth0]:1-:2", "Bad host address") + ZONE + "not 'fe80::1%eth0'",
            "hostfwd",
        ),
        (
            "vmnet-shared,id=n,hostfwd=tcp::1-guest:2",
            FORWARD.format("tcp::1-guest:2", "Bad guest address") + ADDRESS + "not 'guest'",
            "hostfwd",
        ),
        (
            "vmnet-shared,id=n,hostfwd=tcp::1-127.0.0.1:2",
            FORWARD.format("tcp::1-127.0.0.1:2", "Bad guest address") + "127.0.0.1 is no address of a guest's",
            "hostfwd",
        ),
        *(
            (
                f"vmnet-shared,id=n,hostfwd=tcp::{port}-:2",
                FORWARD.format(f"tcp::{port}-:2", "Bad host port") + PORT + f"not '{port}'",
                "hostfwd",
            )
            for port in ("0", "65536", "+1", "022", "0x16", "", "ssh", "\u0661")
        ),
        *(
            (
                f"vmnet-shared,id=n,hostfwd=tcp::1-:{port}",
                FORWARD.format(f"tcp::1-:{port}", "Bad guest port") + PORT + f"not '{port}'",
                "hostfwd",
            )
            for port in ("0", "65536", "", "22:")
        ),
        (
            "vmnet-shared,id=n,hostfwd=tcp::1-:2,hostfwd=::1-:3",
            "Could not set up host forwarding rule '::1-:3': 'tcp::1-:2' has that port of the host's",
            "hostfwd",
        ),
        (
            f"vmnet-host,id=n,net-uuid={UUID},hostfwd=tcp::1-:2",
            (
                "Could not set up host forwarding rule 'tcp::1-:2': the host is not on a private network (net-uuid) "
                "without start-address, end-address and subnet-mask"
            ),
            "hostfwd",
        ),
        ("vmnet-shared,id=n,isolated=maybe", "Parameter 'isolated' expects 'on' or 'off', not 'maybe'", "isolated"),
        ("vmnet-shared,id=n,isolated=ON", "Parameter 'isolated' expects 'on' or 'off', not 'ON'", "isolated"),
        (
            '{"type":"vmnet-shared","id":"n","isolated":"on"}',
            "Invalid parameter type for 'isolated', expected: boolean",
            "isolated",
        ),
        ('{"type":"vmnet-shared","id":7}', "Invalid parameter type for 'id', expected: string", "id"),
        ('{"id":"n"}', "Parameter 'type' is missing", "type"),
        ("", "Parameter 'type' is missing", "type"),
        ("vmnet-host,id=n,nat66-prefix=fd00::", "Invalid parameter 'nat66-prefix'", "nat66-prefix"),
        ("vmnet-shared,id=n,net-uuid=x", "Invalid parameter 'net-uuid'", "net-uuid"),
        ("vmnet-bridged,id=n,ifname=en0,mtu=1500", "Invalid parameter 'mtu'", "mtu"),
        (
            "vmnet-bridged,id=n",
            "Parameter 'ifname' is missing: name the bridge or wired NIC, as in vmnet-bridged,id=net0,ifname=eth0",
            "ifname",
        ),
        ("vmnet-host,id=n,net-uuid=42", UUID_.format("42"), "net-uuid"),
        (f"vmnet-host,id=n,net-uuid={{{UUID}}}", UUID_.format(f"{{{UUID}}}"), "net-uuid"),
        (f"vmnet-host,id=n,net-uuid={UUID.replace('-', '')}", UUID_.format(UUID.replace("-", "")), "net-uuid"),
        *(
            (f"vmnet-shared,id=n,mtu={mtu}", f"Parameter 'mtu' expects a number from 1280 to 65520, not '{mtu}'", "mtu")
            for mtu in ("1279", "65521", "-1500", "1500.0", "0x5dc", "", "99999999999999", "¹500")
        ),
        (
            '{"type":"vmnet-host","id":"n","mtu":"1500"}',
            "Invalid parameter type for 'mtu', expected: integer",
            "mtu",
        ),
        (
            '{"type":"vmnet-host","id":"n","mtu":true}',
            "Invalid parameter type for 'mtu', expected: integer",
            "mtu",
        ),
        (
            "user,id=n",
            "Parameter 'type' does not accept value 'user', only vmnet-shared, vmnet-host, vmnet-bridged",
            "type",
        ),
        (
            "vmnet-shared,id=n,start-address=192.168.64.1",
            TOGETHER + "'end-address' and 'subnet-mask' are missing",
            None,
        ),
        (
            "vmnet-shared,id=n,start-address=192.168.64.1,end-address=192.168.64.9",
            TOGETHER + "'subnet-mask' is missing",
            "subnet-mask",
        ),
        (
            TRIPLE.format("192.168.64", "192.168.64.9", "255.255.255.0"),
            "Parameter 'start-address' expects an IPv4 address such as 192.168.64.1, not '192.168.64'",
            "start-address",
        ),
        (
            TRIPLE.format("192.168.64.01", "192.168.64.9", "255.255.255.0"),
            "Parameter 'start-address' expects an IPv4 address such as 192.168.64.1, not '192.168.64.01'",
            "start-address",
        ),
        (
            TRIPLE.format("8.8.8.1", "8.8.8.9", "255.255.255.0"),
            f"Parameter 'start-address' expects {RFC1918}, not '8.8.8.1'",
            "start-address",
        ),
        (
            TRIPLE.format("10.0.0.1", "172.32.0.1", "255.255.255.0"),
            f"Parameter 'end-address' expects {RFC1918}, not '172.32.0.1'",
            "end-address",
        ),
        (TRIPLE.format("10.0.0.1", "10.0.0.9", "255.0.255.0"), MASK + "'255.0.255.0'", "subnet-mask"),
        (TRIPLE.format("10.0.0.1", "10.0.0.9", "255.255.255.254"), MASK + "'255.255.255.254'", "subnet-mask"),
        (TRIPLE.format("10.0.0.1", "10.0.0.9", "254.0.0.0"), MASK + "'254.0.0.0'", "subnet-mask"),
        (TRIPLE.format("10.0.0.1", "10.0.0.9", "24"), MASK + "'24'", "subnet-mask"),
        (TRIPLE.format("10.0.0.1", "10.0.0.9", "0.0.0.255"), MASK + "'0.0.0.255'", "subnet-mask"),
        (TRIPLE.format("10.0.0.1", "10.0.0.9", "0.0.0.0"), MASK + "'0.0.0.0'", "subnet-mask"),
        (
            TRIPLE.format("172.16.0.1", "172.16.0.9", "255.0.0.0"),
            (
                "Parameter 'subnet-mask' expects a mask of /12 to /30 with start-address 172.16.0.1, "
                "or the subnet leaves RFC 1918, not '255.0.0.0'"
            ),
            "subnet-mask",
        ),
        (
            TRIPLE.format("192.168.64.1", "192.168.65.9", "255.255.255.0"),
            (
                "Parameter 'end-address' expects an address of 192.168.64.0/24, the subnet of start-address "
                "192.168.64.1, not '192.168.65.9'"
            ),
            "end-address",
        ),
        (
            TRIPLE.format("192.168.64.9", "192.168.64.1", "255.255.255.0"),
            "Parameter 'end-address' expects an address after start-address 192.168.64.9, not '192.168.64.1'",
            "end-address",
        ),
        (
            TRIPLE.format("192.168.64.9", "192.168.64.9", "255.255.255.0"),
            "Parameter 'end-address' expects an address after start-address 192.168.64.9, not '192.168.64.9'",
            "end-address",
        ),
        (
            TRIPLE.format("192.168.64.0", "192.168.64.9", "255.255.255.0"),
            (
                "Parameter 'start-address' expects a host's address of 192.168.64.0/24 "
                "(192.168.64.1 to 192.168.64.254), not the network address '192.168.64.0'"
            ),
            "start-address",
        ),
        (
            TRIPLE.format("192.168.64.1", "192.168.64.255", "255.255.255.0"),
            (
                "Parameter 'end-address' expects a host's address of 192.168.64.0/24 (192.168.64.1 to 192.168.64.254), "
                "not the broadcast address '192.168.64.255'"
            ),
            "end-address",
        ),
        *(
            (
                f"vmnet-shared,id=n,address={value}",
                f"Parameter 'address' expects an IPv4 address such as 192.168.64.1, not '{value}'",
                "address",
            )
            for value in ("", "web", "192.168.64", "192.168.64.050", "fd00::1", "192.168.64.5/24")
        ),
        (
            "vmnet-host,id=n,address=8.8.8.8",
            f"Parameter 'address' expects {RFC1918}, not '8.8.8.8'",
            "address",
        ),
        *(
            (
                TRIPLE.format("192.168.64.8", "192.168.64.20", "255.255.255.0") + f",address={value}",
                f"Parameter 'address' expects an address of the DHCP pool, 192.168.64.9 to 192.168.64.20, not {what}",
                "address",
            )
            for value, what in (
                ("192.168.64.8", "the gateway's '192.168.64.8'"),
                ("192.168.64.7", "'192.168.64.7'"),
                ("192.168.64.21", "'192.168.64.21'"),
                ("10.0.0.9", "'10.0.0.9'"),
            )
        ),
        (
            f"vmnet-host,id=n,net-uuid={UUID},address=192.168.64.9",
            (
                "Parameter 'address' needs DHCP, which a private network ('net-uuid') has only with 'start-address', "
                "'end-address' and 'subnet-mask', so not '192.168.64.9'"
            ),
            "address",
        ),
        ("vmnet-bridged,id=n,ifname=en0,address=192.168.64.9", "Invalid parameter 'address'", "address"),
        (
            '{"type":"vmnet-shared","id":"n","address":7}',
            "Invalid parameter type for 'address', expected: string",
            "address",
        ),
        ("vmnet-shared,id=n,nat66-prefix=fe80::", NAT66 + "'fe80::'", "nat66-prefix"),
        ("vmnet-shared,id=n,nat66-prefix=fd00::1", NAT66 + "'fd00::1'", "nat66-prefix"),
        ("vmnet-shared,id=n,nat66-prefix=fd00::/48", NAT66 + "'fd00::/48'", "nat66-prefix"),
        ("vmnet-shared,id=n,nat66-prefix=fd00::%eth0", NAT66 + "'fd00::%eth0'", "nat66-prefix"),
        ("vmnet-shared,id=n,nat66-prefix", NAT66 + "'on'", "nat66-prefix"),
    ],
)
def test_refusals_word_for_word(text: str, message: str, option: str | None) -> None:
    with pytest.raises(OptionError) as caught:
        netdev.parse(text)
    assert caught.value.message == message
    if option is not None:
        assert caught.value.option == option


def test_json_that_is_none_begins_with_qemus_words() -> None:
    with pytest.raises(OptionError, match=r"^JSON parse error, "):
        netdev.parse('{"type":"vmnet-shared","id":"n",}')


@pytest.mark.parametrize("odd", [None, b"vmnet-shared,id=n", ["vmnet-shared", "id=n"], Shared("n")])
def test_what_is_no_text_is_an_option_error(odd: object) -> None:
    with pytest.raises(OptionError, match=r"^parse\(\) takes text such as"):
        netdev.parse(odd)  # type: ignore[arg-type] # what is wrong is the test


def test_the_prefix_is_a_network_of_64_bits() -> None:
    for text in ("fd00:1::", "fd00:1::/64"):
        shared = netdev.parse(f"vmnet-shared,id=n,nat66-prefix={text}")
        assert isinstance(shared, Shared)
        assert shared.prefix == IPv6Network("fd00:1::/64")
    assert Shared("n").prefix is None


@given(
    IDS, st.booleans(), st.none() | triples(), st.none() | st.uuids(), st.none() | st.integers(1280, 65520), st.data()
)
def test_host_options_are_read_back(id_, isolated, triple, uuid, mtu, data) -> None:
    start, end, mask = triple or (None, None, None)
    address = None if uuid and not triple else data.draw(addresses(start, end))
    host = Host(id_, isolated, start, end, mask, uuid and str(uuid).upper(), mtu, address)
    assert netdev.parse(host.format()) == host
    assert host.uuid == (uuid and str(uuid))


@given(triples(), st.ip_addresses(v=4))
def test_an_address_is_of_the_pool_or_refused(triple: tuple[str, str, str], address: IPv4Address) -> None:
    start, end, _ = triple
    inside = IPv4Address(start) < address <= IPv4Address(end)
    for kind in (Shared, Host):
        options = kind("n", False, *triple, address=str(address))
        if inside:
            options.validate()
            assert options.reservation == address
        else:
            with pytest.raises(OptionError, match="Parameter 'address' expects"):
                options.validate()


def test_without_an_address_nothing_is_reserved() -> None:
    assert Shared("n").reservation is None
    assert netdev.parse("vmnet-host,id=n,address=192.168.128.9").reservation == IPv4Address("192.168.128.9")


@given(IDS, st.booleans(), st.text(min_size=1, max_size=20))
def test_bridged_options_are_read_back(id_, isolated, ifname) -> None:
    bridged = Bridged(id_, isolated, ifname)
    assert netdev.parse(bridged.format()) == bridged
