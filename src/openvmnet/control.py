"""How a command talks to a running network, and starts one that does not run.

The network process listens on a unix stream socket, 0600 in a 0700 directory of the user's: who can open it is the
user, or root. One request, one answer, each a line of JSON; the answer to `plug` carries the TAP's descriptor beside
its first byte (SCM_RIGHTS). Everything here blocks and imports no asyncio: `vmnet run` has 0.2 s from its start to
QEMU's, and spends them here.

A network is started under an flock(2), so of two commands at once one starts it and the other joins.
The network process says on a pipe that it is ready, or why not; nothing is guessed from time.
A socket that nobody listens on means that the network process died. Its agent then still holds the namespace while
guests are plugged: the next process takes it over. With the agent gone too, what is left is swept away.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from openvmnet import state
from openvmnet.config import running_config
from openvmnet.errors import Conflict, HostError, NotFound, OptionError, VmnetError
from openvmnet.messages import Answer, NetworkView, PlugReply, PlugRequest, Request, ShowRequest, Spec, Started
from openvmnet.netdev import Host, Subnet, unique_local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openvmnet.config import NetworkConfig, PortKind

_START_TIMEOUT = 15.0  # s; a start takes about 0.3 s, on a machine that swaps some seconds
_CALL_TIMEOUT = 10.0  # s
_CHUNK = 1 << 16


class Client:
    """A connection to one running network."""

    def __init__(self, name: str, sock: socket.socket, note: str | None = None) -> None:
        self.name = name
        self.note = note
        self._sock = sock

    def plug(self, request: PlugRequest) -> tuple[PlugReply, int]:
        """Ask for a port; gives what it is called and the TAP's descriptor, which is the port's life."""
        answer, fds = self._call(request)
        if answer.plugged is None or len(fds) != 1:
            raise HostError(f"network '{self.name}' gave a port without its descriptor")
        return answer.plugged, fds[0]

    def show(self) -> NetworkView:
        """The network as it is now."""
        answer, _ = self._call(ShowRequest())
        if answer.network is None:
            raise HostError(f"network '{self.name}' gave no answer to 'show'")
        return answer.network

    def close(self) -> None:
        """Hang up; ports stay, they live as long as their descriptors."""
        self._sock.close()

    def _call(self, request: Request) -> tuple[Answer, list[int]]:
        fds: list[int] = []
        try:
            self._sock.sendall(msgspec.json.encode(request) + b"\n")
            line = bytearray()
            while not line.endswith(b"\n"):
                data, ancillary, _, _ = self._sock.recvmsg(_CHUNK, socket.CMSG_SPACE(4))
                for _, kind, payload in ancillary:
                    if kind == socket.SCM_RIGHTS:
                        fds.extend(array.array("i", payload))
                if not data:
                    raise HostError(f"network '{self.name}' hung up before it answered; its log has the reason")
                line += data
        except OSError as error:
            raise HostError(f"network '{self.name}' does not answer: {error}") from error
        answer = msgspec.json.decode(bytes(line), type=Answer)
        if answer.fault is not None:
            raise answer.fault.error()
        return answer, fds


def connect(name: str) -> Client:
    """Reach the running network `name`, taking it over first if its process died while guests were plugged.

    A private network has its UUID for a name, too.
    """
    with contextlib.suppress(OptionError):
        name = _private(Host(net_uuid=name).uuid or name)
    return _reach(name)


def _reach(name: str) -> Client:
    if not (state.runtime_root() / state.check_name(name)).is_dir():
        raise NotFound(f"no network '{name}' is running", hint="vmnet ls")
    with _locked():
        client = _dial(name)
        if client is not None:
            return client
        if not _agent_lives(name):
            note = _sweep(name)
            raise NotFound(f"no network '{name}' is running" + (f" ({note})" if note else ""), hint="vmnet ls")
        return _start(name, Spec(name=name), _silent)


def open_network(spec: Spec, *, first: PortKind | None = None, progress: Callable[[str], None]) -> Client:
    """Join the network that `spec` means, or start it; `progress` hears what takes time.

    `first` is what will be asked for next: a network that is started makes this port with all the rest.
    """
    name = state.check_name(spec.name) if spec.name is not None else _default_name(spec)
    spec = msgspec.structs.replace(spec, name=name)
    with _locked():
        client = _dial(name)
        if client is None:
            note = None if _agent_lives(name) else _sweep(name)
            if note:
                progress(note)
            client = _start(name, spec, progress, first)
            if client.note:
                progress(client.note)
            return client
    try:
        config = running_config(name)
        if config is not None:
            _refuse_other(spec, config)
    except BaseException:
        client.close()
        raise
    return client


def list_networks() -> tuple[list[NetworkView], list[VmnetError]]:
    """Every running network of this user, and why others that run could not be asked.

    What a dead one left behind is taken over or swept away.
    """
    views: list[NetworkView] = []
    silent: list[VmnetError] = []
    for name in state.names():
        try:
            client = _reach(name)
            try:
                views.append(client.show())
            finally:
                client.close()
        except NotFound:
            continue
        except VmnetError as error:
            silent.append(error)
    return views, silent


def _refuse_other(spec: Spec, config: NetworkConfig) -> None:
    """Raise Conflict where the running network is not what `spec` asks for."""
    if config.mode != spec.mode:
        raise Conflict(
            f"network '{config.name}' is vmnet-{config.mode}, not vmnet-{spec.mode}",
            hint="give another --name, or leave it out",
        )
    differ: list[tuple[str, object, object]] = []
    wanted = Subnet.from_options(spec.start_address, spec.end_address, spec.subnet_mask)
    if wanted is not None:
        subnet = config.subnet
        differ += [
            ("start-address", subnet and subnet.gateway, wanted.gateway),
            ("end-address", subnet and subnet.last, wanted.last),
            ("subnet-mask", subnet and subnet.mask, wanted.mask),
        ]
    if spec.net_uuid is not None or config.net_uuid is not None:
        differ.append(("net-uuid", config.net_uuid, spec.net_uuid))
    if spec.mtu is not None:
        differ.append(("mtu", config.mtu, spec.mtu))
    if spec.nat66_prefix is not None:
        differ.append(("nat66-prefix", config.prefix, unique_local(spec.nat66_prefix)))
    if spec.host_loopback and not config.host_loopback:
        differ.append(("--host-loopback", "off", "on"))
    other = "--name" if config.net_uuid is None else "net-uuid"  # its UUID is what such a network is known by
    for option, has, wants in differ:
        if has != wants:
            raise Conflict(
                f"network '{config.name}' runs with {option}={has or 'none'}, not with {wants or 'none'}",
                hint=f"give another {other}, or the same value, or leave the option out",
            )


def _default_name(spec: Spec) -> str:
    """Two commands with the same addresses or UUID, or none, mean one network: the name follows from them."""
    if spec.net_uuid is not None:
        return _private(spec.net_uuid)
    wanted = Subnet.from_options(spec.start_address, spec.end_address, spec.subnet_mask)
    if wanted is None:
        return spec.mode
    for name in state.names():
        config = running_config(name)
        same = config is not None and (config.mode, config.subnet, config.net_uuid) == (spec.mode, wanted, None)
        if same and lives(name):
            return name
    return f"{spec.mode}-{spec.start_address}"


def _private(uuid: str) -> str:
    """The name of the network with this UUID: the one that it runs by, else the one that follows from the UUID."""
    for name in state.names():
        config = running_config(name)
        if config is not None and config.net_uuid == uuid and lives(name):
            return name
    return uuid.replace("-", "")  # 32 characters, as many as a name may have


def _dial(name: str) -> Client | None:
    path = state.control_socket(name)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(_CALL_TIMEOUT)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise HostError(f"network '{name}' cannot be reached: {error}") from error
    return Client(name, sock)


def lives(name: str) -> bool:
    """Whether network `name` is there, and not just what a dead one left: its process, or its agent with guests."""
    client = _dial(name)
    if client is not None:
        client.close()
    return client is not None or _agent_lives(name)


def _agent_lives(name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        return sock.connect_ex(str(state.runtime_root() / name / "agent.sock")) == 0


def _sweep(name: str) -> str | None:
    """Remove what a network without process and agent left behind; the sentence that says so, or None."""
    directory = state.runtime_root() / name
    found = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    for entry in found:
        (directory / entry).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()
    return f"an earlier network '{name}' ended without cleaning up; its {', '.join(found)} removed" if found else None


def _start(name: str, spec: Spec, progress: Callable[[str], None], first: PortKind | None = None) -> Client:
    """Start the network process and wait for its word. The caller holds the lock."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    log = str(state.remembered(name) / "log")
    # -P: else a file in the user's directory that is called like a module would be taken for it.
    words = [msgspec.json.encode(value).decode() for value in (spec, first)]
    argv = [sys.executable, "-P", "-m", "openvmnet.daemon", name, str(write), *words]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        sys.executable,
        argv,
        os.environ,
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    os.close(write)
    try:
        line = _read_word(read, progress, name)
    finally:
        os.close(read)
        with contextlib.suppress(ChildProcessError):  # a program that ignores SIGCHLD has no children to wait for
            os.waitpid(pid, 0)  # it forks at once and leaves, so that no VM becomes the parent of a network process
    if not line:
        raise HostError(f"the process of network '{name}' ended before it was ready: {_last_line(Path(log))}")
    word = msgspec.json.decode(line, type=Started)
    if word.fault is not None:
        raise word.fault.error()
    client = _dial(name)
    if client is None:
        raise HostError(f"network '{name}' started and is gone again: {_last_line(Path(log))}")
    client.note = word.note
    return client


def _read_word(fd: int, progress: Callable[[str], None], name: str) -> bytes:
    import select

    line = bytearray()
    begin = time.monotonic()
    told = False
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], 1.0)
        if ready:
            data = os.read(fd, _CHUNK)
            if not data:
                break
            line += data
        elif time.monotonic() - begin > _START_TIMEOUT:
            raise HostError(f"network '{name}' was not ready after {_START_TIMEOUT:.0f} s")
        elif not told:
            progress(f"starting network '{name}' takes longer than a second ...")
            told = True
    return bytes(line)


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        if said:
            return said[-1]
    return "it left no word"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    fd = state.try_lock(wait=True)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _silent(_: str) -> None:
    return
