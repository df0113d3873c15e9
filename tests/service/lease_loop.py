"""Leases in a loop, for a test that kills it: `python -m tests.service.lease_loop FILE`.

One line goes to standard output for each ACK that is released, written at once: MAC and address.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from openvmnet.service.dhcp import DhcpServer, Reply
from openvmnet.service.lease_file import Committer
from openvmnet.service.leases import LeaseBook
from openvmnet.wire import dhcp4
from openvmnet.wire.ethernet import format_mac
from tests.service.dhcp_guest import CONFIG, Guest


def tell(reply: Reply) -> None:
    message = dhcp4.parse(reply.payload)
    os.write(1, f"{format_mac(message.chaddr)} {'.'.join(map(str, message.yiaddr))}\n".encode())


async def main(path: Path) -> None:
    book = LeaseBook(path)
    server = DhcpServer(CONFIG, book)
    committer: Committer[Reply] = Committer(book, book.file, tell)
    number = int.from_bytes(os.urandom(1), "big")
    while True:
        for _ in range(3):
            number = (number + 1) % 200
            guest = Guest(server, b"\x52\x54\0\0\0" + bytes([number]))
            guest.lease(time.time())
            assert guest.reply is not None
            assert guest.reply.commit
            committer.hold(guest.reply)
            committer.kick()
        await asyncio.sleep(0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
