"""`vmnet setup`: what has to be done once, where anything has."""

from __future__ import annotations

import shlex

import click

from openvmnet import engine


@click.command("setup")
@click.option("--path", "as_path", is_flag=True, help="Print the signed interpreter's path and nothing else.")
def command(as_path: bool) -> None:
    """Make what this host needs once. On Linux there is nothing to make; vmnet doctor says what is missing.

    On macOS 26 or later vmnet takes programs that are signed with com.apple.security.virtualization: this makes a copy
    of the Python interpreter in ~/Library/Application Support/openvmnet and signs it, without any account. vmnet run
    uses it by itself. A program of your own that starts interfaces is run by it: "$(vmnet setup --path)" program.py
    """
    if not engine.DARWIN:
        if not as_path:
            click.echo("nothing has to be set up on this host; vmnet doctor says what is missing")
            return
        from openvmnet.errors import MissingFeature

        raise MissingFeature("a signed interpreter is for macOS 26 or later", hint="vmnet doctor")
    from openvmnet.engine.darwin import entitlement
    from openvmnet.engine.darwin.mac import Mac

    made = entitlement.make_copy(Mac())
    click.echo(made if as_path else f"{shlex.quote(str(made))} is signed with {entitlement.ENTITLEMENT}")
