#!/bin/busybox sh
# The guest's init: load the drivers, then obey the serial console. A line is "ID BASE64-OF-A-SCRIPT"; the answer is
# what the script printed, between the lines "\001begin ID" and "\001end ID STATUS".
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
mkdir -p /tmp /run /var/run /root /dev/pts
mount -t devpts devpts /dev/pts
stty raw -echo </dev/ttyS0
while read -r module; do insmod "/lib/modules/$module"; done </lib/modules/order
echo 0 >/proc/sys/kernel/printk
ip link set lo up
# Started in a session of its own with the console as terminal, so that a killed script does not take init along.
exec </dev/ttyS0 >/dev/ttyS0 2>&1
printf '\001ready\n'
while read -r id script; do
  echo "$script" | base64 -d >/tmp/script
  printf '\001begin %s\n' "$id"
  sh /tmp/script </dev/null 2>&1
  printf '\n\001end %s %d\n' "$id" $?
done
poweroff -f
