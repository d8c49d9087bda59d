"""Find or download Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import time
import zlib
from pathlib import Path

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.arrays import idx
from hvd_batchgrow.data.datasets.cache import cache_folder
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.messages.errors import RunError, reason_of
from hvd_batchgrow.storage.atomic import new_folder
from hvd_batchgrow.storage.file_lock import locked

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Digests of the unpacked files, which do not depend on how they were packed."""

_DEBIAN_PACKAGE = "dataset-fashion-mnist"
_DEBIAN_BYTES = 30_900_652
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Find or download Fashion-MNIST, and check it. Raises RunError as `find` and `idx.load_folder`."""
    return idx.load_folder(find(data.root, report), SHA256, data, report)


def find(root: str | None, report: ReportProgress) -> Path:
    """Return the folder of the four files; download them if they are not found.

    If `root` is given, only `root` is searched. Otherwise Debian's folder and the user's cache are searched, and then
    the cache is filled from Debian's package or, failing that, from the authors' server. Downloads are checked before
    they get their names.

    Raises:
        RunError: not found in `root`, or every download failed; the message names each attempt.
    """
    if root is not None:
        if not _is_complete(Path(root)):
            raise RunError(
                f"data.root = {root} does not contain Fashion-MNIST: {_missing(Path(root))}[.gz] is missing; "
                "without data.root, it is searched for and downloaded"
            )
        return Path(root)
    cache = cache_folder() / "fashion-mnist"
    for folder in (_DEBIAN_FOLDER, cache):
        if _is_complete(folder):
            return folder
    try:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(cache.with_suffix(".lock")):  # the first rank of a host downloads, the others wait
            if not _is_complete(cache):
                _fetch_into(cache, report)
    except OSError as error:
        raise RunError(f"cache {cache.parent}: {reason_of(error)}; another: HVD_BATCHGROW_CACHE=…") from None
    return cache


def _fetch_into(cache: Path, report: ReportProgress) -> None:
    failures = []
    for fetch in (_fetch_with_apt, _fetch_from_authors):
        try:
            with new_folder(cache) as folder:
                fetch(folder, report)
                _check(folder)
                shutil.rmtree(cache, ignore_errors=True)
            return
        except (OSError, EOFError, zlib.error, subprocess.SubprocessError, RunError) as error:
            failures.append(f"{fetch.__name__.removeprefix('_fetch_').replace('_', ' ')}: {error}")
    raise RunError(
        "Fashion-MNIST could not be downloaded:\n  " + "\n  ".join(failures) + "\n  "
        "put its four files into a folder and pass --data.root FOLDER"
    )


def _fetch_with_apt(folder: Path, report: ReportProgress) -> None:
    """Download and unpack the package without installing it, which needs no root rights."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise RunError("apt-get is not installed")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        package = _download(Path(work), report)
        subprocess.run(["dpkg", "-x", package, work], check=True, capture_output=True)
        for name in SHA256:
            (Path(work) / _DEBIAN_FOLDER.relative_to("/") / f"{name}.gz").rename(folder / f"{name}.gz")


def _download(work: Path, report: ReportProgress) -> Path:
    """Return Debian's package, downloaded into a folder."""
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", _DEBIAN_PACKAGE]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as download:
        while download.poll() is None:
            done = sum(path.stat().st_size for path in work.glob("*.deb"))
            report(f"fetching {_DEBIAN_PACKAGE}", done, _DEBIAN_BYTES)
            time.sleep(0.1)  # the size of the file is the only progress that apt-get shows
        _, message = download.communicate()
    packages = list(work.glob("*.deb"))
    if download.returncode or not packages:
        raise RunError(
            message.strip().splitlines()[-1] if message.strip() else f"apt-get ended with {download.returncode}"
        )
    report(f"fetching {_DEBIAN_PACKAGE}", _DEBIAN_BYTES, _DEBIAN_BYTES)
    return packages[0]


def _fetch_from_authors(folder: Path, report: ReportProgress) -> None:
    import urllib.request  # slow to import

    for name in SHA256:
        with urllib.request.urlopen(f"{_URL}/{name}.gz", timeout=30) as answer:  # noqa: S310  # checked by SHA-256
            total = int(answer.headers.get("Content-Length", 0))
            with (folder / f"{name}.gz").open("wb") as file:
                while block := answer.read(1 << 16):
                    file.write(block)
                    report(f"fetching {name}.gz", file.tell(), total)


def _check(folder: Path) -> None:
    for name, expected in SHA256.items():
        path = folder / f"{name}.gz"
        found = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        if found != expected:
            raise RunError(f"{path.name} has SHA-256 {found[:16]}…, not {expected[:16]}…")


def _is_complete(folder: Path) -> bool:
    return _missing(folder) is None


def _missing(folder: Path) -> str | None:
    for name in SHA256:
        if not ((folder / name).exists() or (folder / f"{name}.gz").exists()):
            return name
    return None
