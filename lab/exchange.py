"""Load of small exchanges: `python -m lab.exchange server|connect|request ...`, in namespaces that a bench measures.

    server ADDRESS PORT COUNT         echo on COUNT ports from PORT on, TCP
    connect ADDRESS PORT COUNT SECONDS WIDTH   connections a second: connect, one byte each way, close; WIDTH at once
    request ADDRESS PORT SECONDS      exchanges a second on one connection, one byte each way

Several ports, because the side that closes first keeps each connection's ports for a minute (TIME_WAIT), and 28,000 of
them towards one port are soon used up. The client and the server are Python too and take their share of the machine's
processors, the same for whatever lies between them.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import sys
import time

_ACCEPTS = 64


def server(address: str, port: int, count: int) -> None:
    """Echo what comes, close when the client does."""
    poll = select.epoll()
    listeners, clients = {}, {}
    for number in range(port, port + count):
        sock = socket.create_server((address, number), backlog=4096)
        sock.setblocking(False)
        listeners[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    print("ready", flush=True)
    while True:
        for fd, _ in poll.poll():
            if fd in listeners:
                for _ in range(_ACCEPTS):
                    try:
                        client, _ = listeners[fd].accept()
                    except BlockingIOError:
                        break
                    client.setblocking(False)
                    clients[client.fileno()] = client
                    poll.register(client, select.EPOLLIN)
                continue
            client = clients[fd]
            try:
                data = client.recv(4096)
            except OSError:
                data = b""
            if data:
                client.send(data)
            else:
                del clients[fd]
                client.close()


def connect(address: str, port: int, count: int, seconds: float, width: int) -> dict[str, float]:
    """Open, exchange one byte, close, `width` at once, for `seconds`."""
    poll = select.epoll()
    ports = itertools.cycle(range(port, port + count))
    open_: dict[int, socket.socket] = {}

    def begin() -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((address, next(ports)))
        open_[sock.fileno()] = sock
        poll.register(sock, select.EPOLLOUT)

    for _ in range(width):
        begin()
    done = errors = 0
    start = time.monotonic()
    while (now := time.monotonic()) - start < seconds:
        for fd, mask in poll.poll(1):
            sock = open_[fd]
            try:
                if mask & select.EPOLLOUT:
                    sock.send(b"x")
                    poll.modify(fd, select.EPOLLIN)
                    continue
                done += len(sock.recv(1)) == 1
            except OSError:
                errors += 1
            del open_[fd]
            sock.close()
            begin()
    return {"per_second": done / (now - start), "errors": errors}


def request(address: str, port: int, seconds: float) -> dict[str, float]:
    """One byte there and back, one after the other, on one connection."""
    sock = socket.create_connection((address, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    done = 0
    start = time.monotonic()
    while (now := time.monotonic()) - start < seconds:
        sock.send(b"x")
        sock.recv(1)
        done += 1
    return {"per_second": done / (now - start), "errors": 0}


def main(argv: list[str]) -> None:
    """The command line above."""
    what, address, port, *rest = argv
    if what == "server":
        server(address, int(port), int(rest[0]))
    elif what == "connect":
        print(json.dumps(connect(address, int(port), int(rest[0]), float(rest[1]), int(rest[2]))))
    elif what == "request":
        print(json.dumps(request(address, int(port), float(rest[0]))))
    else:
        raise SystemExit(f"'{what}' is none of server, connect, request")


if __name__ == "__main__":
    main(sys.argv[1:])
