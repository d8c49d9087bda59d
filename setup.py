"""What pyproject.toml cannot say: the C of ghost norms, without which a machine that has no compiler does too."""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildInPlace(build_ext):
    """A library comes to its place whole: neither a build beside this one nor a run that is going sees half of it."""

    def copy_file(self, infile: str, outfile: str, **options: int) -> tuple[str, bool]:  # type: ignore[override]
        """Copy under another name, and rename."""
        aside = f"{outfile}.{os.getpid()}"
        _, copied = super().copy_file(infile, aside, **options)
        if copied:
            Path(aside).replace(outfile)
        return outfile, copied


ghost_cpu = Extension(
    "hvd_batchgrow.nn._ghost_cpu",  # a plain library for ctypes, which needs none of Python's headers
    ["hvd_batchgrow/nn/ghost_cpu.c"],
    # Bits must not depend on whether the processor has fused operations.
    extra_compile_args=["-O3", "-ffp-contract=off"],
    libraries=["m"],
    optional=True,
)
setup(ext_modules=[ghost_cpu], cmdclass={"build_ext": BuildInPlace})
