VM_OUT=/dev/tty1
VM_ERR=/dev/tty2
VM_CONSOLE=/dev/tty1

vm_mount_dev() { $B mount -t devtmpfs dev "$1"; }

# Mounts the host's folder $2, written through, on $3; $1 is its number.
vm_mount_rw() { $B mount -t hostfs -o "$2" none "$3"; }

# Mounts whatever else the backend has, below the new root $1.
vm_mount_own() {
    $B mkdir -p "$1/run/vm/io"
    $B mount -t hostfs -o "$VM_WORK/io" none "$1/run/vm/io"
    for x in 1 2; do $B stty -F "$1/dev/tty$x" raw -opost -echo; done
}

# Waits until all output is on the host: setting a terminal's mode drains it first.
vm_drain() { for x in 1 2; do $B stty -F /dev/tty$x -echo; done; }

# Ends the guest; $1 is the command's exit code.
vm_exit() {
    echo "$1" >/run/vm/io/rc
    $B poweroff -f
}
