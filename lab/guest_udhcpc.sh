#!/bin/sh
# What udhcpc calls: keep the lease's variables in /run/dhcp.INTERFACE, and set the interface up by them.
case $1 in
  deconfig)
    ip link set "$interface" up
    ip -4 addr flush dev "$interface"
    rm -f "/run/dhcp.$interface"
    ;;
  bound | renew)
    [ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
    ip -4 addr flush dev "$interface"
    ip addr add "$ip/$mask" dev "$interface"
    if [ -n "$staticroutes" ]; then # option 121 replaces option 3: RFC 3442
      set -- $staticroutes
      while [ $# -ge 2 ]; do
        if [ "$2" = 0.0.0.0 ]; then ip route replace "$1" dev "$interface"
        else ip route replace "$1" via "$2" dev "$interface"
        fi
        shift 2
      done
    else
      for gateway in $router; do ip route replace default via "$gateway" dev "$interface"; done
    fi
    {
      [ -z "$search$domain" ] || echo "search ${search:-$domain}"
      for server in $dns; do echo "nameserver $server"; done
    } >/etc/resolv.conf
    env >"/run/dhcp.$interface"
    ;;
esac
