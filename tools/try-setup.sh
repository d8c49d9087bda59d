#!/usr/bin/env bash
# Runs the README's commands in a fresh Debian root, as on a new machine. For maintainers, before a release.
#
#   tools/try-setup.sh trixie                 Debian 13: make quickstart, then make test
#   tools/try-setup.sh bookworm 'make setup'  Debian 12: other commands, one per argument
#
# The root contains the committed state of this checkout (HEAD). It uses this machine's pip indexes, CA certificates
# and proxy variables, but no local folders of wheels. It takes about an hour and 15 GB on disk.
#
# TRY_FOLDER=...  folder in which the root is created (default: /var/tmp)
# KEEP=1          do not remove the root at the end
# TRY_ROOT=...    use the root of an earlier run with KEEP=1 instead of a fresh one
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
die() { echo "[try-setup] $*" >&2; exit 1; }
say() { echo "[try-setup] $*"; }

# Print this machine's pip settings as variables, without local folders of wheels and constraints.
pip_variables() {
    local key value
    for key in index-url extra-index-url trusted-host proxy; do
        value=$(python3 -m pip config get "global.$key" 2>/dev/null | tr ' ' '\n' | sed '/^file:/d;/^$/d' | xargs)
        [ -z "$value" ] || echo "PIP_$(tr a-z- A-Z_ <<<"$key")=$value"
    done
    env | grep -E '^(PIP_|SSL_CERT_|[A-Za-z]+_(proxy|PROXY|CA_BUNDLE)=)' | grep -vE '^PIP_(FIND_LINKS|CONSTRAINT|CONFIG_FILE)='
}

checkout=/srv/hvd_batchgrow  # in the fresh root

make_root() {
    chmod 755 "$root"  # it becomes /, which apt's user must be able to read
    say "installing $suite in $root"
    debootstrap --variant=minbase --include=ca-certificates,git,make,python3 "$suite" "$root" >"$root.log" 2>&1 ||
        { tail -n 5 "$root.log" >&2; die "debootstrap failed: see $root.log"; }
    git clone -q --no-hardlinks "$repository" "$root$checkout"
    cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
    cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
}

# All mounts are in this process's own mount namespace and end with it, also after a failure.
mount_root() {
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
}

# Use pivot_root instead of chroot: tests/slurm enters mount namespaces, which leaves a chroot.
enter_root() {
    local passed
    mapfile -t passed < <(pip_variables)
    mkdir -p "$root/mnt/host"
    cd "$root"
    pivot_root . mnt/host
    umount --lazy /mnt/host
    cd "$checkout"
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
    [ -d "$root$checkout" ] || make_root
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
