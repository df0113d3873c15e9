"""What makes a network real on one platform: links, ports and the firewall."""

import sys

DARWIN = sys.platform == "darwin"
"""Whether this is macOS, where vmnet.framework is the engine; elsewhere it is Linux's."""
