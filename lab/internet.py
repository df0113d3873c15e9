"""What answers in the lab's internet: small TCP and UDP services, and a web server. `python -m lab.internet ADDRESS...`

    7   echo, TCP and UDP
    9   discard, TCP: reads and drops
    11  reset, TCP: accepts and answers with a RST
    12  stuck, TCP: accepts and never reads
    13  whoami, TCP and UDP: says the caller's address and port
    14  count, TCP: reads to the end of the caller's half, then says how many octets came, and closes
    80  HTTP: /bytes/N gives N octets, /whoami the caller's address, any other path a page

Sockets are bound to each address, not to the wildcard, so that a UDP answer comes from the address that was asked.
Prints "ready" when all of them listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from typing import TYPE_CHECKING, TypeAlias, cast

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PAGE = b"<!doctype html><title>www.example.test</title><h1>The page arrived.</h1>\n"
_CHUNK = 1 << 18

_Reader: TypeAlias = asyncio.StreamReader
_Writer: TypeAlias = asyncio.StreamWriter


async def _echo(reader: _Reader, writer: _Writer) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()


async def _discard(reader: _Reader, _: _Writer) -> None:
    while await reader.read(_CHUNK):
        pass


async def _reset(_: _Reader, writer: _Writer) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _stuck(_: _Reader, writer: _Writer) -> None:
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a WriteTransport by its type, a socket's in truth
    await asyncio.sleep(3600)


async def _whoami(_: _Reader, writer: _Writer) -> None:
    host, port, *_ = writer.get_extra_info("peername")
    writer.write(f"{host} {port}\n".encode())


async def _count(reader: _Reader, writer: _Writer) -> None:
    total = 0
    while data := await reader.read(_CHUNK):
        total += len(data)
    writer.write(b"%d\n" % total)


async def _http(reader: _Reader, writer: _Writer) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    path = head.split(b" ", 2)[1].decode()
    if path.startswith("/bytes/"):
        length = int(path.removeprefix("/bytes/"))
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
        while length > 0:
            writer.write(bytes(min(length, _CHUNK)))
            length -= _CHUNK
            await writer.drain()
        return
    body = PAGE
    if path == "/whoami":
        body = (str(writer.get_extra_info("peername")[0]) + "\n").encode()
    writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


_STREAMS: dict[int, Callable[[_Reader, _Writer], Awaitable[None]]] = {
    7: _echo, 9: _discard, 11: _reset, 12: _stuck, 13: _whoami, 14: _count, 80: _http,
}  # fmt: skip


def _serve(service: Callable[[_Reader, _Writer], Awaitable[None]]) -> Callable[[_Reader, _Writer], Awaitable[None]]:
    async def connected(reader: _Reader, writer: _Writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            await service(reader, writer)
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    return connected


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, *, whoami: bool) -> None:
        self._whoami = whoami

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = f"{addr[0]} {addr[1]}\n".encode() if self._whoami else data
        self._transport.sendto(answer, addr)


async def main(addresses: list[str]) -> None:
    """Serve on each of `addresses` until the process is killed."""
    loop = asyncio.get_running_loop()
    for port, service in _STREAMS.items():
        await asyncio.start_server(_serve(service), addresses, port, backlog=4096, limit=_CHUNK)
    for address in addresses:
        for port in (7, 13):
            transport, _ = await loop.create_datagram_endpoint(
                lambda whoami=port == 13: _Datagrams(whoami=whoami),  # type: ignore[misc]  # a default binds the loop's value
                local_addr=(address, port),
            )
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
