VM_OUT=$(echo /dev/vport*p1)
VM_ERR=$(echo /dev/vport*p2)
VM_CONSOLE=/dev/hvc0
VM_BEAT=$(echo /dev/vport*p5)

vm_mount_dev() { $B mount -t devtmpfs dev "$1"; }

# Mounts the host's folder $2, written through, on $3; $1 is its number.
vm_mount_rw() {
    $B mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,cache=mmap" "rw$1" "$3"
}

# Mounts whatever else the backend has, below the new root $1.
vm_mount_own() {
    $B mkdir -p "$1/lib/modules"
    $B mount --bind /lib/modules "$1/lib/modules"
    $B mkdir -p "$1/run/vm"
    $B cp "$B" "$1/run/vm/busybox"
    $B ln -s busybox "$1/run/vm/modprobe"
    echo /run/vm/modprobe >/proc/sys/kernel/modprobe
}

# A port's writer waits for its reader: nothing is under way.
vm_drain() { :; }

# Ends the guest; $1 is the command's exit code.
vm_exit() {
    echo "$1" >"$(echo /dev/vport*p3)"
    $B reboot -f
}
