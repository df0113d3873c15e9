"""Where the command `vmnet` begins: before anything else is imported, garbage collection is turned off.

The command ends, or becomes the VM, before there is garbage worth looking for; looking for it took a tenth of the time
from `vmnet run` to the VM, most of it while modules are imported.
"""

from __future__ import annotations

import gc

gc.disable()


def main() -> int:
    """Run the command on the process's own arguments; gives the exit code."""
    from openvmnet.cli.main import main as command

    return command()
