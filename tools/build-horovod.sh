#!/usr/bin/env bash
# Builds a wheel of Horovod with our patch for the torch of an interpreter:  tools/build-horovod.sh PYTHON FOLDER
#
# Writes the wheel to FOLDER/wheel. Horovod reads its build options (HOROVOD_WITH_MPI=1 …) from the environment.
set -euo pipefail

readonly HOROVOD=0.28.1
readonly SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
patch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/horovod-$HOROVOD.patch
python=$1
cd "$2"

# tools/first-error.sh expects English. pip's wheel cache is off because it ignores these variables and torch's version.
export LC_ALL=C PIP_NO_CACHE_DIR=1 MAKEFLAGS="${MAKEFLAGS:--j$(getconf _NPROCESSORS_ONLN)}"
"$python" -m pip download -q --no-deps --no-binary :all: --no-build-isolation "horovod==$HOROVOD"
echo "$SHA256  horovod-$HOROVOD.tar.gz" | sha256sum -c --quiet
tar xzf "horovod-$HOROVOD.tar.gz"
patch -s -d "horovod-$HOROVOD" -p1 <"$patch"
"$python" -m pip wheel --no-deps --no-build-isolation -w wheel "./horovod-$HOROVOD"
