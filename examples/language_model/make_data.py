"""Write the bytes of a Debian package's documentation as tokens: data/train.bin and data/test.bin, uint16.

The text is Perl's documentation in pod format, from the package perl-modules-5.*, which git and many others depend on.
Three whole files are the test text; the training text contains no part of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

FOLDER, PACKAGE = Path("/usr/share/perl"), "perl-modules-5.36"
CONTEXT, NUM_WINDOWS = 64, 5120
"""`data.context` and `data.num_samples` of job.toml."""
TEST = ("ExtUtils/MakeMaker/FAQ.pod", "Test/Tutorial.pod", "Pod/Simple.pod")
SIMILAR = "CPAN/Meta/History/"
"""Versions of one specification, which repeat each other."""


def texts() -> dict[str, bytes]:
    """Return the text of each file, by its path below the folder of Perl's version, in the order of the paths."""
    found: dict[str, bytes] = {}
    for version in sorted(path for path in FOLDER.glob("5.*.*") if path.is_dir()):
        found |= {str(path.relative_to(version)): path.read_bytes() for path in version.rglob("*.pod")}
    return {name: found[name] for name in sorted(found) if not name.startswith(SIMILAR)}


def main() -> None:
    """Write both files, the same each time for a version of the package."""
    found = texts()
    train, test = (b"".join(found[n] for n in found if (n in TEST) == held_out) for held_out in (False, True))
    needed = CONTEXT * NUM_WINDOWS + 1  # the token after the last window is a target too
    if len(train) < needed or not set(TEST) <= set(found):
        fault = (
            f"{FOLDER} has {len(found)} files *.pod with {len(train):,} bytes besides the test text {', '.join(TEST)}"
        )
        sys.exit(f"{fault}; {needed:,} are needed: apt-get install {PACKAGE} (Debian 12), or another text")
    Path("data").mkdir(exist_ok=True)
    for name, text in (("train", train[:needed]), ("test", test)):
        np.frombuffer(text, np.uint8).astype(np.uint16).tofile(f"data/{name}.bin")


if __name__ == "__main__":
    main()
