"""`vmnet doctor`: what this host lacks, and the command that mends it."""

from __future__ import annotations

import click

from openvmnet import doctor
from openvmnet.cli import render
from openvmnet.cli.render import Column
from openvmnet.errors import MissingFeature

_COLUMNS = (Column("NEED"), Column("STATE"), Column("FOUND"), Column("FOR"))


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Look for everything a network needs on this host.

    Each thing is tried, in a namespace of its own, and nothing is left behind. Exit code 0: all that is required is
    there; 69: something is missing, and the command that mends it is printed.
    """
    report = doctor.examine()
    if as_json:
        render.json(report)
    else:
        render.table(_COLUMNS, [(each.name, each.state, each.detail, each.purpose) for each in report.findings])
        for each in report.findings:
            if each.remedy is not None:
                goal = "have" if each.state == "optional" else "mend"
                click.echo(f"{each.name} is {each.state}; to {goal} it: {each.remedy}")
    if not report.healthy:
        ctx.exit(MissingFeature.exit_code)
