# PID 1 in its final root: runs the command, passes its output on, reports its exit code.
B=/run/vm/busybox
. /run/vm/vars.sh

# Says that this kernel lives, where somebody listens (guard.rs).
if [ -c "$VM_BEAT" ]; then
    while :; do
        echo
        $B sleep 5
    done >"$VM_BEAT" &
fi

if [ -n "$VM_TTY" ] && [ -n "$VM_CONSOLE" ]; then
    # The size is set on the opened console: opening one may reset it.
    $B setsid -c $B sh -c "$B stty $VM_TTY; exec /run/vm/cmd.sh" <>$VM_CONSOLE >&0 2>&0
    rc=$?
elif [ -n "$VM_TTY" ]; then
    # Namespaces have no console; a pseudo-terminal stands for it.
    script -qefc /run/vm/cmd.sh /dev/null
    rc=$?
elif [ -n "$VM_OUT" ]; then
    # The consoles may be terminals; the command must see pipes.
    $B mkfifo /run/vm/out /run/vm/err
    $B cat </run/vm/out >"$VM_OUT" &
    out=$!
    $B cat </run/vm/err >"$VM_ERR" &
    err=$!
    /run/vm/cmd.sh </dev/null >/run/vm/out 2>/run/vm/err
    rc=$?
    # What the command left behind ends here; then nobody writes to the pipes any more.
    for dir in /proc/[0-9]*; do
        pid=${dir#/proc/}
        case $pid in 1 | "$out" | "$err") ;; *) kill -9 "$pid" 2>/dev/null ;; esac
    done
    wait "$out" "$err"
else
    /run/vm/cmd.sh
    rc=$?
fi
$B sync
vm_drain
vm_exit $rc
$B sleep 10
