"""The agent: root inside a user and network namespace of its own, with no way out; it makes things there on request.

It is forked from the network process before that imports anything large, unshares a user and a network namespace,
maps its caller to root inside, and then answers on a SOCK_SEQPACKET unix socket, one JSON request a datagram:

    {"op": "socket", "family": 2, "type": 2, "protocol": 0, "count": 16,
     "options": [[level, name, value], ...], "bind": [address, port]}    sockets; a value is an int, or text for a name
    {"op": "tap", "name": "vm1"}, {"op": "tun", "name": "up0"}            the device's descriptor
    {"op": "bare-tap", "name": "vm2"}                                     a TAP without a virtio_net_hdr on frames
    {"op": "run", "argv": ["ip", "-batch", "-"], "input": "..."}          `ip` or `nft` on a text, nothing else
    {"op": "sysctl", "values": {"net.ipv4.ip_forward": "1"}}              files below /proc/sys/net
    {"op": "links"}                                                       names of the links that are there
    {"op": "all", "steps": [{"op": "sysctl", ...}, {"op": "run", ...}]}   one after the other, up to one that fails
    {"op": "quit"}                                                        the network is over

An answer is {"ok": true, ...} with descriptors beside it (SCM_RIGHTS), or {"error": "...", "errno": N}. It bears the
"id" of its request, so that one that comes after its asker has given up is not taken for the answer to the next.
A socket or TAP keeps the namespace it was made in, whoever holds it: so the network process, which has the outside,
uses the sockets, and the agent, which has the privileges, touches no packet.

The agent outlives a network process that was killed, for as long as a guest's TAP exists: the next network process
connects to the same path and goes on with the same bridge. When the last TAP is gone and nobody has been connected
for some seconds, it ends, and the namespace with it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Any

from openvmnet.engine.linux.names import PORT_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x0002, 0x1000, 0x4000
_MESSAGE = 1 << 18  # octets; the longest request is a ruleset of some kilobytes
_ORPHAN_POLL = 500  # ms between looks for guests while no network process is connected
_ORPHAN_GRACE = 6  # looks without a guest and without a network process before the agent ends
_SOCKETS = 64  # of one request; SCM_RIGHTS carries up to 253
_PROGRAMS = ("ip", "nft")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def fork(path: str) -> int:
    """Fork the agent, listening on unix socket `path`; gives its pid once it is inside its namespaces.

    Raises OSError with the errno of what the kernel refused (unshare(2), the id maps, the socket).
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            _main(path, write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        word = pipe.read()
    if word != b"ok":
        os.waitpid(pid, 0)
        number, _, what = word.decode(errors="replace").partition(" ")
        raise OSError(int(number) if number.isdigit() else errno.EIO, what or "the agent ended before it was ready")
    return pid


def _main(path: str, ready: int) -> None:
    listener = None
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _enter_namespaces()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.umask(0o077)
        listener.bind(path)
        listener.listen(4)
        own = os.stat(path)
        drop_descriptors({ready, listener.fileno()})
        gc.enable()  # its parent may do without while it loads
    except OSError as error:
        os.write(ready, f"{error.errno} {error.strerror or error}".encode())
        return
    os.write(ready, b"ok")
    os.close(ready)
    try:
        _serve(listener)
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), own):  # the next network of the name may have an agent there by now
                os.unlink(path)


def _enter_namespaces() -> None:
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)  # os.unshare() is new in Python 3.12
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare(CLONE_NEWUSER | CLONE_NEWNET): {os.strerror(number)}")
    # Without CAP_SETGID in the parent namespace the kernel wants setgroups(2) denied first: user_namespaces(7).
    for name, value in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(value)
        except OSError as error:
            raise OSError(error.errno, f"/proc/self/{name}: {error.strerror}") from error


def drop_descriptors(keep: set[int]) -> None:
    """Close all but `keep` and the standard three: what a user's shell left open is not ours.

    The other end of such a pipe may wait for it to close. Objects of before that are not yet collected stay so: they
    would close the numbers, which by then are somebody else's.
    """
    gc.freeze()
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)


def _serve(listener: socket.socket) -> None:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    clients: dict[int, socket.socket] = {}
    lonely = 0
    while lonely < _ORPHAN_GRACE:
        events = poll.poll(-1 if clients else _ORPHAN_POLL)
        lonely = 0 if clients or events or _guests() else lonely + 1
        for fd, _ in events:
            if fd == listener.fileno():
                try:
                    client, _ = listener.accept()
                except OSError:  # it has gone again, or there are no more descriptors
                    continue
                # A mapped uid other than 0 is another user's; the directory's mode keeps those out already.
                if struct.unpack("=iii", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] != 0:
                    client.close()
                    continue
                clients[client.fileno()] = client
                poll.register(client, select.POLLIN)
            elif not _answer(clients[fd]):
                poll.unregister(fd)
                clients.pop(fd).close()


def _guests() -> bool:
    return any(name.startswith(PORT_PREFIX) and name[2:].isdigit() for _, name in socket.if_nameindex())


def _answer(client: socket.socket) -> bool:
    """Serve one request; False when the client is gone."""
    try:
        data = client.recv(_MESSAGE)
    except OSError:
        return False
    if not data:
        return False
    fds: list[int] = []
    request: Any = None
    try:
        request = json.loads(data)
        if request["op"] == "quit":
            client.close()
            raise SystemExit
        reply, fds = _OPERATIONS[request["op"]](request)
        reply["ok"] = True
    except OSError as error:
        reply = {"error": error.strerror or str(error), "errno": error.errno or errno.EIO}
    except Exception as error:  # noqa: BLE001 - the guests' way out hangs on this process: a bad request must not end it
        reply = {"error": f"not a request: {error!r}", "errno": errno.EINVAL}
    reply["id"] = request.get("id") if isinstance(request, dict) else None
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        client.sendmsg([json.dumps(reply).encode()], rights)
    except OSError:
        return False
    finally:
        for fd in fds:
            os.close(fd)
    return True


_Reply = tuple[dict[str, Any], list[int]]


def _socket(request: dict[str, Any]) -> _Reply:
    fds: list[int] = []
    count = request.get("count", 1)
    if not 1 <= count <= _SOCKETS:
        raise ValueError(f"{count} sockets at once; 1 to {_SOCKETS} would be right")
    try:
        for _ in range(count):
            with socket.socket(request["family"], request["type"], request.get("protocol", 0)) as sock:
                for level, name, value in request.get("options", []):
                    sock.setsockopt(level, name, value.encode() if isinstance(value, str) else value)
                if "bind" in request:
                    where = request["bind"]
                    sock.bind(tuple(where) if isinstance(where, list) else where)
                if "listen" in request:
                    sock.listen(request["listen"])
                fds.append(sock.detach())
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return {}, fds


def _device(flags: int) -> Callable[[dict[str, Any]], _Reply]:
    def make(request: dict[str, Any]) -> _Reply:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", request["name"].encode(), flags | _IFF_NO_PI))
        except OSError:
            os.close(fd)
            raise
        return {}, [fd]

    return make


def _run(request: dict[str, Any]) -> _Reply:
    argv = request["argv"]
    if argv[0] not in _PROGRAMS:
        raise ValueError(f"{argv[0]} is none of {', '.join(_PROGRAMS)}")
    try:
        done = subprocess.run(
            argv, input=request.get("input", ""), capture_output=True, text=True, check=False, env={"PATH": _PATH}
        )
    except OSError as error:
        raise OSError(error.errno, f"{argv[0]}: {error.strerror}") from error
    return {"status": done.returncode, "stdout": done.stdout, "stderr": done.stderr}, []


def _sysctl(request: dict[str, Any]) -> _Reply:
    missing = []
    for name, value in request["values"].items():
        path = "/proc/sys/" + name.replace(".", "/")
        if not path.startswith("/proc/sys/net/") or ".." in name:
            raise ValueError(f"{name} is not below net")
        try:
            with open(path, "w") as file:
                file.write(value)
        except FileNotFoundError:  # a kernel without that part (br_netfilter, IPv6) has nothing to set
            missing.append(name)
    return {"missing": missing}, []


def _links(_: dict[str, Any]) -> _Reply:
    return {"links": [name for _, name in socket.if_nameindex()]}, []


def _all(request: dict[str, Any]) -> _Reply:
    """Each step's answer, with the number of descriptors that are its own; the last is that of a program that failed,
    if one has. An OSError of a step is the whole request's, with the step's name."""
    replies: list[dict[str, Any]] = []
    fds: list[int] = []
    try:
        for step in request["steps"]:
            try:
                reply, made = _OPERATIONS[step["op"]](step)
            except OSError as error:
                raise OSError(error.errno, f"{step['op']}: {error.strerror or error}") from error
            replies.append({**reply, "fds": len(made)})
            fds += made
            if reply.get("status"):
                break
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return {"replies": replies}, fds


_OPERATIONS: dict[str, Callable[[dict[str, Any]], _Reply]] = {
    "socket": _socket,
    "tap": _device(_IFF_TAP | _IFF_VNET_HDR),
    "bare-tap": _device(_IFF_TAP),
    "tun": _device(_IFF_TUN),
    "run": _run,
    "sysctl": _sysctl,
    "links": _links,
    "all": _all,
}
