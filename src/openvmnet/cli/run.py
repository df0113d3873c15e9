"""`vmnet run`: become the VM, with a port on a network for each vmnet netdev of its command.

No process of ours stays between the VM and its caller: exec(2) makes this one the VM, so its exit code, its signals
and its terminal are the caller's. The ports are the descriptors that it inherits, and go when it goes.
From start to exec there are 0.2 s: nothing is imported here that is not needed on the way.
"""

from __future__ import annotations

import errno
import math
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from openvmnet import control, engine, messages
from openvmnet.attach.command import plan, rewrite
from openvmnet.errors import HostError, NotFound, OptionError
from openvmnet.netdev import Bridged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvmnet.attach.bridged import Plugged
    from openvmnet.attach.command import Plan, PlannedNetdev
    from openvmnet.control import Client
    from openvmnet.messages import PlugRequest, Spec

# Exit codes of a command that starts another, as env(1) and the shells have them.
_CANNOT_RUN, _NOT_FOUND = 126, 127


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("--name", metavar="NETWORK", help="The network's name.  [default: it follows from the addresses]")
@click.option(
    "--linger",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="How long a network that this starts stays without a VM.",
)
@click.option("--host-loopback", is_flag=True, help="Let VMs reach what listens on this host's loopback only, too.")
@click.option("--force", is_flag=True, help="Take the addresses even where another network overlaps.")
@click.argument("argv", metavar="-- QEMU [ARGUMENT]...", nargs=-1, type=click.UNPROCESSED)
def command(name: str | None, linger: float, host_loopback: bool, force: bool, argv: tuple[str, ...]) -> None:
    """Start a VM whose command line has -netdev vmnet-shared, vmnet-host or vmnet-bridged.

    \b
    vmnet run -- qemu-system-x86_64 ... -netdev vmnet-shared,id=net0 -device virtio-net-pci,netdev=net0

    \b
    vmnet-shared   the outside through this host, this host at the gateway's address, the other VMs
    vmnet-host     this host at the gateway's address, and the other VMs
    vmnet-bridged  the network behind a bridge or wired NIC of this host

    \b
    Options, as in QEMU, and mtu:
      id=NAME
      isolated=on|off                                    no other VM
      start-address=IP,end-address=IP,subnet-mask=MASK   gateway, end of the DHCP pool, mask: all or none
      nat66-prefix=PREFIX     (shared)                   a unique local /64, such as fd12:3456:789a:1::
      net-uuid=UUID           (host)                     a private network: VMs with the same UUID
      mtu=1280..65520         (shared, host)             octets of IP in a frame; 1500
      hostfwd=tcp::2222-:22   (shared, host)             a port of the host's that leads to one of the VM's
      address=IP              (shared, host)             the address that DHCP gives to this NIC
      ifname=NAME             (bridged)                  see vmnet interfaces
    """
    if not math.isfinite(linger):  # click lets nan pass any range
        raise click.BadParameter(f"{linger} is not a number of seconds", param_hint="'--linger'")
    planned = plan(argv)
    program = _program(argv[0])
    if engine.DARWIN:
        from openvmnet.attach import darwin

        darwin.refuse(name, host_loopback=host_loopback)
        ports, macs = darwin.plug(planned)
        for netdev, mac in zip(planned.netdevs, macs, strict=True):
            _tell_of_hot_plug(netdev, mac)
        darwin.become_user()
        words = rewrite(planned, [port.vm_fd for port in ports], macs, datagrams=True)
        _become(program, words, [fd for port in ports for fd in (port.vm_fd, port.life_fd)])
    if all(isinstance(netdev.options, Bridged) for netdev in planned.netdevs):
        _refuse_for_bridged(name, host_loopback=host_loopback)
    spec = messages.Spec(name=name, force=force, linger=linger, host_loopback=host_loopback)
    macs, fds, kept = _plug(planned, spec)
    _become(program, rewrite(planned, fds, macs), [*fds, *kept])


def _refuse_for_bridged(name: str | None, *, host_loopback: bool) -> None:
    """Raise OptionError for what is said of a network, where the command has none: its netdevs are all on a LAN."""
    said = f"--name {name}" if name is not None else "--host-loopback" if host_loopback else None
    if said is not None:
        raise OptionError(
            f"'{said}' is for vmnet-shared and vmnet-host: a vmnet-bridged netdev is on the LAN of its ifname",
            option=said.split()[0].lstrip("-"),
            value=name if name is not None else "on",
        )


def _plug(planned: Plan, base: Spec) -> tuple[list[str], list[int], list[int]]:
    """A port for each netdev: MACs, descriptors, and what else the VM has to inherit.

    Netdevs that mean the same network share the connection to it. Bridged ones come first: more of them fail, and
    nothing else has been started by then.
    """
    clients: dict[Spec, Client] = {}
    ports: dict[int, tuple[str, int]] = {}
    kept: list[int] = []
    try:
        for netdev in planned.netdevs:
            if isinstance(netdev.options, Bridged):
                plugged = _bridge(netdev.options, _request(planned, netdev))
                ports[netdev.index] = plugged.mac, plugged.fd
                kept.append(plugged.record)
                if plugged.unlisted:
                    _progress(f"vmnet ls does not list {netdev.name}: {plugged.unlisted}")
                if plugged.how == "macvtap" and netdev.mac is None and netdev.mac_position is None:
                    _progress(f"a NIC that is plugged into {netdev.name} later needs mac={plugged.mac} over macvtap")
        if ports:
            _forgo()
        for netdev in planned.netdevs:
            if isinstance(netdev.options, Bridged):
                continue
            spec = messages.Spec.of(netdev.options, base)
            request = _request(planned, netdev)
            if spec not in clients:
                clients[spec] = control.open_network(spec, first=request.kind, progress=_progress)
            reply, fd = clients[spec].plug(request)
            ports[netdev.index] = reply.mac, fd
            _tell_of_hot_plug(netdev, reply.mac)
    except BaseException:
        for fd in [*(fd for _, fd in ports.values()), *kept]:
            os.close(fd)
        raise
    finally:
        for client in clients.values():
            client.close()
    ordered = [ports[netdev.index] for netdev in planned.netdevs]
    return [mac for mac, _ in ordered], [fd for _, fd in ordered], kept


def _tell_of_hot_plug(netdev: PlannedNetdev, mac: str) -> None:
    """A reservation is the MAC's, and a NIC that is not in the command has whatever MAC it is given."""
    address = netdev.options.address
    if address is not None and netdev.mac is None and netdev.mac_position is None:
        _progress(f"a NIC that is plugged into {netdev.name} later needs mac={mac} to be given {address}")


def _bridge(options: Bridged, request: PlugRequest) -> Plugged:
    from openvmnet.attach import bridged

    return bridged.plug(options.ifname or "", request)


def _forgo() -> None:
    from openvmnet.engine.linux.bridged import forgo_capability

    forgo_capability()


def _request(planned: Plan, netdev: PlannedNetdev) -> messages.PlugRequest:
    return messages.PlugRequest(
        vm=planned.vm_name,
        netdev=netdev.name,
        mac=netdev.mac,
        identity=planned.identity(),
        index=netdev.index,
        isolated=netdev.options.isolated,
        pid=os.getpid(),
        hostfwd=netdev.options.hostfwd,
        address=netdev.options.address,
    )


def _program(name: str) -> str:
    """The file that exec(2) will be given. Raises NotFound before anything has been started for it."""
    if "/" in name:
        if os.path.isfile(name):
            return name
        raise _not_found(f"no program '{name}' is there")
    for directory in os.get_exec_path():
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    install = "brew install qemu" if engine.DARWIN else "sudo apt install qemu-system"
    hint = install if name.startswith("qemu-system") else None
    raise _not_found(f"no program '{name}' is on the PATH", hint)


def _not_found(message: str, hint: str | None = None) -> NotFound:
    error = NotFound(message, hint=hint)
    error.exit_code = _NOT_FOUND
    return error


def _become(program: str, argv: list[str], fds: Sequence[int]) -> NoReturn:
    import signal

    for fd in fds:
        os.set_inheritable(fd, True)
    # Python ignores these two, and what is ignored stays so across exec(2).
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(program, argv)  # noqa: S606 - the argument list that the user gave, by no shell
    except OSError as error:
        for fd in fds:
            os.close(fd)
        failure = HostError(f"'{program}' cannot be started: {error.strerror}")
        failure.exit_code = _NOT_FOUND if error.errno == errno.ENOENT else _CANNOT_RUN
        raise failure from error


def _progress(sentence: str) -> None:
    print(f"vmnet: {sentence}", file=sys.stderr, flush=True)
