"""vmnet networks for virtual machines, on any host."""

__all__ = ["__version__"]
__version__ = "0.1.0"
