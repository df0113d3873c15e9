"""A macvtap that lives exactly as long as its descriptor: a second MAC on a wired NIC, for a VM.

How it works. A macvtap is a link on top of a NIC, and a character device whose frames are the link's. Unlike a TAP it
stays when the device is closed, and somebody has to delete it. Here nobody has to: the link is made in a network
namespace of its own, which nothing holds but the socket inside the open device. A VM that ends, by whatever signal,
closes the descriptor; the namespace goes with it, the kernel removes every virtual link in it, and so the macvtap, some
hundredths of a second later. A start that fails at any step ends the same way.

    vmnet run                                          child, in a new network and mount namespace
      fork  ─────────────────────────────────────────►   IPv6 off, listen for the kernel's device events
      ip link add link eth0 ... netns CHILD   ◄── ready
                                                         event: SUBSYSTEM=macvtap MAJOR=246 MINOR=3
                                                         link up; mknod on a tmpfs only it sees; open; TUNSETIFF
      QEMU's descriptor  ◄────────────────── SCM_RIGHTS  ends

IPv6 is off there because the namespace's own stack has the guest's MAC: it would announce itself on the LAN under the
guest's link-local address. The node is made anew, since /dev/tapN is named by an ifindex that is not unique between
namespaces. All multicast is let in: the guest's own list of groups is not known to the host, and without it a guest
hears no neighbour solicitation.

It takes root: CAP_NET_ADMIN for the NIC, CAP_SYS_ADMIN for the namespaces, CAP_MKNOD for the node.
Sources: network_namespaces(7), netlink(7), linux/if_tun.h, linux/if_link.h (Linux 6.1); the device's socket counts as a
user of the namespace of whoever opens it since Linux 2.6.34.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING

from openvmnet.engine.linux.agent import drop_descriptors
from openvmnet.errors import Conflict, HostError, MissingFeature

if TYPE_CHECKING:
    from openvmnet.engine.linux.interfaces import Interface

LINK = "vmtap0"  # in its own namespace there is no other

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_NETLINK_KOBJECT_UEVENT, _KERNEL_EVENTS = 15, 1
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_TIMEOUT = 10.0  # s, for what takes milliseconds
_BUSY = 2.0  # s that the MAC of a VM that has just ended may still be taken
_MESSAGE = 4096
_EVENT = 8192  # octets, more than the kernel's 2,048


def open_macvtap(interface: Interface, mac: str, *, isolated: bool, offloads: bool = True) -> int:
    """A macvtap with address `mac` on `interface`: the descriptor, with virtio headers for `offloads`.

    `isolated` keeps it from every other macvtap on the NIC. Raises MissingFeature without the rights or the kernel's
    option, Conflict where the MAC is taken, HostError for what else the kernel refuses.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(_TIMEOUT)
        pid = os.fork()
        if pid == 0:
            _child(theirs, _IFF_VNET_HDR if offloads else 0)
        theirs.close()
        try:
            _receive(ours, interface)
            _add(interface, mac, pid, isolated=isolated)
            return _receive(ours, interface)
        finally:
            ours.close()
            os.waitpid(pid, 0)


def _add(interface: Interface, mac: str, pid: int, *, isolated: bool) -> None:
    argv = ["ip", "link", "add", "link", interface.name, "name", LINK, "address", mac, "mtu", str(interface.mtu)]
    argv += ["netns", str(pid), "type", "macvtap", "mode", "private" if isolated else "bridge"]
    said = _ip(argv)
    if said is None:
        return
    if "Unknown device type" in said or "not supported" in said:
        raise MissingFeature(
            f"this kernel has no macvtap (CONFIG_MACVTAP), so nothing can be bridged to {interface.name}: {said}",
            hint="sudo modprobe macvtap",
        )
    if "not permitted" in said and os.geteuid() != 0:
        raise lacks_rights(interface.name)
    raise HostError(f"no macvtap can be made on {interface.name}: {said}")


def lacks_rights(name: str) -> MissingFeature:
    """The error for a caller who is not root."""
    return MissingFeature(
        f"uid {os.getuid()} may not bridge a VM to {name}: a macvtap on a NIC takes root",
        hint="run it as root, and let QEMU leave root's rights: sudo vmnet run -- qemu-system-... -runas $USER ...; "
        f"or put {name} into a Linux bridge and name that, for which QEMU's setuid bridge helper will do; "
        "or do without the NIC: -netdev vmnet-shared,id=net0",
    )


def _receive(sock: socket.socket, interface: Interface) -> int:
    """The child's next word: the descriptor that came with it, or -1. Raises what the child met."""
    try:
        data, fds, _, _ = socket.recv_fds(sock, _MESSAGE, 1)
    except TimeoutError as error:
        raise HostError(f"the macvtap on {interface.name} was not ready within {_TIMEOUT:.0f} s") from error
    except OSError as error:
        raise HostError(f"the macvtap on {interface.name} was not handed over: {error.strerror}") from error
    if not data:
        raise HostError(f"the process that makes the macvtap on {interface.name} ended early")
    told = json.loads(data)
    if "error" not in told:
        if fds:
            os.set_inheritable(fds[0], False)
        return fds[0] if fds else -1
    if told["errno"] == errno.EADDRINUSE:
        raise Conflict(f"another macvtap on {interface.name} has the MAC already: two VMs need two", hint=None)
    if told["errno"] in (errno.EPERM, errno.EACCES) and os.geteuid() != 0:
        raise lacks_rights(interface.name)
    raise HostError(f"no macvtap on {interface.name}: {told['error']}")


def _child(sock: socket.socket, header: int) -> None:
    """Never returns."""
    code = 1
    try:
        try:
            drop_descriptors({sock.fileno()})
            fd = _make(sock, header)
            sock.sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
            code = 0
        except OSError as error:
            told = {"error": error.strerror or str(error), "errno": error.errno or errno.EIO}
            sock.send(json.dumps(told).encode())
    finally:
        os._exit(code)


def _make(sock: socket.socket, header: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)  # os.unshare() is new in Python 3.12
    _check(libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS), "unshare")
    _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount")
    _check(libc.mount(b"vmnet", b"/tmp", b"tmpfs", 0, None), "mount")
    for each in ("all", "default"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/net/ipv6/conf/{each}/disable_ipv6", "w") as file:
            file.write("1")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_KOBJECT_UEVENT) as events:
        events.bind((0, _KERNEL_EVENTS))
        sock.send(b"{}")
        device = _device(events, sock)
    _up()
    node = "/tmp/device"  # noqa: S108 - on the tmpfs of above
    try:
        os.mknod(node, 0o20600, device)
        fd = os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        why = "the device's node may not be made or opened, as in a user namespace or under a container's device rules"
        raise PermissionError(error.errno, why) from error
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"", _IFF_TAP | _IFF_NO_PI | header))
    return fd


def _device(events: socket.socket, parent: socket.socket) -> int:
    """The device number of the macvtap that appears. Raises OSError when the parent makes none."""
    deadline = time.monotonic() + _TIMEOUT
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([events, parent], [], [], left)
        if events in ready:
            found = device_number(events.recv(_EVENT))
            if found is not None:
                return found
        elif parent in ready:  # it says nothing: it has hung up
            raise OSError(errno.ECANCELED, "the link was not made")
    raise OSError(errno.ETIMEDOUT, "the kernel did not tell of the device")


def device_number(event: bytes) -> int | None:
    """The device number in a kernel event (kobject uevent) if it tells of a new macvtap, else None."""
    pairs = (field.partition(b"=") for field in event.split(b"\0"))
    told = {name: value for name, sign, value in pairs if sign}
    if told.get(b"SUBSYSTEM") != b"macvtap" or told.get(b"ACTION") != b"add":
        return None
    major, minor = told.get(b"MAJOR", b""), told.get(b"MINOR", b"")
    return os.makedev(int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _up() -> None:
    """Bring the link up; the kernel looks at the MAC only now. A VM that has just ended may still have it."""
    deadline = time.monotonic() + _BUSY
    while (said := _ip(["ip", "link", "set", "dev", LINK, "allmulticast", "on", "up"])) is not None:
        busy = "in use" in said
        if not busy or time.monotonic() > deadline:
            raise OSError(errno.EADDRINUSE if busy else errno.EIO, said)
        time.sleep(0.02)


def _ip(argv: list[str]) -> str | None:
    """What ip(8) says when it fails, else None."""
    env = {"PATH": _PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_TIMEOUT, env=env)
    except FileNotFoundError as error:
        raise MissingFeature("no program 'ip' is there", hint="sudo apt install iproute2") from error
    except subprocess.TimeoutExpired:
        return "ip(8) did not end"
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"exit status {done.returncode}"


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
