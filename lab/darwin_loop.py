"""One sample of the macOS engine's data path: `python -m lab.darwin_loop ours|C down|up OCTETS SECONDS`, as JSON.

    source -> wire -> (stand-in) -> relay -> VM's socket -> sink        down; up is the same, backwards

Source and sink are C, in threads of their own; the relay is the engine's or the stand-in's own loop in C. Everything
else is the same: buffers, batches, the socketpairs, the stand-in's vmnet_read and vmnet_write.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from lab import standin
from openvmnet.engine.darwin.datapath import Relay, socketpair
from openvmnet.engine.darwin.framework import Framework, Mode
from openvmnet.engine.darwin.handle import Handle

_BATCH = 64  # datagrams of one call of source and sink


def sample(who: str, way: str, octets: int, seconds: float) -> dict[str, float]:
    """Gbit/s and batches/s of `who`."""
    control = standin.Standin(standin.library())
    framework = Framework(str(control.path))
    far, wire = socketpair()
    ours, vm = socketpair()
    control.wire(wire.fileno())
    handle = Handle(framework, {"vmnet_operation_mode": Mode.SHARED, "vmnet_mtu": octets - 14})
    relay = Relay(framework, handle, ours)
    batch, slot = relay.geometry
    enter, leave = (far, vm) if way == "down" else (vm, far)
    received: list[int] = []
    batches: list[int] = []

    def sink() -> None:
        received.append(control.library.standin_sink(leave.fileno(), slot, _BATCH, seconds))

    def blast() -> None:
        control.library.standin_blast(enter.fileno(), octets, _BATCH, seconds)

    def loop() -> None:
        function = getattr(control.library, f"standin_relay_{way}")
        batches.append(function(handle.ref, ours.fileno(), batch, slot, seconds))

    threads = [threading.Thread(target=each) for each in ((sink, blast) if who == "ours" else (sink, blast, loop))]
    begun = time.monotonic()
    if who == "ours":
        relay.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    counters = relay.counters
    relay.stop()
    handle.stop()
    if who == "ours":
        batches.append(counters.down_batches if way == "down" else counters.up_batches)
    return {
        "gbits": received[0] * octets * 8 / took / 1e9,
        "batches": batches[0] / took,
        "packets": received[0] / max(1, batches[0]),
    }


if __name__ == "__main__":
    print(json.dumps(sample(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
