"""What answers a guest at the gateway: DHCP with its leases, and DNS."""
