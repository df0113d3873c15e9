"""bootpd's leases read."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from openvmnet.engine.darwin import leases
from openvmnet.engine.darwin.leases import Lease

if TYPE_CHECKING:
    from pathlib import Path

FILE = """{
\tname=guest
\tip_address=192.168.64.2
\thw_address=1,52:54:0:12:34:56
\tidentifier=1,52:54:0:12:34:56
\tlease=0x672a1c3f
}
{
\tname=
\tip_address=192.168.64.3
\thw_address=ff,f1:f5:dd:7f:0:2:0:0:ab:11
\tidentifier=ff,f1:f5:dd:7f:0:2:0:0:ab:11
\tlease=0x672a1c40
}
{
\tip_address=nonsense
}
{
\tip_address=192.168.64.4
\thw_address=1,52:54:0:12:34:56
\tlease=0x672b0000
}
"""
MINE = "52:54:00:12:34:56"


def test_leases_are_read_as_bootpd_writes_them() -> None:
    first, second, third = leases.parse(FILE)
    assert first == Lease(IPv4Address("192.168.64.2"), MINE, "1,52:54:0:12:34:56", "guest", 0x672A1C3F)
    assert (second.mac, second.name, second.identifier) == (None, None, "ff,f1:f5:dd:7f:0:2:0:0:ab:11")
    assert (third.mac, third.identifier) == (MINE, "1,52:54:0:12:34:56")


def test_the_lease_that_lasts_longest_is_the_guests() -> None:
    given_out = leases.parse(FILE)
    found = leases.address_of(MINE.upper(), given_out, 0)
    assert found is not None
    assert str(found.address) == "192.168.64.4"
    assert leases.address_of(MINE, given_out, 0x672A1C40).address == IPv4Address("192.168.64.4")  # type: ignore[union-attr]
    assert leases.address_of(MINE, given_out, 0x672B0001) is None
    assert leases.address_of("52:54:00:00:00:00", given_out, 0) is None


def test_a_file_that_is_not_there_has_no_leases(tmp_path: Path) -> None:
    assert leases.read(tmp_path / "dhcpd_leases") == []
    (tmp_path / "dhcpd_leases").write_bytes(FILE.encode() + b"\xff{")
    assert len(leases.read(tmp_path / "dhcpd_leases")) == 3


@given(st.text(alphabet="{}=,:\n\t0123456789abcdefx.ip_addresshwlnm%"))
def test_whatever_the_text_there_are_leases_or_none(text: str) -> None:
    for lease in leases.parse(text):
        assert isinstance(lease.address, IPv4Address)
