"""MACs that follow from what a VM is."""

from __future__ import annotations

from openvmnet import netdev


def test_stable_macs() -> None:
    assert netdev.stable_mac("web", 0) == netdev.stable_mac("web", 0)
    many = {netdev.stable_mac(f"vm{n}", index, attempt) for n in range(20) for index in (0, 1) for attempt in (0, 1)}
    assert len(many) == 80
    for mac in many:
        assert mac.startswith("52:54:00:")
        assert len(bytes.fromhex(mac.replace(":", ""))) == 6
    assert netdev.stable_mac("/disks/\udcff.img", 0)
