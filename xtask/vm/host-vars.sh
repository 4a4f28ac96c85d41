VM_OUT=
VM_ERR=
VM_CONSOLE=

# A /dev of its own: the host's is shared with the host, and must not be touched.
vm_mount_dev() {
    $B mount -t tmpfs -o mode=755 dev "$1"
    while read -r name major minor; do
        $B mknod -m 666 "$1/$name" c "$major" "$minor"
    done <<END
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
END
}

vm_mount_rw() { $B mount --bind "$2" "$3"; }

# The host's other file systems, each with its changes kept in memory; what cannot be a layer
# is shown read-only.
vm_mount_own() {
    number=0
    while read -r _ _ _ _ point _ rest; do
        point=$($B printf '%b' "$point")
        type=${rest#*- }
        type=${type%% *}
        case $type in proc | sysfs | dev* | cgroup* | bpf | *fs_private | mqueue | debugfs | \
            tracefs | securityfs | pstore | configfs | efivarfs | autofs | rpc_pipefs | \
            binfmt_misc | hugetlbfs | fusectl | nsfs) continue ;; esac
        case $point in / | /proc* | /sys* | /dev* | /run* | "$STAGE"*) continue ;; esac
        number=$((number + 1))
        $B mkdir -p "$STAGE/u$number" "$STAGE/w$number"
        if [ -d "$point" ]; then
            $B mkdir -p "$1$point"
            $B mount -t overlay -o \
                "lowerdir=$point,upperdir=$STAGE/u$number,workdir=$STAGE/w$number" \
                layer "$1$point" 2>/dev/null && continue
        fi
        $B mount --bind "$point" "$1$point" && $B mount -o remount,bind,ro "$1$point"
    done </proc/self/mountinfo
    $B mkdir -p "$1/run/vm/io"
    $B mount --bind "$VM_WORK/io" "$1/run/vm/io"
}

vm_drain() { :; }

vm_exit() {
    echo "$1" >/run/vm/io/rc
    exit 0
}
