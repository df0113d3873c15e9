"""What an interface is started with: each option of each mode as the right key, of the right type."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from openvmnet.engine.darwin.description import Extras, describe
from openvmnet.engine.darwin.handle import Handle
from openvmnet.errors import MissingFeature, OptionError
from openvmnet.netdev import Bridged, Host, Shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls

ID = uuid.UUID("a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d")
TRIPLE = {"start_address": "10.1.2.1", "end_address": "10.1.2.99", "subnet_mask": "255.255.255.0"}
KEYS = {"vmnet_start_address": "10.1.2.1", "vmnet_end_address": "10.1.2.99", "vmnet_subnet_mask": "255.255.255.0"}
NO_MAC = {"vmnet_allocate_mac_address": False}


@pytest.mark.parametrize(
    ("options", "extras", "expected"),
    [
        (Shared(), Extras(), {"vmnet_operation_mode": 1001} | NO_MAC),
        (Shared(**TRIPLE), Extras(), {"vmnet_operation_mode": 1001} | KEYS | NO_MAC),
        (
            Shared(isolated=True, mtu=9000, nat66_prefix="fd12:3456:789a:1::"),
            Extras(interface_id=ID, allocate_mac_address=True, tso=True),
            {
                "vmnet_operation_mode": 1001,
                "vmnet_nat66_prefix": "fd12:3456:789a:1::",
                "vmnet_mtu": 9000,
                "vmnet_interface_id": ID,
                "vmnet_allocate_mac_address": True,
                "vmnet_enable_tso": True,
                "vmnet_enable_isolation": True,
            },
        ),
        (Host(**TRIPLE), Extras(), {"vmnet_operation_mode": 1000} | KEYS | NO_MAC),
        (
            Host(net_uuid=str(ID).upper()),
            Extras(),
            {"vmnet_operation_mode": 1000, "vmnet_network_identifier": ID} | NO_MAC,
        ),
        (
            Host(net_uuid=str(ID), **TRIPLE),
            Extras(host_ipv6="fd00::1", virtio_header=True),
            {
                "vmnet_operation_mode": 1000,
                "vmnet_network_identifier": ID,
                "vmnet_host_ip_address": "10.1.2.1",
                "vmnet_host_subnet_mask": "255.255.255.0",
                "vmnet_host_ipv6_address": "fd00::1",
                "vmnet_enable_virtio_header": True,
            }
            | NO_MAC,
        ),
        (
            Bridged(ifname="en0"),
            Extras(checksum_offload=True),
            {
                "vmnet_operation_mode": 1002,
                "vmnet_shared_interface_name": "en0",
                "vmnet_enable_checksum_offload": True,
            }
            | NO_MAC,
        ),
    ],
)
def test_options_become_keys_that_vmnet_takes(
    framework: Framework, controls: Controls, options: Shared | Host | Bridged, extras: Extras, expected: dict
) -> None:
    desc = describe(framework, options, extras)
    assert desc == expected
    assert {key: type(value) for key, value in desc.items() if isinstance(value, bool)} == {
        key: bool for key, value in expected.items() if isinstance(value, bool)
    }
    Handle(framework, desc).stop()


def test_mistakes_are_found_before_vmnet_is_asked(framework: Framework) -> None:
    for options, extras in (
        (Shared(start_address="8.8.8.1", end_address="8.8.8.9", subnet_mask="255.255.255.0"), Extras()),
        (Shared(start_address="10.0.0.1"), Extras()),
        (Bridged(), Extras()),
        (Host(net_uuid="nonsense"), Extras()),
        (Shared(), Extras(checksum_offload=True, virtio_header=True)),
    ):
        with pytest.raises(OptionError):
            describe(framework, options, extras)


@pytest.mark.parametrize(
    ("version", "options", "extras", "words"),
    [
        (1015, Shared(isolated=True), Extras(), r"isolated=on needs macOS 11\.0 or later"),
        (1015, Host(net_uuid=str(ID)), Extras(), r"net-uuid needs macOS 11\.0 or later"),
        (1015, Shared(), Extras(tso=True), r"TSO needs macOS 11\.0 or later"),
        (1100, Shared(), Extras(checksum_offload=True), r"checksum offload needs macOS 12\.0 or later"),
        (1500, Shared(), Extras(virtio_header=True), r"the virtio header needs macOS 15\.4 or later"),
    ],
)
def test_an_older_macos_says_what_an_option_needs(
    macos: Callable[[int], tuple[Controls, Framework]],
    version: int,
    options: Shared | Host,
    extras: Extras,
    words: str,
) -> None:
    _, older = macos(version)
    with pytest.raises(MissingFeature, match=words):
        describe(older, options, extras)
    describe(older, Shared(), Extras())
