#!/usr/bin/env bash
# Process 1 of a virtual host, already in separate namespaces:  boot_host.sh NAME FOLDER [SHARED ...]
set -euo pipefail

hostname "$1"
mount --make-rprivate /
# What a host has for itself; all else is shared by the hosts, as on a cluster's file system.
mount -t tmpfs -o mode=755 none /mnt
mkdir /mnt/cluster
mount --bind "$2" /mnt/cluster
# A checkout may be in one of the places that are emptied next: keep hold of it, and mount it there again.
for shared in "${@:3}"; do
    held=/mnt/shared$shared
    mkdir -p "$held"
    mount --bind "$shared" "$held"
done
for place in /tmp /run /dev/shm; do mount -t tmpfs -o mode=1777 none "$place"; done
chmod 755 /run
for shared in "${@:3}"; do
    mkdir -p "$shared"
    mount --bind "/mnt/shared$shared" "$shared"
done
mkdir -p /run/munge /run/slurm /run/sshd
mount --bind /mnt/cluster/hosts /etc/hosts
mount -t sysfs none /sys # so that /sys/class/net shows the interfaces of this host
touch /run/booted

# bash reaps whatever daemons leave to process 1
while :; do
    sleep 3600 &
    wait "$!" || true
done
