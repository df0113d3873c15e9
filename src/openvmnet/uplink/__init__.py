"""Guest flows to host sockets and back: the first packet of a flow in Python, the rest in the kernel."""
