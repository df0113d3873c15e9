"""The command `vmnet`: which part of it is meant, and how an error leaves it.

A subcommand's module is imported when it is called, so that `vmnet run` pays for nothing of the others. Whatever goes
wrong ends here as one sentence on standard error, `vmnet: ...`, with `hint: ...` after it where one command mends it,
and with the error's exit code; where the command line has --json, as one JSON object on standard error.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from openvmnet import __version__
from openvmnet.errors import HostError, VmnetError

_COMMANDS = ("run", "ls", "show", "interfaces", "doctor", "setup")
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BROKEN_PIPE = 1  # what click gives when it meets the broken pipe first


class _Commands(click.Group):
    """Subcommand NAME is `command` of module openvmnet.cli.NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"openvmnet.cli.{cmd_name}").command
        return command


@click.command(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="vmnet %(version)s")
@click.pass_context
def vmnet(ctx: click.Context) -> None:
    """Vmnet networks for virtual machines: rootless, at the kernel's own speed.

    \b
    vmnet run -- qemu-system-x86_64 ... -netdev vmnet-shared,id=net0 -device virtio-net-pci,netdev=net0
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (default: the process's own); gives the exit code, and prints why it is not 0."""
    _open_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    own = args[: args.index("--")] if "--" in args else args
    as_json = "--json" in own
    try:
        code = vmnet.main(args, prog_name="vmnet", standalone_mode=False)
        sys.stdout.flush()
    except VmnetError as error:
        return _say(error.message, error.hint, error.exit_code, type(error).__name__, as_json=as_json)
    except click.ClickException as error:
        hint = error.ctx.command_path + " --help" if isinstance(error, click.UsageError) and error.ctx else None
        return _say(error.format_message(), hint, error.exit_code, "UsageError", as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    except BrokenPipeError:
        _give_up_output()
        return _BROKEN_PIPE
    except OSError as error:  # a full disk behind standard output, no descriptors left
        _give_up_output()
        where = f": {error.filename}" if error.filename else ""
        return _say(
            f"the system refused: {error.strerror}{where}", None, HostError.exit_code, "HostError", as_json=as_json
        )
    return code if isinstance(code, int) else 0


def _open_streams() -> None:
    """Give a standard stream that is closed /dev/null: else a TAP gets its number, and what the VM says goes there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open to the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - as above


def _give_up_output() -> None:
    """The interpreter flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str, hint: str | None, code: int, kind: str, *, as_json: bool) -> int:
    if as_json:
        import msgspec

        # An argument may be any octets; what is no text came in as surrogates.
        said = message.encode(errors="backslashreplace").decode()
        fault = {"kind": kind, "message": said, "hint": hint, "exit_code": code}
        print(msgspec.json.encode({"error": fault}).decode(), file=sys.stderr)
        return code
    print(f"vmnet: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code
