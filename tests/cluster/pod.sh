#!/bin/sh
# Runs a command as process 1 of a pod, in a root folder that has what this machine has and, on top of it, the pod's own
# mounts: /etc/hosts, /dev/termination-log, its volumes. To be started as root in namespaces of its own (unshare).
# pod.sh ROOT MODE USER HOSTNAME WORKDIR STARTED [SOURCE TARGET MODE]... -- COMMAND...
# MODE: rw or ro, first for the root folder. STARTED: a file that is made before COMMAND.
set -e
root=$1 mode=$2 user=$3 name=$4 workdir=$5 started=$6 path=$PATH
PATH=/usr/sbin:/usr/bin:/sbin:/bin
shift 6

mirror() {    # a folder that has what it has here, and in which new names can be made without making them here
    mount -t tmpfs -o mode=755 tmpfs "$root$1"
    for here in "${1%/}"/*; do
        there=$root$here
        if [ -L "$here" ]; then cp -P "$here" "$there"
        elif [ -d "$here" ]; then mkdir "$there"; mount --rbind "$here" "$there"; [ "$1" = /dev ] || limit "$there"
        elif [ -e "$here" ]; then : > "$there"; mount --bind "$here" "$there"; fi
    done
}

limit() { [ $mode = rw ] || mount -o remount,bind,ro "$1"; }

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
    mount --bind -o "$3" "$1" "$root$2"
    shift 3
done
shift
limit "$root"
: > "$started"
exec chroot --userspec="$user" --groups= "$root" env -C "$workdir" PATH="$path" "$@"
