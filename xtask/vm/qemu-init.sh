#!/bin/busybox sh
# PID 1 of a QEMU guest, in the initramfs. The kernel passes VM_WORK from its command line.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev 2>/dev/null
exec >/dev/console 2>&1
while read -r module; do $B insmod "$module" || echo "cannot load $module"; done </boot-modules
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /lower ||
    exec $B reboot -f
LOWER=/lower
STAGE=/stage
WORK=$VM_WORK
. "$LOWER$WORK/vars.sh"
. "$LOWER$WORK/root.sh"
