# The first process of the lab, inside its fresh namespaces: hide what belongs to the machine, then run the command.
# /run, the resolver's configuration and /sys are the lab's own; the only network interface is the loopback.
set -eu
real=$(readlink -f /etc/resolv.conf)
mount -t tmpfs -o mode=755 lab /run
mkdir -p /run/lab /run/netns /run/user "$(dirname "$real")"
case $real in /run/*) : >"$real" ;; esac
: >/run/lab/resolv.conf
mount --bind /run/lab/resolv.conf "$real"
mount -t sysfs sys /sys 2>/dev/null || true # a container may forbid it; then only interface names of the machine show
ip link set lo up
mkdir -m 700 /run/lab/home /run/lab/runtime
export HOME=/run/lab/home XDG_RUNTIME_DIR=/run/lab/runtime
unset XDG_STATE_HOME XDG_CONFIG_HOME XDG_CACHE_HOME
: >/run/lab/entered
status=0
"$@" || status=$?
exit $status
