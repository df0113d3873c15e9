"""The control socket's server end, in the network process: one request a line, one answer a line."""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING

import msgspec

from openvmnet.errors import CallerError, VmnetError
from openvmnet.messages import Answer, Fault, PlugRequest, Request

if TYPE_CHECKING:
    from pathlib import Path

    from openvmnet.network import Network

log = logging.getLogger(__name__)

_REQUEST = 1 << 16  # octets; the longest is a port's names
_CLIENTS = 64


class ControlServer:
    """Answers for `network` on unix socket `path`, mode 0600."""

    def __init__(self, network: Network, path: Path) -> None:
        self._network = network
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._clients: dict[asyncio.Task[None], socket.socket] = {}

    async def start(self) -> None:
        """Listen."""
        self._path.unlink(missing_ok=True)  # of a process that was killed; who starts a network holds the lock
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(self._path))
        finally:
            os.umask(mask)
        self._listener.listen(_CLIENTS)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def busy(self) -> bool:
        """Whether somebody is connected, who may be about to ask for a port."""
        return bool(self._clients)

    def close(self) -> None:
        """Stop listening, and end what is being answered."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        for client in self._clients:
            client.cancel()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while len(self._clients) < _CLIENTS:
                client, _ = self._listener.accept()
                client.setblocking(False)
                task = asyncio.get_running_loop().create_task(self._serve(client))
                self._clients[task] = client
                task.add_done_callback(self._hung_up)
        if len(self._clients) >= _CLIENTS:  # who waits now would keep the loop turning
            asyncio.get_running_loop().remove_reader(self._listener)

    def _hung_up(self, task: asyncio.Task[None]) -> None:
        self._clients.pop(task).close()  # a task that is cancelled before its first step never closed it
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        line = bytearray()
        with contextlib.suppress(OSError):
            while True:
                data = await loop.sock_recv(client, _REQUEST)
                if not data or len(line) > _REQUEST:
                    return
                line += data
                if not line.endswith(b"\n"):
                    continue
                answer, fds = await self._answer(bytes(line))
                line.clear()
                try:
                    await self._send(client, msgspec.json.encode(answer) + b"\n", fds)
                finally:
                    for fd in fds:
                        os.close(fd)

    async def _answer(self, line: bytes) -> tuple[Answer, list[int]]:
        try:
            request = msgspec.json.decode(line, type=Request)
            if isinstance(request, PlugRequest):
                plugged, fd = await self._network.plug(request)
                return Answer(plugged=plugged), [fd]
            return Answer(network=await self._network.view()), []
        except msgspec.DecodeError as error:
            return Answer(fault=Fault.of(CallerError(f"not a request: {error}"))), []
        except VmnetError as error:
            return Answer(fault=Fault.of(error)), []
        except Exception as error:
            log.exception("a request failed: %s", line[:200])
            return Answer(fault=Fault("HostError", f"the network failed to answer: {error!r}; its log has more")), []

    @staticmethod
    async def _send(client: socket.socket, data: bytes, fds: list[int]) -> None:
        sent = 0
        if fds:
            # The first send on an empty socket buffer takes at least one octet, and the descriptors ride on it.
            sent = client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        await asyncio.get_running_loop().sock_sendall(client, data[sent:])
