"""The command `vmnet`: one file per noun."""
