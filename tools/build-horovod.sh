#!/usr/bin/env bash
# Builds a wheel of Horovod, patched, against a Python's torch:  tools/build-horovod.sh PYTHON FOLDER
#
# The wheel goes to FOLDER/wheel. What to build (HOROVOD_WITH_MPI=1 …) is read from the environment, by Horovod.
set -euo pipefail

readonly HOROVOD=0.28.1
readonly SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
patch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/horovod-$HOROVOD.patch
python=$1
cd "$2"

# tools/first-error.sh reads English. pip's own wheel cache knows neither these variables nor torch's version.
export LC_ALL=C PIP_NO_CACHE_DIR=1 MAKEFLAGS="${MAKEFLAGS:--j$(getconf _NPROCESSORS_ONLN)}"
"$python" -m pip download -q --no-deps --no-binary :all: --no-build-isolation "horovod==$HOROVOD"
echo "$SHA256  horovod-$HOROVOD.tar.gz" | sha256sum -c --quiet
tar xzf "horovod-$HOROVOD.tar.gz"
patch -s -d "horovod-$HOROVOD" -p1 <"$patch"
"$python" -m pip wheel --no-deps --no-build-isolation -w wheel "./horovod-$HOROVOD"
