"""One command that checks and measures this package on a machine with a GPU: `python -m benchmarks.gpu`."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # the check may be started by any Python
    raise SystemExit(f"needs Python 3.11 or newer, and this is {sys.version.split()[0]} at {sys.executable}")
