"""The network process's end of the agent: namespaces, and the things that are made inside them.

`request()` blocks for one round trip: 0.1 ms for sockets, which a flow's first packet waits for. `ask()` is the same as
a coroutine, for `ip` and `nft`, which take milliseconds that guests' traffic should not wait for. They use a connection
each, so that an answer always belongs to the request before it; the agent serves them one at a time. `begin()` hands
over work before there is an event loop, and `finish()` takes the answers.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from openvmnet.engine.linux import agent, remedy
from openvmnet.errors import HostError, MissingFeature

if TYPE_CHECKING:
    import asyncio  # and only when it is needed: who calls begin() has not loaded it yet
    from collections.abc import Sequence
    from pathlib import Path

    from openvmnet.engine.linux.steps import Step

_MESSAGE = 1 << 18
_FDS = 64  # descriptors in one answer; SCM_RIGHTS carries up to 253
_TIMEOUT = 10.0  # s; the longest request, a whole namespace, takes a tenth of a second

# No right to it, no such file, or something else under its name (a container's /dev/null).
_NO_TUN = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTTY, errno.ENODEV, errno.ENXIO)


class Reply(NamedTuple):
    """An agent's answer and the descriptors that came with it."""

    values: dict[str, Any]
    fds: list[int]


def fork_agent(path: Path) -> int:
    """Fork an agent listening on `path`; its pid. `MissingFeature` with the cure where the host forbids it."""
    try:
        return agent.fork(str(path))
    except OSError as error:
        raise _explain(error) from error


class Namespace:
    """A connection pair to the agent at `path`."""

    def __init__(self, path: Path) -> None:
        self._quick = _connect(path)
        self._slow = _connect(path)
        self._slow.setblocking(False)
        self._lock: asyncio.Lock | None = None
        self._serial = 0
        self._begun: tuple[int, Sequence[Step]] | None = None  # the serial number of what begin() asked for, and what

    def watch_fd(self) -> int:
        """A descriptor that becomes readable when the agent dies, and at no other time outside a request."""
        return self._quick.fileno()

    def request(self, op: str, **values: object) -> Reply:
        """One round trip, blocking."""
        serial, request = self._request(op, values)
        try:
            self._quick.send(request)
            while True:
                data, fds = _receive(self._quick)
                reply = _reply(op, serial, data, fds)
                if reply is not None:
                    return reply
        except TimeoutError as error:
            raise HostError(f"the agent did not answer '{op}' within {_TIMEOUT:.0f} s") from error
        except OSError as error:
            raise HostError(f"the agent is gone; it was asked for '{op}'") from error

    async def ask(self, op: str, **values: object) -> Reply:
        """One round trip, while the loop goes on."""
        async with self._turn():
            serial, request = self._request(op, values)
            await _loop().sock_sendall(self._slow, request)
            return await self._answer(op, serial)

    def begin(self, steps: Sequence[Step]) -> None:
        """Have the agent do `steps`, and come back at once; `finish()` has to be the next that is asked."""
        serial, request = self._request("all", {"steps": steps})
        self._begun = serial, steps
        try:
            self._slow.send(request)
        except OSError as error:
            raise HostError("the agent is gone; it was asked for 'all'") from error

    @property
    def begun(self) -> bool:
        """Whether `begin()` was called, and `finish()` not yet."""
        return self._begun is not None

    async def finish(self) -> list[Reply]:
        """What `all()` would give for the steps of `begin()`."""
        if self._begun is None:
            raise RuntimeError("nothing was begun")
        (serial, steps), self._begun = self._begun, None
        async with self._turn():
            return _each(steps, await self._answer("all", serial))

    async def all(self, steps: Sequence[Step]) -> list[Reply]:
        """The answer to each step, in order; they are done one after the other, in one round trip.

        On an error no descriptor of any step stays, and the steps after the one that failed are not done.
        """
        return _each(steps, await self.ask("all", steps=steps))

    def _turn(self) -> asyncio.Lock:
        """One at a time asks on the connection that may take long."""
        if self._lock is None:
            import asyncio

            self._lock = asyncio.Lock()
        return self._lock

    async def _answer(self, op: str, serial: int) -> Reply:
        loop = _loop()
        while True:
            readable: asyncio.Future[bool] = loop.create_future()
            loop.add_reader(self._slow, _resolve, readable, True)
            late = loop.call_later(_TIMEOUT, _resolve, readable, False)
            try:
                if not await readable:
                    raise HostError(f"the agent did not answer '{op}' within {_TIMEOUT:.0f} s")
            finally:
                late.cancel()
                loop.remove_reader(self._slow)
            data, fds = _receive(self._slow)
            reply = _reply(op, serial, data, fds)
            if reply is not None:
                return reply

    def _request(self, op: str, values: dict[str, object]) -> tuple[int, bytes]:
        self._serial += 1
        return self._serial, json.dumps({"op": op, "id": self._serial, **values}).encode()

    def sockets(
        self,
        family: int,
        kind: int,
        protocol: int = 0,
        *,
        count: int = 1,
        options: list[tuple[int, int, int | str]] | None = None,
        bind: tuple[str | int, ...] | None = None,
        listen: int | None = None,
    ) -> list[socket.socket]:
        """Non-blocking sockets of the namespace, with `options` set; bound and listening where asked."""
        request: dict[str, object] = {}
        if bind is not None:
            request["bind"] = list(bind)
        if listen is not None:
            request["listen"] = listen
        fds = self.descriptors(family, kind, protocol, count=count, options=options or [], **request)
        made = [socket.socket(fileno=fd) for fd in fds]
        for sock in made:
            sock.setblocking(False)
        return made

    def descriptors(
        self,
        family: int,
        kind: int,
        protocol: int = 0,
        *,
        count: int,
        options: list[tuple[int, int, int | str]],
        **request: object,
    ) -> list[int]:
        """The same as bare descriptors; `request` has the rest as the agent takes it."""
        kind |= socket.SOCK_NONBLOCK
        return self.request(
            "socket", family=family, type=kind, protocol=protocol, count=count, options=options, **request
        ).fds

    async def run(self, argv: list[str], text: str) -> str:
        """Run `ip` or `nft` inside on `text`; its output. `HostError` with the program's own words when it fails."""
        done = (await self.ask("run", argv=argv, input=text)).values
        _check(argv, done)
        return str(done["stdout"])

    def quit(self) -> None:
        """End the agent, and hang up."""
        with contextlib.suppress(OSError):  # it may be gone already
            self._quick.send(b'{"op": "quit"}')
        self.close()

    def close(self) -> None:
        """Hang up; the agent stays for a while, for a process that takes over."""
        self._quick.close()
        self._slow.close()


def _each(steps: Sequence[Step], answer: Reply) -> list[Reply]:
    """The answer to "all" as one to each step."""
    fds = answer.fds
    replies: list[Reply] = []
    try:
        for step, reply in zip(steps, answer.values["replies"], strict=False):
            if step["op"] == "run":
                _check(step["argv"], reply)
            replies.append(Reply(reply, fds[: reply["fds"]]))
            fds = fds[reply["fds"] :]
    except HostError:
        for fd in [*fds, *(fd for reply in replies for fd in reply.fds)]:
            os.close(fd)
        raise
    return replies


def _check(argv: list[str], done: dict[str, Any]) -> None:
    if done["status"] != 0:
        raise HostError(f"`{' '.join(argv)}` failed in the namespace: {done['stderr'].strip() or done['status']}")


def _loop() -> asyncio.AbstractEventLoop:
    import asyncio

    return asyncio.get_running_loop()


def _resolve(readable: asyncio.Future[bool], value: bool) -> None:
    if not readable.done():
        readable.set_result(value)


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(_TIMEOUT)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise HostError(f"the agent at {path} cannot be reached: {error.strerror}") from error
    return sock


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, ancillary, _, _ = sock.recvmsg(_MESSAGE, socket.CMSG_SPACE(4 * _FDS))
    fds = array.array("i")
    for _, kind, payload in ancillary:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    return data, list(fds)


def _reply(op: str, serial: int, data: bytes, fds: list[int]) -> Reply | None:
    """The answer to request `serial`; None for a late one to a request that was given up."""
    if not data:
        raise HostError(f"the agent is gone; it was asked for '{op}'")
    values = json.loads(data)
    if values.get("id") != serial:
        for fd in fds:
            os.close(fd)
        return None
    if "error" in values:
        step = "" if op == "all" else f"{op}: "
        raise _explain(OSError(values["errno"], step + values["error"]))
    return Reply(values, fds)


def _explain(error: OSError) -> HostError:
    """The sentence and the cure for what a host most often forbids."""
    what = error.strerror or str(error)
    if "unshare" in what or "_map" in what or "setgroups" in what:
        message = f"this host lets {_who()} make no user and network namespace: {what}"
        return MissingFeature(message, hint=remedy.namespaces(error))
    if what.startswith(("tap", "bare-tap", "tun")) and error.errno in _NO_TUN:
        return MissingFeature(
            f"/dev/net/tun cannot be opened by {_who()}: {what}", hint="sudo modprobe tun; sudo chmod 0666 /dev/net/tun"
        )
    if what.startswith("run") and error.errno in (errno.EACCES, errno.ENOENT):
        program = what.removeprefix("run: ")
        return MissingFeature(
            f"a program that every network needs cannot be run: {program}",
            hint="sudo apt-get install iproute2 nftables",
        )
    return HostError(f"the agent could not do '{what}'")


def _who() -> str:
    return f"uid {os.getuid()}"
