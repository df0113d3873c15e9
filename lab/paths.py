"""Where the scripts keep what they install and build; `scripts/env.sh` says the same for the shell."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """The cache directory: root's is one that the unprivileged user of the tests can read."""
    given = os.environ.get("OPENVMNET_CACHE")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/cache/openvmnet")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openvmnet"


def programs() -> Path:
    """The virtual environment's bin directory, with the installed `vmnet`."""
    return cache() / "venv" / "bin"
