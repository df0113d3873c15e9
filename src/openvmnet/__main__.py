"""`python -m openvmnet` is the command `vmnet`."""

import sys

from openvmnet.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
