#!@BUSYBOX@ sh
# PID 1 of a User Mode Linux guest, run from the host's root file system (hostfs, read-only).
WORK=${0%/*}
LOWER=
STAGE=/mnt
. "$WORK/vars.sh"
B=$VM_HOST_BUSYBOX
. "$WORK/root.sh"
