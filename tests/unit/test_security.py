"""A run loads no pickle and executes no code from files that it opens."""

from __future__ import annotations

import ast
import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import hvd_batchgrow
from hvd_batchgrow.cli import main
from hvd_batchgrow.data.datasets.cache import cached_arrays
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths, write_checkpoint

SOURCES = sorted(Path(hvd_batchgrow.__file__).parent.rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _calls(tree: ast.AST) -> list[tuple[str, dict[str, str]]]:
    return [
        (ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


@pytest.mark.slow
def test_no_pickle_is_loaded() -> None:
    loads = 0
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        imported = {
            name.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [*node.names, ast.alias(getattr(node, "module", None) or "")]
        }
        assert not imported & UNPICKLERS, path
        for function, words in _calls(tree):
            if function == "torch.load":
                assert words["weights_only"] == "True", path
                loads += 1
            if function == "np.load":
                assert words.get("allow_pickle", "False") == "False", path  # its default
                loads += 1
            assert function not in {"eval", "exec", "os.system"}, path
            assert words.get("shell") != "True", path
    assert loads >= 2, "the test has found nothing to look at"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the only cache."""
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert cached().tolist() == [0, 1, 2]
    (folder,) = (tmp_path / "cache" / "data").glob("test-????????????????")
    return folder


def cached() -> NDArray[Any]:
    return cached_arrays("test", "it", 1, lambda: {"a": np.arange(3)})["a"]


def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        cached()
    finally:
        os.umask(before)
    for folder in (tmp_path / "cache", tmp_path / "cache" / "data"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


class _Planted:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("planted",)


def _pickled(folder: Path) -> None:
    np.save(folder / "a.npy", np.array([_Planted()], dtype=object), allow_pickle=True)


def _bare_pickle(folder: Path) -> None:
    (folder / "a.npy").write_bytes(pickle.dumps(_Planted()))


def _cut(folder: Path) -> None:
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-1])


def _header(folder: Path) -> None:
    (folder / "a.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': (")


def _other_shape(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(7))


def _other_type(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(3.0))


def _link(folder: Path) -> None:
    np.save(folder.parent / "elsewhere.npy", np.arange(3, 6))
    (folder / "a.npy").unlink()
    (folder / "a.npy").symlink_to(folder.parent / "elsewhere.npy")


def _link_to_all(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    np.save(folder.parent / "elsewhere" / "a.npy", np.arange(3, 6))
    folder.symlink_to(folder.parent / "elsewhere")


def _one_more(folder: Path) -> None:
    np.save(folder / "b.npy", np.arange(3))


def _none(folder: Path) -> None:
    (folder / "a.npy").unlink()


def _no_stamp(folder: Path) -> None:
    (folder / "stamp.json").write_bytes(b"\xff")


@pytest.mark.parametrize(
    "plant",
    [
        _pickled,
        _bare_pickle,
        _cut,
        _header,
        _other_shape,
        _other_type,
        _link,
        _link_to_all,
        _one_more,
        _none,
        _no_stamp,
    ],
)
def test_a_changed_cache_is_rebuilt(cache: Path, plant: Callable[[Path], None]) -> None:
    plant(cache)
    assert cached().tolist() == [0, 1, 2]
    assert not Path("planted").exists()
    assert not cache.is_symlink()
    assert sorted(path.name for path in cache.iterdir()) == ["a.npy", "stamp.json"]
    if (elsewhere := cache.parent / "elsewhere").exists():
        assert np.load(elsewhere / "a.npy").tolist() == [3, 4, 5], "what a link leads to is not ours to change"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_can_write_is_refused(cache: Path, mode: int) -> None:
    cache.parent.chmod(mode)
    with pytest.raises(RunError, match=rf"can be written by others \(mode {mode:04o}\).*chmod 700 {cache.parent}"):
        cached()


def test_a_cache_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(RunError, match=rf"belongs to user {cache.stat().st_uid}, who could .*HVD_BATCHGROW_CACHE="):
        cached()


def test_what_a_run_folder_names_is_not_imported(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("planted.py").write_text("open('imported', 'w')\n")
    assert main(["train", job, "--max-updates", "2"]) == 75
    run = Path("runs/small")
    (path,) = checkpoint_paths(run / "checkpoints")
    good = Checkpoint.from_bytes(path.read_bytes())
    write_checkpoint(path.parent, replace(good, deciding=good.deciding | {"model.name": "planted:Net"}), 9, ())
    text = (run / "job.toml").read_text()
    (run / "job.toml").write_text(text.replace('"small_conv_net"', '"planted:Net"').replace('"idx"', '"planted:data"'))
    assert main(["train", job, "--resume", "auto"]) == 1
    assert "model.name: was 'planted:Net', is 'small_conv_net'" in capsys.readouterr().err
    assert not Path("imported").exists()
