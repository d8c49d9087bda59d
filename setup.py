"""What pyproject.toml cannot say: the batch scripts, which are not in the package's folder, and the C of ghost norms.

A machine without a compiler does without the C.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class BuildInPlace(build_ext):
    """A library comes to its place whole: neither a build beside this one nor a run that is going sees half of it."""

    def copy_file(self, infile: str, outfile: str, **options: int) -> tuple[str, bool]:  # type: ignore[override]
        """Copy under another name, and rename."""
        aside = f"{outfile}.{os.getpid()}"
        _, copied = super().copy_file(infile, aside, **options)
        if copied:
            Path(aside).replace(outfile)
        return outfile, copied


class BuildWithTemplates(build_py):
    """The batch scripts of `slurm/` go into a wheel as `hvd_batchgrow/slurm/templates`, where `submit` finds them."""

    def run(self) -> None:
        """Copy the packages, and then the scripts; an editable install reads them where they are."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "hvd_batchgrow" / "slurm" / "templates"
        self.mkpath(str(folder))
        for script in sorted(Path("slurm").iterdir()):
            self.copy_file(str(script), str(folder / script.name))


ghost_cpu = Extension(
    "hvd_batchgrow.nn.ghost._ghost_cpu",  # a plain library for ctypes, which needs none of Python's headers
    ["hvd_batchgrow/nn/ghost/ghost_cpu.c"],
    # Bits must not depend on whether the processor has fused operations.
    extra_compile_args=["-O3", "-ffp-contract=off"],
    libraries=["m"],
    optional=True,
)
setup(ext_modules=[ghost_cpu], cmdclass={"build_ext": BuildInPlace, "build_py": BuildWithTemplates})
