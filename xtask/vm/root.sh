# Sourced by PID 1. Builds the guest's root: the host's, with every change kept in memory.
#   LOWER  the host's root, read-only (empty when that is /)
#   STAGE  an empty folder to build in
#   WORK   this guest's folder, seen below LOWER
#   B      a busybox
NEW=$STAGE/new
$B mount -t tmpfs -o size=70% stage "$STAGE"
$B mkdir -p "$NEW" "$STAGE/upper" "$STAGE/work"
$B mount -t overlay -o "lowerdir=${LOWER:-/},upperdir=$STAGE/upper,workdir=$STAGE/work" root "$NEW"

$B mount -t proc proc "$NEW/proc"
$B mount -t sysfs sys "$NEW/sys"
vm_mount_dev "$NEW/dev"
$B mkdir -p "$NEW/dev/pts" "$NEW/dev/shm" "$NEW/dev/net"
$B mount -t devpts -o newinstance,ptmxmode=666 devpts "$NEW/dev/pts"
$B rm -f "$NEW/dev/ptmx"
$B ln -s pts/ptmx "$NEW/dev/ptmx"
$B mount -t tmpfs shm "$NEW/dev/shm"
[ -e "$NEW/dev/net/tun" ] || $B mknod -m 666 "$NEW/dev/net/tun" c 10 200
$B ln -sf /proc/self/fd "$NEW/dev/fd"
$B ln -sf /proc/self/fd/0 "$NEW/dev/stdin"
$B ln -sf /proc/self/fd/1 "$NEW/dev/stdout"
$B ln -sf /proc/self/fd/2 "$NEW/dev/stderr"
$B mount -t cgroup2 cgroup "$NEW/sys/fs/cgroup"
$B mount -t bpf bpf "$NEW/sys/fs/bpf"
$B mount -t tmpfs run "$NEW/run"
$B mkdir -p "$NEW/run/netns" "$NEW/run/lock" "$NEW/run/vm"

vm_mount_own "$NEW"
number=0
while read -r folder; do
    number=$((number + 1))
    $B mkdir -p "$NEW$folder"
    vm_mount_rw $number "$folder" "$NEW$folder"
done <"$LOWER$WORK/rw.list"

[ -e "$NEW/run/vm/busybox" ] || $B cp "$B" "$NEW/run/vm/busybox"
for file in vars.sh run.sh cmd.sh; do $B cp "$LOWER$WORK/$file" "$NEW/run/vm/$file"; done

$B hostname weir-vm
$B ip link set lo up
cd "$NEW"
$B mount --move . /
exec $B chroot . /run/vm/busybox sh /run/vm/run.sh
