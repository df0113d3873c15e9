"""command: every word but vmnet's stays, and each refusal word for word."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet import netdev
from openvmnet.attach import command
from openvmnet.errors import CallerError, OptionError
from openvmnet.netdev import Shared

QEMU = "qemu-system-x86_64"
MAC = "52:54:00:aa:bb:cc"
NETDEV = "vmnet-shared,id=net0"


def rewritten(*words: str, fd: int = 7) -> list[str]:
    plan = command.plan([QEMU, *words])
    count = len(plan.netdevs)
    macs = [f"52:54:00:00:00:{n:02x}" for n in range(count)]
    return command.rewrite(plan, range(fd, fd + count), macs)[1:]


@pytest.mark.parametrize(
    ("words", "result"),
    [
        (
            ["-netdev", NETDEV, "-device", "virtio-net-pci,netdev=net0"],
            ["-netdev", "tap,id=net0,fd=7", "-device", "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:00"],
        ),
        (
            ["--device", "virtio-net-pci,mac=52:54:00:1:2:3,netdev=net0", "--netdev", NETDEV + ",isolated=on"],
            ["--device", "virtio-net-pci,mac=52:54:00:1:2:3,netdev=net0", "--netdev", "tap,id=net0,fd=7"],
        ),
        (["-netdev", NETDEV], ["-netdev", "tap,id=net0,fd=7"]),
        (
            ["-netdev", NETDEV, "-device", "e1000,id=x,,y,netdev=net0,"],
            ["-netdev", "tap,id=net0,fd=7", "-device", "e1000,id=x,,y,netdev=net0,mac=52:54:00:00:00:00"],
        ),
        (
            ["-netdev", '{"type":"vmnet-shared","id":"net0"}', "-device", '{"driver":"e1000", "netdev":"net0"}'],
            [
                "-netdev",
                "tap,id=net0,fd=7",
                "-device",
                '{"mac":"52:54:00:00:00:00","driver":"e1000", "netdev":"net0"}',
            ],
        ),
        (
            ["-device", '{"driver":"e1000","netdev":"net0","mac":"52:54:00:00:00:09"}', "-netdev", NETDEV],
            ["-device", '{"driver":"e1000","netdev":"net0","mac":"52:54:00:00:00:09"}', "-netdev", "tap,id=net0,fd=7"],
        ),
        (["-nic", "vmnet-shared"], ["-nic", "tap,fd=7,mac=52:54:00:00:00:00"]),
        (
            ["-nic", "vmnet-shared,model=virtio-net-pci,isolated=on,id=n"],
            ["-nic", "tap,fd=7,model=virtio-net-pci,id=n,mac=52:54:00:00:00:00"],
        ),
        (
            ["-nic", f"vmnet-shared,mac={MAC},model=e1000"],
            ["-nic", f"tap,fd=7,mac={MAC},model=e1000"],
        ),
        (
            ["-net", "nic,model=e1000", "-net", "vmnet-shared"],
            ["-net", "nic,model=e1000,macaddr=52:54:00:00:00:00", "-net", "tap,fd=7"],
        ),
        (
            ["-net", "nic,netdev=net0", "-netdev", NETDEV],
            ["-net", "nic,netdev=net0,macaddr=52:54:00:00:00:00", "-netdev", "tap,id=net0,fd=7"],
        ),
        (
            ["-netdev", NETDEV, "-device", "e1000,netdev=net1", "-nic", "vmnet-shared", "-netdev", "user,id=net1"],
            [
                "-netdev",
                "tap,id=net0,fd=7",
                "-device",
                "e1000,netdev=net1",
                "-nic",
                "tap,fd=8,mac=52:54:00:00:00:01",
                "-netdev",
                "user,id=net1",
            ],
        ),
        (
            ["-append", "-netdev", "-netdev", NETDEV, "-netdev", '{"type":"user","id":"vmnet-1"}'],
            ["-append", "-netdev", "-netdev", "tap,id=net0,fd=7", "-netdev", '{"type":"user","id":"vmnet-1"}'],
        ),
    ],
)
def test_rewriting(words: list[str], result: list[str]) -> None:
    assert rewritten(*words) == result


WORDS = st.sampled_from(
    [
        "-S",
        "-snapshot",
        "-append",
        "-netdev",
        "-device",
        "-drive",
        "-name",
        "-weird",
        "--nic",
        "-net",
        "user,id=u",
        "e1000,netdev=u",
        '{"type":"user","id":"v"}',
        "disk.img",
        "",
        "{",
        "-",
        "nic",
    ]
) | st.text(alphabet="-{}\"',=abc", max_size=10)


@given(st.lists(WORDS, max_size=12), st.lists(WORDS, max_size=12), st.sampled_from(["", ",isolated=on"]))
def test_every_other_word_stays(before: list[str], after: list[str], more: str) -> None:
    # -nographic parts the random words from ours: a random option cannot take it for its argument and be ours.
    ours = ["-nographic", "-nographic", "-netdev", NETDEV + more, "-device", "virtio-net-pci,netdev=net0"]
    argv = [QEMU, *before, *ours, *after]
    result = command.rewrite(command.plan(argv), [11], [MAC])
    at = 1 + len(before)
    assert result[:at] == argv[:at]
    assert result[at + len(ours) :] == after
    assert result[at : at + len(ours)] == [
        "-nographic",
        "-nographic",
        "-netdev",
        "tap,id=net0,fd=11",
        "-device",
        f"virtio-net-pci,netdev=net0,mac={MAC}",
    ]


@given(st.lists(WORDS, max_size=15))
def test_any_command_is_planned_or_refused(words: list[str]) -> None:
    with pytest.raises(CallerError):
        command.plan(words)


@given(
    st.dictionaries(
        st.from_regex(r"x[a-z]{0,5}", fullmatch=True), st.text(max_size=9) | st.integers() | st.booleans(), max_size=4
    )
)
def test_a_json_device_keeps_its_members(members: dict[str, object]) -> None:
    text = msgspec.json.encode({**members, "netdev": "net0"}).decode()
    result = rewritten("-netdev", NETDEV, "-device", text)[-1]
    assert msgspec.json.decode(result) == {**members, "netdev": "net0", "mac": "52:54:00:00:00:00"}


def test_the_plan() -> None:
    line = [
        "nice",
        QEMU,
        "-name",
        "guest=web",
        "-netdev",
        "vmnet-shared,id=a,isolated=on",
        "-nic",
        "vmnet-shared,mac=52-54-0-AA-BB-CC",
        "-device",
        "e1000,netdev=a",
        "-net",
        "vmnet-shared",
    ]
    plan = command.plan(line)
    assert [(n.index, n.kind, n.position, n.mac_position, n.mac, n.name) for n in plan.netdevs] == [
        (0, "netdev", 5, 9, None, "a"),
        (1, "nic", 7, None, "52:54:00:aa:bb:cc", "nic1"),
        (2, "net", 11, None, None, "net2"),
    ]
    assert plan.netdevs[0].options == Shared("a", isolated=True)
    assert plan.vm_name == "web"


@pytest.mark.parametrize(
    ("words", "name", "identity"),
    [
        (["-hda", "caf\udce9.img"], "caf\\udce9", "/home/me/caf\\udce9.img"),
        (["-name", "\udcff"], "\\udcff", "\\udcff"),
        (["-name", "web", "-hda", "a.img"], "web", "web"),
        (["-hda", "disks/a.img"], "a", "/home/me/disks/a.img"),
        (["-hda", "../a.tar.img"], "a.tar", "/home/a.tar.img"),
        (["-hda", "/d/a.img"], "a", "/d/a.img"),
        (["-drive", "file=nbd://h/a.img"], "a", "nbd://h/a.img"),
        (
            ["-kernel", "k"],
            f"{QEMU}-{os.getpid()}",
            f"/home/me\0{QEMU}\0-kernel\0k\0-nic\0vmnet-shared",
        ),
    ],
)
def test_name_and_identity(words: list[str], name: str, identity: str) -> None:
    plan = command.plan([QEMU, *words, "-nic", "vmnet-shared"])
    assert plan.vm_name == name
    assert plan.identity("/home/me") == identity


def test_long_words_are_no_burden() -> None:
    """A VM may be called anything; what a network is told of it stays short."""
    one, other = (command.plan([QEMU, "-name", "n" * 100_000 + end, "-nic", "vmnet-shared"]) for end in "ab")
    assert one.vm_name == "n" * 255
    assert len(one.identity("/")) == 64
    assert one.identity("/") != other.identity("/")
    assert one.identity("/") == one.identity("/home")


def test_same_vm_same_mac() -> None:
    one = command.plan([QEMU, "-nic", "vmnet-shared", "-hda", "/d/a.img"]).identity("/x")
    two = command.plan([QEMU, "-m", "1G", "-hda", "a.img", "-nic", "vmnet-shared"]).identity("/d")
    assert command.stable_mac(one, 0) == command.stable_mac(two, 0)
    assert command.stable_mac is netdev.stable_mac


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command is given: after -- comes the VM's own, QEMU first"),
        (
            [QEMU, "-nic", "user"],
            (
                "the command has no vmnet netdev: qemu-system-x86_64 gets one by -netdev vmnet-shared,id=net0 "
                "and -device virtio-net-pci,netdev=net0"
            ),
        ),
        (
            [QEMU, "-netdev", "vmnet-nat,id=a"],
            "Parameter 'type' does not accept value 'vmnet-nat', only vmnet-shared, vmnet-host, vmnet-bridged",
        ),
        ([QEMU, "-netdev", "vmnet-shared,id=a,foo=1"], "Invalid parameter 'foo'"),
        ([QEMU, "-nic", "vmnet-shared,netdev=b"], "Invalid parameter 'netdev'"),
        ([QEMU, "-netdev", NETDEV, "-netdev", NETDEV], "Duplicate ID 'net0' for netdev: each needs its own"),
        ([QEMU, "-netdev", "user,id=net0", "-netdev", NETDEV], "Duplicate ID 'net0' for netdev: each needs its own"),
        (
            [QEMU, "-netdev", NETDEV, "-netdev", '{"type":"user","id":"net0"}'],
            "Duplicate ID 'net0' for netdev: each needs its own",
        ),
        (
            [QEMU, "-nic", "vmnet-shared,id=net0", "-netdev", NETDEV],
            "Duplicate ID 'net0' for netdev: each needs its own",
        ),
        (
            [QEMU, "-netdev", NETDEV, "-device", "e1000,netdev=net0,mac=zz"],
            "invalid syntax for ethernet address: 'mac' expects six bytes such as 52:54:00:12:34:56, not 'zz'",
        ),
        (
            [QEMU, "-nic", "vmnet-shared,mac=01:00:00:00:00:01"],
            "NIC cannot have multicast MAC address '01:00:00:00:00:01': 'mac' expects an even first byte, such as 52",
        ),
    ],
)
def test_refusals_word_for_word(argv: list[str], message: str) -> None:
    with pytest.raises(CallerError) as caught:
        command.plan(argv)
    assert caught.value.message == message
    assert caught.value.exit_code == 2


def test_broken_json_is_ours_only_if_it_speaks_of_vmnet() -> None:
    with pytest.raises(OptionError, match=r"^JSON parse error, "):
        command.plan([QEMU, "-netdev", '{"type":"vmnet-shared",'])
    assert rewritten("-netdev", '{"type":"user",', "-nic", "vmnet-shared")[1] == '{"type":"user",'
