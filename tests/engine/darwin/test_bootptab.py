"""Lines of bootptab: ours come and go, everybody else's stay, and two VMs at once both keep theirs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.engine.darwin import bootptab
from openvmnet.engine.darwin.network26 import Reservation
from openvmnet.errors import Conflict, HostError, MissingFeature, OptionError

if TYPE_CHECKING:
    from pathlib import Path

MINE, YOURS, PRINTER = "52:54:00:12:34:56", "52:54:00:12:34:57", "00:11:22:33:44:55"
LEFT = "openvmnet-525400000001 1 52:54:00:00:00:01 192.168.64.9"
OTHERS = f"""# made by hand
%%
# a comment
printer 1 {PRINTER} 192.168.64.200 boot
{LEFT}
"""


def reservation(mac: str = MINE, address: str = "192.168.64.50") -> Reservation:
    return Reservation(mac, IPv4Address(address))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bootptab"


def hold(path: Path, *what: str) -> bootptab.Hold:
    return bootptab.Hold(reservation(*what), path, path.with_name("held"))


def lines(path: Path) -> list[str]:
    return path.read_text().partition("%%\n")[2].splitlines()


def test_a_line_is_there_as_long_as_it_is_held(path: Path) -> None:
    held = hold(path, MINE.upper())
    assert path.read_text() == f"%%\nopenvmnet-525400123456 1 {MINE} 192.168.64.50\n"
    assert path.stat().st_mode & 0o777 == 0o644
    held.release()
    held.release()
    assert path.read_text() == "%%\n"
    assert sorted(each.name for each in path.parent.iterdir()) == ["bootptab", "held"]
    assert list(path.with_name("held").iterdir()) == []


def test_everybody_else_keeps_theirs_and_what_nobody_holds_goes(path: Path) -> None:
    path.write_bytes(OTHERS.encode().replace(b"by hand", b"by h\xe4nd"))
    held = hold(path)
    text = path.read_bytes()
    assert text.startswith(b"# made by h\xe4nd\n%%\n# a comment\nprinter 1 ")
    assert LEFT.encode() not in text
    assert bootptab.parse(text.decode("latin-1")) == [reservation(PRINTER, "192.168.64.200"), reservation()]
    held.release()
    assert bootptab.parse(path.read_bytes().decode("latin-1")) == [reservation(PRINTER, "192.168.64.200")]


def test_two_vms_both_keep_theirs(path: Path) -> None:
    first = hold(path)
    second = hold(path, YOURS, "192.168.64.51")
    assert bootptab.parse(path.read_text()) == [reservation(), reservation(YOURS, "192.168.64.51")]
    first.release()
    assert bootptab.parse(path.read_text()) == [reservation(YOURS, "192.168.64.51")]
    second.release()
    assert lines(path) == []


def test_who_is_next_may_be_at_work_once_the_file_is_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, replace = path.with_name("held") / "525400123457", os.replace

    def replaced(source: str, target: Path) -> None:
        replace(source, target)
        opened.touch()  # the next one has opened the file that holds its MAC, and not locked it yet

    monkeypatch.setattr(os, "replace", replaced)
    hold(path).forked()
    assert opened.exists()


def test_many_at_once_lose_none(path: Path) -> None:
    held: list[bootptab.Hold] = []
    macs = [f"52:54:00:00:01:{number:02x}" for number in range(16)]

    def start(number: int) -> None:
        held.append(hold(path, macs[number], f"192.168.64.{100 + number}"))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(len(macs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.mac for each in bootptab.parse(path.read_text())) == macs
    for each in held[::2]:
        each.release()
    assert len(lines(path)) == len(macs) // 2
    for each in held[1::2]:
        each.release()
    assert lines(path) == []


def test_the_line_of_a_process_that_was_killed_is_taken_out_by_the_next(path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from ipaddress import IPv4Address\n"
        "from openvmnet.engine.darwin import bootptab; from openvmnet.engine.darwin.network26 import Reservation\n"
        f"path = Path({str(path)!r})\n"
        f"held = bootptab.Hold(Reservation({MINE!r}, IPv4Address('192.168.64.50')), path, path.with_name('held'))\n"
        "print('held', flush=True); time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(Conflict, match=r"192\.168\.64\.50 for 52:54:00:12:34:56 already"):
                hold(path, YOURS)
            with pytest.raises(Conflict, match="a VM with 52:54:00:12:34:56 runs already"):
                hold(path, MINE, "192.168.64.51")
        finally:
            process.kill()
    assert len(lines(path)) == 1
    hold(path, YOURS).release()  # the same address, for another
    assert lines(path) == []


def test_a_vm_that_is_started_again_with_another_address_has_one_line(path: Path) -> None:
    path.write_text(f"%%\nopenvmnet-525400123456 1 {MINE} 192.168.64.50\n")
    held = hold(path, MINE, "192.168.64.60")
    assert bootptab.parse(path.read_text()) == [reservation(MINE, "192.168.64.60")]
    held.release()


def test_a_line_made_by_hand_that_says_the_same_is_enough(path: Path) -> None:
    path.write_text(OTHERS)
    held = hold(path, PRINTER, "192.168.64.200")
    assert bootptab.parse(path.read_text()) == [reservation(PRINTER, "192.168.64.200")]
    held.release()
    assert bootptab.parse(path.read_text()) == [reservation(PRINTER, "192.168.64.200")]


def test_a_fork_gives_nothing_back(path: Path) -> None:
    held = hold(path)
    pid = os.fork()
    if pid == 0:
        held.forked()
        held.release()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(lines(path)) == 1
    with pytest.raises(Conflict):
        hold(path)
    held.release()
    assert lines(path) == []


@pytest.mark.parametrize(
    ("mac", "address", "error"),
    [
        ("nonsense", "192.168.64.50", OptionError),
        (MINE, "192.168.64.200", Conflict),  # the printer's
        (PRINTER, "192.168.64.50", Conflict),  # the printer
    ],
)
def test_what_cannot_be_is_refused_and_the_file_stays(path: Path, mac: str, address: str, error: type) -> None:
    path.write_text(OTHERS)
    with pytest.raises(error):
        hold(path, mac, address)
    assert path.read_text() == OTHERS
    hold(path, MINE, "192.168.64.50").release()  # and nothing is held of what failed


def test_what_cannot_be_written_is_an_error_and_not_a_crash(path: Path) -> None:
    with pytest.raises(HostError, match="cannot be written"):
        hold(path / "below")
    if os.geteuid() != 0:
        path.parent.chmod(0o500)
        with pytest.raises(MissingFeature, match="is root's to write"):
            hold(path)


@given(st.text(alphabet="% \nabc0123456789.:#-openvmt"), st.booleans())
def test_whatever_the_file_it_is_merged(text: str, held: bool) -> None:
    merged = bootptab.merge(text, [], lambda _: held)
    assert bootptab.merge(merged, [], lambda _: held) == merged
    with_one = bootptab.merge(merged, [reservation()], lambda _: False)
    assert bootptab.parse(with_one)[-1] == reservation()
    assert bootptab.parse(bootptab.merge(with_one, [], lambda _: True))[-1] == reservation()
