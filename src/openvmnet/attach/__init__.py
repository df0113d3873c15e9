"""How a virtual machine gets its port."""
