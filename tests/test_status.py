"""vmnet's result codes."""

from __future__ import annotations

import pytest

from openvmnet.status import Status

# From QEMU's net/vmnet-common.m, which has none for 1010.
QEMU = {
    1000: "success",
    1001: "general failure (possibly not enough privileges)",
    1002: "memory allocation failure",
    1003: "invalid argument specified",
    1004: "interface setup is not complete",
    1005: "invalid access, permission denied",
    1006: "packet size is larger than MTU",
    1007: "buffers exhausted in kernel",
    1008: "packet count exceeds limit",
    1009: "conflict, sharing service is in use",
}


@pytest.mark.parametrize(("code", "text"), QEMU.items())
def test_qemus_text_of_a_code(code: int, text: str) -> None:
    assert Status(code).text == text


def test_1010_has_a_text_too() -> None:
    assert Status.NOT_AUTHORIZED == 1010
    assert "authorized" in Status.NOT_AUTHORIZED.text


def test_the_names_are_vmnets() -> None:
    assert [each.name for each in Status] == [
        "SUCCESS", "FAILURE", "MEM_FAILURE", "INVALID_ARGUMENT", "SETUP_INCOMPLETE", "INVALID_ACCESS",
        "PACKET_TOO_BIG", "BUFFER_EXHAUSTED", "TOO_MANY_PACKETS", "SHARING_SERVICE_BUSY", "NOT_AUTHORIZED",
    ]  # fmt: skip
    assert [int(each) for each in Status] == list(range(1000, 1011))


def test_a_code_of_a_later_vmnet_is_a_failure() -> None:
    assert Status.of(1006) is Status.PACKET_TOO_BIG
    assert Status.of(1011) is Status.FAILURE
