from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import subprocess
import sys
import threading
import time
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest

from openvmnet.service.lease_file import Committer, LeaseFile
from openvmnet.service.leases import LeaseBook
from openvmnet.wire.ethernet import parse_mac

if TYPE_CHECKING:
    from pathlib import Path


class Journal:
    """Counts snapshots; the test says when it is dirty."""

    def __init__(self) -> None:
        self.dirty = False
        self.state = 0

    def change(self) -> None:
        self.state += 1
        self.dirty = True

    def snapshot(self) -> bytes:
        self.dirty = False
        return str(self.state).encode()


class SlowFile(LeaseFile):
    """A disk that the test lets go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go = threading.Semaphore(0)
        self.error: OSError | None = None

    def write(self, data: bytes) -> None:
        assert self.go.acquire(timeout=10)
        if self.error is not None:
            raise self.error
        super().write(data)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in a thread and has no event
            await asyncio.sleep(0.001)


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path):
    file = LeaseFile(tmp_path / "leases.json")
    assert file.read() is None
    for content in (b"one", b"a longer second", b""):
        file.write(content)
        assert file.read() == content
        assert os.listdir(tmp_path) == ["leases.json"]


def test_a_write_reaches_the_disk_before_and_after_the_rename(tmp_path: Path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            target = os.fstat(arguments[0]).st_mode if name == "fsync" else None
            calls.append((name, target is not None and bool(target & 0o040000)))
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    LeaseFile(tmp_path / "leases.json").write(b"x")
    assert calls == [("fsync", False), ("replace", False), ("fsync", True)]


def test_the_temporary_file_is_no_way_to_another_file(tmp_path: Path):
    (tmp_path / "other").write_bytes(b"precious")
    (tmp_path / ".leases.json.new").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic"):
        LeaseFile(tmp_path / "leases.json").write(b"x")
    assert (tmp_path / "other").read_bytes() == b"precious"


def test_an_endless_file_is_not_read(tmp_path: Path):
    path = tmp_path / "leases.json"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(OSError, match="octets"):
        LeaseFile(path).read()


async def test_what_is_held_leaves_when_its_write_is_done(tmp_path: Path):
    journal, file, released = Journal(), SlowFile(tmp_path / "f"), []
    committer: Committer[str] = Committer(journal, file, lambda item: released.append((item, file.read())))
    journal.change()
    committer.hold("one")
    committer.kick()
    await asyncio.sleep(0.02)
    assert released == []
    # These come while the first write is under way: one write serves both.
    for item in ("two", "three"):
        journal.change()
        committer.hold(item)
        committer.kick()
    file.go.release()
    await until(lambda: released)
    assert released == [("one", b"1")]
    file.go.release()
    await until(lambda: len(released) == 3)
    assert released[1:] == [("two", b"3"), ("three", b"3")]
    assert committer.writes == 2
    committer.close()


async def test_what_changed_nothing_leaves_at_once(tmp_path: Path):
    journal, released = Journal(), []
    committer: Committer[str] = Committer(journal, LeaseFile(tmp_path / "f"), released.append)
    committer.hold("one")
    committer.kick()
    assert released == ["one"]
    assert not (tmp_path / "f").exists()
    committer.close()


async def test_without_a_file_nothing_waits():
    journal, released = Journal(), []
    committer: Committer[str] = Committer(journal, None, released.append)
    journal.change()
    committer.hold("one")
    committer.kick()
    assert released == ["one"]
    committer.close()


async def test_the_loop_goes_on_while_the_disk_does_not(tmp_path: Path):
    journal, file = Journal(), SlowFile(tmp_path / "f")
    committer: Committer[str] = Committer(journal, file, lambda item: None)
    journal.change()
    committer.kick()
    before = time.monotonic()
    for _ in range(10):
        committer.hold("x")
        committer.kick()
        await asyncio.sleep(0)
    assert time.monotonic() - before < 0.2
    file.go.release(5)
    committer.close()


async def test_a_full_disk_is_logged_once_and_guests_are_served(tmp_path: Path, caplog):
    journal, file, released = Journal(), SlowFile(tmp_path / "f"), []
    file.go.release(10)
    committer: Committer[int] = Committer(journal, file, released.append)
    for number, broken in enumerate([True, True, False]):
        file.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if broken else None
        journal.change()
        committer.hold(number)
        committer.kick()
        await until(lambda number=number: released == list(range(number + 1)))
    committer.close()
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    assert "No space left" in caplog.text


async def test_closing_writes_and_releases_what_is_left(tmp_path: Path):
    journal, file, released = Journal(), SlowFile(tmp_path / "f"), []
    file.go.release(10)
    committer: Committer[str] = Committer(journal, file, released.append)
    for item in ("one", "two"):
        journal.change()
        committer.hold(item)
        committer.kick()
    committer.close()
    committer.close()
    assert released == ["one", "two"]
    assert file.read() == b"2"
    await asyncio.sleep(0.02)
    assert released == ["one", "two"]


async def test_what_is_held_is_bounded_and_said_once(tmp_path: Path, caplog):
    journal, file, released = Journal(), SlowFile(tmp_path / "f"), []
    committer: Committer[int] = Committer(journal, file, released.append)
    journal.change()
    committer.kick()
    for number in range(5000):
        committer.hold(number)
    assert len(caplog.records) == 1
    file.go.release(5)
    committer.close()
    assert released == list(range(4096))


def test_a_process_killed_at_any_instant_has_kept_every_lease_it_promised(tmp_path: Path):
    path = tmp_path / "leases.json"
    rng = random.Random()
    promised: dict[str, str] = {}
    kills = 0
    command = [sys.executable, "-m", "tests.service.lease_loop", str(path)]
    while kills < 50:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(rng.random() * 0.02)
            process.kill()
            lines = (first + process.stdout.read()).decode().splitlines()
        assert process.returncode == -9, "the loop ended by itself"
        kills += 1
        # A line may be torn by nothing: each is one write(2) to a pipe.
        promised |= dict(line.split() for line in lines)
        book = LeaseBook(path)
        for mac, address in promised.items():
            lease = book.by_mac(parse_mac(mac))
            assert lease is not None, f"after kill {kills}: {mac} is forgotten"
            assert lease.ip == IPv4Address(address)
        assert not list(tmp_path.glob("*.damaged"))
        assert len(os.listdir(tmp_path)) <= 2
    assert len(promised) > 100
