"""The macOS engine: vmnet.framework, called through ctypes."""
