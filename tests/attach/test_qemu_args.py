"""qemu_args: which words are options and which are their arguments, as QEMU reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.attach.qemu_args import Argument, arguments, first_disk, guest_name


def read(line: str) -> list[tuple[str, str]]:
    return [(arg.option, arg.value) for arg in arguments(line.split())]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("qemu-system-x86_64 -netdev a", [("netdev", "a")]),
        ("qemu-system-x86_64 --netdev a", [("netdev", "a")]),
        ("qemu-system-x86_64 -netdev=a", []),
        ("qemu-system-x86_64 -append -netdev a.img", [("append", "-netdev"), ("", "a.img")]),
        ("qemu-system-x86_64 -snapshot disk.img -S", [("", "disk.img")]),
        ("qemu-system-x86_64 -brand-new -netdev a", [("netdev", "a")]),
        ("qemu-system-x86_64 -brand-new value -netdev a", [("brand-new", "value"), ("netdev", "a")]),
        ("qemu-system-x86_64 -netdev", []),
        ("/opt/q/qemu-system-aarch64 disk.img", [("", "disk.img")]),
        ("taskset -c 1 qemu-system-x86_64 disk.img", [("", "disk.img")]),
        ("./start-vm disk.img -netdev a", [("netdev", "a")]),
        ("qemu-kvm a.img", [("", "a.img")]),
        ("", []),
    ],
)
def test_reading(line: str, found: list[tuple[str, str]]) -> None:
    assert read(line) == found


@given(st.lists(st.sampled_from(["-netdev", "--nic", "-S", "-append", "-x", "a", "", "-", "--", "qemu-kvm"])))
def test_positions_point_at_the_values(argv: list[str]) -> None:
    for arg in arguments(argv):
        assert isinstance(arg, Argument)
        assert argv[arg.position] == arg.value
        assert arg.option == "" or argv[arg.position - 1].lstrip("-") == arg.option


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("qemu -name web", "web"),
        ("qemu -name guest=web,debug-threads=on", "web"),
        ("qemu -name process=p,guest=web", "web"),
        ("qemu -name web,,1", "web,1"),
        ("qemu -name web -name db", "db"),
        ("qemu -name process=p", None),
        ("qemu", None),
    ],
)
def test_guest_name(line: str, name: str | None) -> None:
    assert guest_name(list(arguments(line.split()))) == name


@pytest.mark.parametrize(
    ("line", "disk"),
    [
        ("qemu -drive file=a.img,if=virtio", "a.img"),
        ("qemu -drive if=pflash,file=code.fd -drive if=virtio,file=a,,b.img", "a,b.img"),
        ("qemu -cdrom install.iso -hda a.img", "a.img"),
        ("qemu -cdrom install.iso", "install.iso"),
        ("qemu -drive file=i.iso,media=cdrom -drive file=a.img", "a.img"),
        ("qemu -drive file=base.img,readonly=on -drive file=a.img", "a.img"),
        ("qemu -drive file=base.img,readonly=off -drive file=a.img", "base.img"),
        ("qemu -blockdev driver=file,node-name=d,filename=a.img", "a.img"),
        ("qemu -blockdev driver=qcow2,file.driver=file,file.filename=a.qcow2", "a.qcow2"),
        ('qemu -blockdev {"driver":"file","node-name":"d","filename":"a.img"}', "a.img"),
        ('qemu -blockdev {"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}', "a.qcow2"),
        ('qemu -blockdev {"driver":"file","node-name":"pflash0","filename":"code.fd"} a.img', "a.img"),
        ('qemu -blockdev {"driver":"file","read-only":true,"filename":"code.fd"} a.img', "a.img"),
        ("qemu -blockdev {broken a.img", "a.img"),
        ("qemu -blockdev driver=raw,file=d -kernel bzImage", None),
        ("qemu a.img", "a.img"),
        ("qemu -kernel bzImage", None),
    ],
)
def test_first_disk(line: str, disk: str | None) -> None:
    assert first_disk(list(arguments(line.split()))) == disk
