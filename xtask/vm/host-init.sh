# PID 1 of new namespaces (mount, net, pid, uts, ipc, cgroup) on the host's own kernel.
WORK=$1
LOWER=
STAGE=/mnt
. "$WORK/vars.sh"
B=$VM_HOST_BUSYBOX
. "$WORK/root.sh"
