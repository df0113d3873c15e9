"""`vmnet setup`: what has to be done once, where anything has."""

from __future__ import annotations

import shlex

import click

from openvmnet import engine
from openvmnet.cli import render


@click.command("setup", context_settings={"allow_interspersed_args": False})
@click.option("--json", "as_json", is_flag=True, help="Print the signed interpreter and its entitlement as JSON.")
@click.argument("argv", metavar="[-- PROGRAM.py [ARGUMENT]...]", nargs=-1, type=click.UNPROCESSED)
def command(as_json: bool, argv: tuple[str, ...]) -> None:
    """Make what this host needs once. On Linux there is nothing to make; vmnet doctor says what is missing.

    On macOS 26 or later vmnet takes programs that are signed with com.apple.security.virtualization: this makes a copy
    of the Python interpreter in ~/Library/Application Support/openvmnet and signs it, without any account. vmnet run
    uses it by itself.

    A Python program of your own that starts interfaces is run by the copy: vmnet setup -- program.py. Its arguments are
    those of python, so that -m and -c go too.
    """
    if not engine.DARWIN:
        if argv:
            from openvmnet.errors import MissingFeature

            raise MissingFeature("a signed interpreter is for macOS 26 or later: run the program as it is")
        _say(None, None, as_json=as_json)
        return
    from openvmnet.engine.darwin import entitlement
    from openvmnet.engine.darwin.mac import Mac

    if argv:
        entitlement.run_signed(Mac(), argv)
    made = entitlement.make_copy(Mac())
    _say(str(made), entitlement.ENTITLEMENT, as_json=as_json)


def _say(interpreter: str | None, entitlement: str | None, *, as_json: bool) -> None:
    """What was made, None for nothing."""
    if as_json:
        render.json({"interpreter": interpreter, "entitlement": entitlement})
    elif interpreter is None:
        click.echo("nothing has to be set up on this host; vmnet doctor says what is missing")
    else:
        click.echo(f"{shlex.quote(interpreter)} is signed with {entitlement}")
