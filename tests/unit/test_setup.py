"""tools/setup.sh where Horovod does not build, the error that it shows, and which C++ our patch builds with."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")

PYTHON = """#!/bin/sh
# A virtual environment's Python: all is installed but Horovod. Each attempt to install torch is logged.
here=$(dirname "$0")
case "$*" in
    *horovod.torch*) exit 1 ;;
    *torch.__version__*) cat "$here/torch" ;;
    *pip*torchvision==*) echo "$*" >>"$here/torchvision-calls"; [ ! -e "$here/torchvision-missing" ] ;;
    *metadata*torchvision*) cat "$here/torchvision-version" 2>/dev/null ;;
    *pip*torch==*+cpu*) echo "$*" >>"$here/calls"; exit 1 ;;
    *pip*torch==*) echo "$*" >>"$here/calls"; echo 2.13.0+cu130 >"$here/torch" ;;
esac
"""

BUILD = """#!/bin/sh
# What pip prints when Horovod's CMake fails, with the compiler's own words.
cd "$2"
echo 'int main() { return std::string("no header"); }' >broken.cpp
echo '  error: subprocess-exited-with-error'
echo '  [ 12%] Building CXX object CMakeFiles/pytorch.dir/broken.cpp.o'
c++ -c broken.cpp
echo '  gmake[2]: *** [CMakeFiles/pytorch.dir/build.make:76: broken.cpp.o] Error 1'
echo "  subprocess.CalledProcessError: Command '['cmake', '--build', '.']' returned non-zero exit status 2."
echo 'ERROR: Failed to build one or more wheels'
exit 1
"""


def first_error(log: str, folder: Path) -> str:
    (folder / "log").write_text(log)
    words = ["bash", str(ROOT / "tools" / "first-error.sh"), str(folder / "log")]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.rstrip("\n")


PIP = "  error: subprocess-exited-with-error\n  × Building wheel for horovod did not run successfully.\n"
END = "  RuntimeError: CMake failed\nERROR: Failed to build one or more wheels\n"


@pytest.mark.parametrize(
    ("before", "expected", "after"),
    [
        ("a.h:1:2: warning: error: is a word", "a.h:343:18: error: no member", "b.cc:1:1: error: another"),
        ("", "a.cc:3:10: fatal error: mpi.h: No such file or directory", "compilation terminated."),
        ("", "kernels.cu(12): error: no operator matches", ""),
        ("ld: a.o: in function f:", "a.cc:(.text+0x9): undefined reference to `g()'", "collect2: error: ld returned 1"),
        ("[ 12%] Building", "c++: fatal error: Killed signal terminated program cc1plus", "gmake: *** Error 1"),
        ("", "ModuleNotFoundError: No module named 'packaging'", ""),
    ],
)
def test_the_first_error_of_a_build_is_its_cause(before: str, expected: str, after: str, tmp_path: Path) -> None:
    log = f"{PIP}  {before}\n  {expected}\n  {after}\n{END}"
    assert first_error(log, tmp_path) == expected


def test_the_reason_of_a_cmake_error_is_on_its_next_line(tmp_path: Path) -> None:
    log = f"{PIP}  CMake Error at CMakeLists.txt:1 (find_package):\n    Could NOT find MPI\n{END}"
    assert first_error(log, tmp_path) == "CMake Error at CMakeLists.txt:1 (find_package): Could NOT find MPI"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("Retrying\nERROR: No matching distribution\n", "ERROR: No matching distribution"),
        ("horovod-0.28.1.tar.gz: FAILED\nsha256sum: WARNING: 1 computed\n", "horovod-0.28.1.tar.gz: FAILED"),
        ("begun\n  killed\n", "killed"),
        ("", "the log is empty"),
    ],
)
def test_what_ends_a_build_before_the_compiler_is_shown_as_well(log: str, expected: str, tmp_path: Path) -> None:
    assert first_error(log, tmp_path) == expected


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What tools/setup.sh reads, with a stand-in for .venv's Python and a build of Horovod that fails."""
    checkout = tmp_path / "check out"
    for name in ("tools", "hvd_batchgrow/nn/ghost", ".venv/bin"):
        (checkout / name).mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "hvd_batchgrow/nn/ghost/ghost_cpu.c"):
        shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(ROOT / "tools", checkout / "tools", dirs_exist_ok=True)
    for path, text in ((".venv/bin/python", PYTHON), ("tools/build-horovod.sh", BUILD)):
        (checkout / path).write_text(text)
        (checkout / path).chmod(0o755)
    (checkout / ".venv" / "bin" / "torch").write_text("2.13.0+cpu\n")
    (checkout / ".venv" / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    return checkout


def set_up(checkout: Path, purpose: str, **variables: str) -> subprocess.CompletedProcess[str]:
    cache = {"HVD_BATCHGROW_CACHE": str(checkout / "cache"), "HVD_BATCHGROW_MPI": "system"}
    environment = {**os.environ, **cache, **variables}
    words = ["bash", "tools/setup.sh", purpose]
    return subprocess.run(words, check=False, cwd=checkout, env=environment, capture_output=True, text=True)


@needs_compiler
@pytest.mark.skipif(not shutil.which("mpicc"), reason="needs Open MPI")
def test_a_set_up_is_complete_without_horovod_and_shows_the_compilers_first_error(checkout: Path) -> None:
    done = set_up(checkout, "train")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    error = next(k for k, line in enumerate(lines) if "The first error:" in line) + 1
    assert "broken.cpp:1:" in lines[error]
    assert "error: " in lines[error]
    assert "std" in lines[error]
    assert "under mpirun, srun and torchrun, ranks communicate through torch.distributed" in done.stdout
    assert "ready: torch 2.13.0+cpu, no Horovod 0.28.1" in done.stdout
    assert "broken.cpp" in (checkout / "cache" / "horovod-failed.log").read_text()

    again = set_up(checkout, "train")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert "Horovod is not installed because it did not build; to build it again: rm .venv/.setup-train" in again.stdout


@needs_compiler
@pytest.mark.skipif(not shutil.which("mpicc"), reason="needs Open MPI")
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck, or the set-up would install it")
def test_a_set_up_for_the_tests_fails_without_horovod(checkout: Path) -> None:
    done = set_up(checkout, "test")
    assert done.returncode == 1
    assert "broken.cpp:1:" in done.stdout
    assert "the tests need Horovod" in done.stderr
    assert not (checkout / ".venv" / ".setup-test").exists()


@needs_compiler
@pytest.mark.skipif(not shutil.which("mpicc"), reason="needs Open MPI")
@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="with a GPU the CUDA build is the first choice")
def test_the_cuda_build_of_torch_serves_where_no_index_has_the_cpu_build(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "torch").unlink()
    done = set_up(checkout, "train")
    assert done.returncode == 0, done.stdout + done.stderr
    configured, own, cuda = (checkout / ".venv" / "bin" / "calls").read_text().splitlines()
    assert "torch==2.13.0+cpu" in configured
    assert "--timeout 10" in own
    assert "whl/cpu" in own
    assert cuda.endswith(" torch==2.13.0")
    assert "installing the CUDA build of torch 2.13.0 instead: it also trains on the CPU" in done.stdout
    assert "ready: torch 2.13.0+cu130" in done.stdout


@needs_compiler
@pytest.mark.skipif(not shutil.which("mpicc"), reason="needs Open MPI")
@pytest.mark.parametrize(
    ("torch", "torchvision"), [("2.13.0", "0.28.0"), ("2.6.0", "0.21.0"), ("2.14.1", "0.29.1")]
)  # the pairs that PyTorch has released
def test_the_torchvision_of_torchs_cpu_build_is_looked_for_where_torch_is(
    checkout: Path, torch: str, torchvision: str
) -> None:
    (checkout / ".venv" / "bin" / "torch").write_text(f"{torch}+cpu\n")
    (checkout / ".venv" / "bin" / "torchvision-missing").touch()
    done = set_up(checkout, "train", HVD_BATCHGROW_TORCH=torch, HVD_BATCHGROW_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    configured, own = (checkout / ".venv" / "bin" / "torchvision-calls").read_text().splitlines()
    assert configured.endswith(f"--no-deps torchvision=={torchvision}+cpu")
    assert "--timeout 10" in own
    assert "whl/cpu" in own
    assert f"provide torchvision {torchvision}+cpu: it is needed only if your own modules import it" in done.stdout


@needs_compiler
@pytest.mark.skipif(not shutil.which("mpicc"), reason="needs Open MPI")
@pytest.mark.parametrize(("torch", "torchvision"), [("2.13.0+cpu", "0.28.0+cpu"), ("2.13.0+cu130", "0.28.0")])
def test_a_torchvision_that_fits_stays(checkout: Path, torch: str, torchvision: str) -> None:
    for name, text in (("torch", torch), ("torchvision-version", torchvision)):
        (checkout / ".venv" / "bin" / name).write_text(f"{text}\n")
    done = set_up(checkout, "train", HVD_BATCHGROW_CUDA="0" if torch.endswith("+cpu") else "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (checkout / ".venv" / "bin" / "torchvision-calls").exists()


def test_the_conda_environment_has_every_dependency_of_the_package() -> None:
    names = {"matplotlib": "matplotlib-base", "torch": "pytorch-gpu"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = (ROOT / "tools/conda-environment.yml").read_text()
    for requirement in project["dependencies"]:
        name, _, version = requirement.partition(">=")
        wanted = names.get(name, name) + ("" if name == "torch" else f">={version}")
        assert f"\n  - {wanted}\n" in environment


def test_a_python_that_is_too_old_is_refused_with_the_remedy(checkout: Path) -> None:
    old = checkout / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = set_up(checkout, "train", PYTHON=str(old))
    assert done.returncode == 1
    assert "Python 3.11 or newer is missing: sudo apt-get install python3" in done.stderr


def test_the_tests_are_not_set_up_with_another_torch(checkout: Path) -> None:
    done = set_up(checkout, "test", HVD_BATCHGROW_TORCH="2.6.0")
    assert done.returncode == 1
    assert "the tests need torch 2.13.0: unset HVD_BATCHGROW_TORCH" in done.stderr


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs CMake")
@pytest.mark.parametrize(
    ("torch", "standard"),  # std::strong_ordering is in torch's headers from 2.14 on
    [("2.6.0+cu124", 17), ("2.13.0+cpu", 17), ("2.14.0", 20), ("2.14.1+cu130", 20), ("2.15.0a0+git1", 20), ("3.0", 20)],
)
def test_our_patch_builds_horovod_in_the_c_plus_plus_that_torch_needs(
    torch: str, standard: int, tmp_path: Path
) -> None:
    patch = (ROOT / "tools" / "horovod-0.28.1.patch").read_text()
    added = "\n".join(line[1:] for line in patch.partition("--- a/horovod")[0].splitlines() if line.startswith("+"))
    (tmp_path / "python").write_text(f"#!/bin/sh\necho '{torch}'\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "script").write_text(
        f'set(PY_EXE "{tmp_path}/python")\n{added.partition("CMakeLists.txt")[2]}\nmessage("${{CMAKE_CXX_STANDARD}}")\n'
    )
    done = subprocess.run(["cmake", "-P", str(tmp_path / "script")], check=True, capture_output=True, text=True)
    assert done.stderr == f"{standard}\n"
