# The first process of the lab, inside its fresh namespaces: hide what belongs to the machine, then run the command.
# /run, the resolver's configuration and /sys are the lab's own; the only network interface is the loopback.
set -eu
umask 022
real=$(readlink -f /etc/resolv.conf)
mount -t tmpfs -o mode=755 lab /run
mkdir -p /run/lab /run/netns /run/user "$(dirname "$real")"
case $real in /run/*) : >"$real" ;; esac
: >/run/lab/resolv.conf
mount --bind /run/lab/resolv.conf "$real"
mount -t sysfs sys /sys 2>/dev/null || true # a container may forbid it; then only interface names of the machine show
ip link set lo up

# Tests become the unprivileged user and import from the checkout. Where it lies below a directory of root's alone, an empty
# directory takes that one's place here, with nothing but the checkout in it.
checkout=$(cd "$(dirname "$0")/.." && pwd)
if [ "$OPENVMNET_LAB_UID" = 0 ]; then
  closed=
  ancestor=$(dirname "$checkout")
  while [ "$ancestor" != / ]; do
    case $(stat -c %A "$ancestor") in *x | *t) ;; *) closed=$ancestor ;; esac
    ancestor=$(dirname "$ancestor")
  done
  case ${OPENVMNET_CACHE:-/var/cache}/ in "${closed:-/none}"/*) closed= ;; esac
  if [ -n "$closed" ]; then
    mkdir /run/lab/checkout
    mount --bind "$checkout" /run/lab/checkout
    mount -t tmpfs -o mode=755 lab "$closed"
    mkdir -p "$checkout"
    mount --move /run/lab/checkout "$checkout"
    cd "$checkout"
  fi
fi

mkdir -m 700 /run/lab/home /run/lab/runtime
export HOME=/run/lab/home XDG_RUNTIME_DIR=/run/lab/runtime
unset XDG_STATE_HOME XDG_CONFIG_HOME XDG_CACHE_HOME
: >/run/lab/entered
status=0
"$@" || status=$?
exit $status
