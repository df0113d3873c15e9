"""The Linux engine: a user and network namespace with a bridge, TAP ports and nftables rules, held by a small agent."""
