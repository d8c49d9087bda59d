#!/usr/bin/env bash
# Prints the line of a build log that gives the cause of the failure:  tools/first-error.sh LOG
#
# This is the compiler's first error; otherwise the first error of the linker, the compiler's driver, CMake or Python;
# otherwise the last line. pip's "error: subprocess-exited-with-error" comes before all of them and is not the cause.
set -euo pipefail

patterns=(
    '(:[0-9]+|\([0-9]+\)): (fatal )?error: '          # common.h:343:18: error: …   kernels.cu(12): error: …
    'undefined reference to |cannot find -l'
    ': fatal error: |No space left on device'        # c++: fatal error: Killed signal terminated program cc1plus
    '^ *CMake Error'
    '^ *[A-Za-z.]*(Error|Exception): '
    '^ERROR: |: FAILED$'                             # pip download; sha256sum
    '[^[:space:]]'
)
for pattern in "${patterns[@]}"; do
    line=$(grep -m 1 -E -A 1 -e "$pattern" "$1") || continue
    case $pattern in
        *CMake*) ;;  # CMake prints the reason on the next line
        '[^'*) line=$(tail -n 1 "$1") ;;
        *) line=${line%%$'\n'*} ;;
    esac
    # shellcheck disable=SC2086  # split intentionally: print one line with single spaces
    echo $line
    exit
done
echo "the log is empty"
