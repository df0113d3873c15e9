"""What makes a network real on one platform: links, ports and the firewall."""
