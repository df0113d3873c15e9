"""The network process: `python -m openvmnet.daemon NAME READY_FD SPEC FIRST`, started by `openvmnet.control`.

It forks and lets its parent leave at once, so that it belongs to nobody's process tree; it forks the agent before it
imports asyncio or the services, and imports them while the agent makes the links and rules; it brings the network up,
says on READY_FD that it is ready or why not, and then answers on the control socket until the last VM has gone. On
SIGTERM, SIGINT and on the agent's death it ends too. What it made, it removes, however it ends short of SIGKILL.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from openvmnet.addressing import Choice
    from openvmnet.config import PortKind
    from openvmnet.controlserver import ControlServer
    from openvmnet.engine.linux.namespace import Namespace
    from openvmnet.kernel.loop import Lane
    from openvmnet.messages import Spec
    from openvmnet.network import Network, Record

_SETTLE = 0.02  # s
_AGENT_GONE = 70  # exit code, EX_SOFTWARE: the agent died under the network


class Made(NamedTuple):
    """What is there before the services: addresses, the namespace and its agent's pid, and whose place this takes."""

    choice: Choice
    namespace: Namespace
    agent: int
    before: Record | None
    first: PortKind | None


def main(argv: list[str]) -> int:
    """Be the process of network argv[0]; argv[1] is the descriptor to report on, argv[2] the Spec as JSON, argv[3] the
    PortKind of the port that will be asked for first, or null."""
    if os.fork():
        os._exit(0)
    gc.disable()  # until it runs: what is imported stays, and to look through it again and again is a fifth of the time
    _spare_openssl()
    name, ready = argv[0], int(argv[1])
    os.set_inheritable(ready, False)
    import msgspec

    from openvmnet import messages, state
    from openvmnet.config import PortKind
    from openvmnet.engine.linux import steps
    from openvmnet.engine.linux.agent import drop_descriptors
    from openvmnet.engine.linux.namespace import Namespace
    from openvmnet.errors import VmnetError
    from openvmnet.netdev import gateway_mac

    spec = msgspec.json.decode(argv[2], type=messages.Spec)
    first = msgspec.json.decode(argv[3], type=PortKind | None)
    drop_descriptors({ready})
    directory = state.runtime(name)
    before: Record | None = None
    try:
        choice, agent, before = _prepare(name, spec, directory)
        first = None if before is not None else first
        namespace = Namespace(directory / "agent.sock")
        if before is None:
            namespace.begin(steps.network(choice.config, gateway_mac(name), (), {}, first))
        return _run(Made(choice, namespace, agent, before, first), ready)
    except VmnetError as error:
        _sweep(directory, keep=before is not None)
        _say(ready, messages.Started(fault=messages.Fault.of(error)))
        return error.exit_code
    except Exception as error:
        _sweep(directory, keep=before is not None)
        _say(ready, messages.Started(fault=messages.Fault("HostError", f"network '{name}' failed to start: {error!r}")))
        raise


def _spare_openssl() -> None:
    """Nothing here speaks TLS, and asyncio and hashlib do without OpenSSL, whose libraries take time and memory."""
    if importlib.util.find_spec("_sha256") or importlib.util.find_spec("_sha2"):  # until Python 3.11, and since 3.12
        for module in ("ssl", "_hashlib"):
            sys.modules[module] = None  # type: ignore[assignment] # that is how an import is made to fail


def _prepare(name: str, spec: Spec, directory: Path) -> tuple[Choice, int, Record | None]:
    """Addresses and an agent: those of a process that died, or new ones."""
    from openvmnet import addressing
    from openvmnet.engine.linux import namespace

    before = directory / "network.json"
    socket = directory / "agent.sock"
    if socket.exists() and before.exists():
        from openvmnet.network import read_record

        record = read_record(before)
        if record is not None:
            return addressing.Choice(record.config), record.agent, record
    choice = addressing.choose(name, spec)
    socket.unlink(missing_ok=True)  # of a process that was killed before it had written what it is
    agent = namespace.fork_agent(socket)
    return choice, agent, None


def _run(made: Made, ready: int) -> int:
    import logging

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"
    )
    from openvmnet.kernel.loop import run

    async def live(lane: Lane) -> int:
        return await _live(lane, made, ready)

    return run(live)


async def _live(lane: Lane, made: Made, ready: int) -> int:
    import asyncio

    from openvmnet import addressing, messages, state
    from openvmnet.controlserver import ControlServer
    from openvmnet.network import Network

    choice = made.choice
    directory = state.runtime(choice.config.name)
    network = Network(lane, choice.config, made.namespace, made.agent, made.before, made.first)
    if choice.note:
        network.news.append(choice.note)
    await network.up()
    server = ControlServer(network, directory / "control.sock")
    lock: int | None = None
    try:
        await server.start()
        addressing.remember(choice.config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, network.end, True)
        _say(ready, messages.Started(note="; ".join(network.news) or None))
        gc.freeze()
        gc.enable()
        lock = await _until_over(network, server)
    finally:
        server.close()
        await network.down()
        _sweep(directory)
        if lock is not None:
            os.close(lock)
    return _AGENT_GONE if network.agent_died else 0


async def _until_over(network: Network, server: ControlServer) -> int | None:
    """Wait for the network's end, and take the lock for it: a command that is about to join must not be left alone.

    Gives the lock's descriptor; None where the end does not wait for it.
    """
    import asyncio

    from openvmnet import state

    while True:
        await network.ended.wait()
        lock = state.try_lock()
        if lock is not None:
            await asyncio.sleep(_SETTLE)  # who dialled before the lock was taken is accepted in this time
            if network.forced or not (network.busy() or server.busy()):
                return lock
            os.close(lock)
        if network.forced:
            return None
        if network.busy():
            network.ended.clear()
        await asyncio.sleep(_SETTLE)


def _say(ready: int, word: object) -> None:
    import msgspec

    with contextlib.suppress(OSError):  # the command that started us may have been interrupted
        os.write(ready, msgspec.json.encode(word) + b"\n")
        os.close(ready)


def _sweep(directory: Path, *, keep: bool = False) -> None:
    """Remove the runtime directory with what is in it; `keep` what the next process needs to take the network over."""
    for name in ("control.sock",) if keep else ("control.sock", "network.json", "agent.sock"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
