"""The command `vmnet` as on a Mac, over the stand-in: `python -m tests.engine.darwin.on_standin LIBRARY run -- ...`.

What differs from a Mac is the library, that whoever asks may use it, and where bootpd's leases (STANDIN_LEASES) and its
other files (in STANDIN_BOOTPD) lie; the relay is started as this module again, with `relay` as its command.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from openvmnet import engine
from openvmnet.engine.darwin import bootptab, framework, launch, leases, reservation
from openvmnet.engine.darwin.mac import Mac


def main(argv: list[str]) -> int:
    library, *words = argv
    engine.DARWIN = True
    Mac.root = property(lambda _: True)  # to the stand-in, whoever asks is
    framework.load = functools.cache(lambda: framework.Framework(library))
    bootpd = Path(os.environ.get("STANDIN_BOOTPD", "/nonexistent"))
    bootptab.PATH, bootptab.HOLDERS = bootpd / "bootptab", bootpd / "held"
    reservation.RELOAD = ("/bin/sh", "-c", 'echo "$@" >>"$0"', str(bootpd / "told"), *reservation.RELOAD)
    launch._MODULE = ("-m", "tests.engine.darwin.on_standin", library, "relay")
    leases.PATH = Path(os.environ.get("STANDIN_LEASES", bootpd / "dhcpd_leases"))
    if words[0] == "relay":
        from openvmnet.engine.darwin import relay

        return relay.main(words[1:])
    from openvmnet.cli.main import main as vmnet

    return vmnet(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
