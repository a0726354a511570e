#!/bin/sh
# PID 1 of the guest. The root is the host's, read-only; this lays a tmpfs over it, runs one command
# (see `write_control` in mod.rs) and powers off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
control=${0%/*}
# modules: a folder with one folder for each kernel version
. "$control/conf"

fail() {
  echo "init: $*"
  echo o > /proc/sysrq-trigger
  sleep 60
}

if [ "${1:-}" != inside ]; then
  mount -t proc proc /proc || fail "mount /proc"
  kernel=$(uname -r)
  overlay=$modules/$kernel/kernel/fs/overlayfs/overlay.ko
  [ ! -e "$overlay" ] || insmod "$overlay" || fail "load $overlay"
  mount -t tmpfs -o mode=755 tmpfs /mnt && mkdir /mnt/upper /mnt/work /mnt/root || fail "mount tmpfs"
  mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root || fail "mount overlay"
  cd /mnt/root || fail "enter the overlay"
  mount -t proc proc proc && mount -t sysfs sysfs sys && mount -t devtmpfs devtmpfs dev || fail "mount /sys, /dev"
  mkdir -p dev/pts dev/shm
  mount -t devpts devpts dev/pts && mount -t tmpfs tmpfs dev/shm && mount -t tmpfs -o mode=755 tmpfs run ||
    fail "mount /dev/shm, /run"
  mkdir -p "usr/lib/modules/$kernel" && mount --bind "$modules/$kernel" "usr/lib/modules/$kernel" ||
    fail "no modules in $modules/$kernel"
  # PID 1 shares its root with the kernel's threads, so the kernel finds modprobe and the modules by itself.
  exec chroot . /bin/sh "$0" inside
fi

# Not there on every kernel; whoever needs them will say so.
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
mount -t bpf bpf /sys/fs/bpf 2>/dev/null

mkdir /run/control || fail "make /run/control"
# Kernels since 6.10 want the name of the option.
mount -i -t hostfs -o "hostfs=$control" none /run/control 2>/dev/null ||
  mount -i -t hostfs -o "$control" none /run/control || fail "mount $control"
stty raw -echo < /dev/ttyS0 && stty raw -echo < /dev/ttyS1 || fail "set up the serial lines"
# This kernel has no nf_tables for IP.
for tool in iptables ip6tables; do
  for suffix in "" -save -restore; do
    [ ! -e /usr/sbin/$tool-legacy$suffix ] || ln -sfn $tool-legacy$suffix /usr/sbin/$tool$suffix
  done
done
ip link set lo up || fail "set lo up"
modprobe -a ipv6 nf_conntrack ip_vs || fail "this kernel has no IPVS"
# Its device file comes with the module, and the module with the file.
modprobe -q tun

# Slow as a guest is, many connections of a test are open at the same time.
ulimit -n 65536
setsid sh /run/control/command < /dev/null > /dev/ttyS0 2> /dev/ttyS1
status=$?
# stty waits until everything that was written has left.
stty raw < /dev/ttyS0
stty raw < /dev/ttyS1
echo $status > /run/control/status.new && sync && mv /run/control/status.new /run/control/status
sync
echo o > /proc/sysrq-trigger
sleep 60
