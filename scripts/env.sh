# Sourced by the other scripts: where the checkout is, and where what they install and build is kept.
# Root's place is one that every user can read, since root runs the product as an unprivileged user.
checkout=$(cd "$(dirname "$0")/.." && pwd)
if [ "$(id -u)" = 0 ]; then
  : "${OPENVMNET_CACHE:=/var/cache/openvmnet}"
else
  : "${OPENVMNET_CACHE:=${XDG_CACHE_HOME:-$HOME/.cache}/openvmnet}"
fi
export OPENVMNET_CACHE
python=$OPENVMNET_CACHE/venv/bin/python
export PYTHONDONTWRITEBYTECODE=1
umask 022
