#!/usr/bin/env bash
# Runs the README's commands in a fresh Debian root, as on a new machine. For maintainers, before a release.
#
#   tools/try-setup.sh trixie                 Debian 13: make quickstart, then make test
#   tools/try-setup.sh bookworm 'make setup'  Debian 12: other commands, one per argument
#
# The root holds the committed state of this checkout (HEAD) and nothing else of it. pip's configuration,
# the CA certificates and the proxy variables are this machine's. Takes about an hour and 15 GB on disk.
#
# TRY_FOLDER=...  where the root is made (default /var/tmp); it is removed unless KEEP=1
# TRY_ROOT=...    use this root, which an earlier run with KEEP=1 has left, instead of a fresh one
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
die() { echo "[try-setup] $*" >&2; exit 1; }
say() { echo "[try-setup] $*"; }

# Local files and folders that pip's configuration names, such as a constraints file or a folder of wheels.
pip_paths() {
    python3 -m pip config list | grep -oE "(file://)?/[^' ]+" | grep -v '^//' | sed 's,^file://,,' | sort -u
}

make_root() {
    say "installing $suite in $root"
    debootstrap --variant=minbase --include=ca-certificates,git,make,python3 "$suite" "$root" >"$root.log" 2>&1 ||
        { tail -n 5 "$root.log" >&2; die "debootstrap failed: see $root.log"; }
    git clone -q --no-hardlinks "$repository" "$root/root/hvd_batchgrow"
    copy_configuration
}

copy_configuration() {
    local path
    cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
    cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    python3 -m pip config debug | sed -n 's/^ *\(.*\), exists: True$/\1/p' | while read -r path; do
        install -D -m 644 "$path" "$root$path"
    done
}

# Every mount below is in this process's own mount namespace and ends with it, also after a failure.
mount_root() {
    local path
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
    for path in $(pip_paths); do
        if [ ! -e "$path" ] || [ -e "$root$path" ]; then continue; fi
        if [ -d "$path" ]; then mkdir -p "$root$path"; else install -D /dev/null "$root$path"; fi
        mount --bind "$path" "$root$path"
    done
}

# pivot_root instead of chroot: tests/slurm enter mount namespaces, which leads out of a chroot.
enter_root() {
    local passed=() name
    mkdir -p "$root/mnt/host"
    cd "$root"
    pivot_root . mnt/host
    umount --lazy /mnt/host
    for name in $(compgen -e | grep -E '^(PIP_.*|.*_proxy|.*_PROXY|.*_CA_BUNDLE|SSL_CERT_.*)$'); do
        passed+=("$name=${!name}")
    done
    cd /root/hvd_batchgrow
    for command in "${commands[@]}"; do
        SECONDS=0
        say "$suite: $command"
        env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TERM=dumb "${passed[@]}" \
            bash -c "$command" </dev/null || die "$suite: '$command' ended with code $? after $SECONDS s"
        say "$suite: '$command' took $SECONDS s; $(du -sxm / | cut -f1) MB on disk"
    done
}

if [ "${1:-}" = --inside ]; then  # in the namespaces
    suite=$2 root=$3
    commands=("${@:4}")
    mount --make-rprivate /
    [ -d "$root/root/hvd_batchgrow" ] || make_root
    mount_root
    enter_root
    exit
fi

[ $# -ge 1 ] || die "usage: tools/try-setup.sh trixie|bookworm [COMMAND ...]"
[ "$(id -u)" = 0 ] || die "needs root, for debootstrap and mounts"
command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
root=${TRY_ROOT:-$(mktemp -d "${TRY_FOLDER:-/var/tmp}/try-setup.$1.XXXXXX")}
[ "${KEEP:-}${TRY_ROOT:-}" ] || trap 'rm -rf "$root" "$root.log"' EXIT
suite=$1
shift
[ $# -gt 0 ] || set -- "make quickstart" "make test"
unshare --mount --pid --fork --kill-child bash "${BASH_SOURCE[0]}" --inside "$suite" "$root" "$@"
