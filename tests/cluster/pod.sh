#!/bin/sh
# Runs a command as process 1 of a pod, in a root folder that has what this machine has and, on top of it, the pod's own
# mounts: /etc/hosts, /dev/termination-log and its volumes. To be started as root in namespaces of its own (unshare).
# pod.sh ROOT HOSTNAME WORKDIR STARTED [SOURCE TARGET]... -- COMMAND...     STARTED: a file that is made before COMMAND
set -e
root=$1 name=$2 workdir=$3 started=$4 path=$PATH
PATH=/usr/sbin:/usr/bin:/sbin:/bin
shift 4

mirror() {    # a folder that has what it has here, and in which new names can be made without making them here
    mount -t tmpfs -o mode=755 tmpfs "$root$1"
    for here in "${1%/}"/*; do
        there=$root$here
        if [ -L "$here" ]; then cp -P "$here" "$there"
        elif [ -d "$here" ]; then mkdir "$there"; mount --rbind "$here" "$there"
        elif [ -e "$here" ]; then : > "$there"; mount --bind "$here" "$there"; fi
    done
}

make_mount_point() {
    parent=$2
    while [ ! -d "$root$parent" ]; do parent=$(dirname "$parent"); done
    if [ "$root$parent" -ef "$parent" ]; then mirror "$parent"; fi
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$root$(dirname "$2")"; : > "$root$2"; fi
}

mirror /
mirror /dev
mount -t proc proc "$root/proc"
hostname "$name"
while [ "$1" != -- ]; do
    [ -e "$root$2" ] || make_mount_point "$1" "$2"
    mount --bind "$1" "$root$2"
    shift 2
done
shift
: > "$started"
exec chroot "$root" env -C "$workdir" PATH="$path" "$@"
