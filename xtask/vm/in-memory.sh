#!/bin/sh
# Runs a command of a QEMU guest in a root that is memory alone, and ends the guest with its exit
# code. For what a guest's root, which is the host's by 9p, does not survive, such as suspension:
#
#   cargo xtask vm --backend tcg --kernel 6.12 --mem 4096 --env WEIR_MAY_SLEEP=1 -- \
#       sh xtask/vm/in-memory.sh $PWD/target/debug/deps/lab-HASH asleep --nocapture
#
# The command's program, weir's own beside it, and what the lab calls are copied with their libraries.
set -e
ROOT=/run/memory
B=/run/vm/busybox
mkdir -p $ROOT
mount -t tmpfs -o size=75% memory $ROOT
cd "$(dirname "$0")/../.."
for folder in proc sys dev run/netns run/vm tmp etc root var/lib usr/bin usr/sbin usr/lib usr/lib64; do
    mkdir -p "$ROOT/$folder"
done
mkdir -p "$ROOT$PWD/results"
for link in bin sbin lib lib64; do [ -e $ROOT/$link ] || ln -s usr/$link $ROOT/$link; done
for file in passwd group nsswitch.conf hosts protocols services iproute2 ssl; do
    [ ! -e /etc/$file ] || cp -aL /etc/$file $ROOT/etc/
done
take() {
    mkdir -p "$ROOT$(dirname "$1")"
    cp -L "$1" "$ROOT$1"
    for library in $(ldd "$1" 2>/dev/null | grep -o '/[^ ]*'); do
        mkdir -p "$ROOT$(dirname "$library")"
        cp -L "$library" "$ROOT$library"
    done
}
command=$1
for name in weir weir-coordinator weir-relay; do
    take "$PWD/target/debug/$name"
    strip -g "$ROOT$PWD/target/debug/$name"
done
take "$command"
strip -g "$ROOT$command"
for name in sh ip nft conntrack wg sysctl ping tcpdump tc ss bpftool; do
    program=$(command -v $name) && take "$program" || echo "in-memory: no $name" >&2
done
cp $B $ROOT/run/vm/busybox
for name in $($B --list); do
    [ -e "$ROOT/usr/bin/$name" ] || [ -e "$ROOT/usr/sbin/$name" ] || ln -s $B "$ROOT/usr/bin/$name"
done
mount -t proc proc $ROOT/proc
mount --rbind /sys $ROOT/sys
mount --rbind /dev $ROOT/dev
cat >$ROOT/end.sh <<END
cd $PWD
"\$@"
rc=\$?
$B sleep 1
echo \$rc >"\$(echo /dev/vport*p3)"
$B reboot -f
END
exec chroot $ROOT /bin/sh /end.sh "$@"
