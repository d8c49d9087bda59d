"""What a run opens, and what it does not run."""

from __future__ import annotations

import ast
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hvd_batchgrow
from hvd_batchgrow.cli import main
from hvd_batchgrow.data.cache import cached_arrays
from hvd_batchgrow.train.checkpoint import Checkpoint, checkpoint_paths, write_checkpoint

SOURCES = sorted(Path(hvd_batchgrow.__file__).parent.rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _calls(tree: ast.AST) -> list[tuple[str, dict[str, str]]]:
    return [
        (ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


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


def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        cached_arrays("test", "it", 1, lambda: {"a": np.arange(3)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache" / "data").stat().st_mode) == 0o700


def test_what_a_run_folder_names_is_not_imported(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("planted.py").write_text("open('imported', 'w')\n")
    assert main(["train", job, "--updates", "2"]) == 75
    run = Path("runs/small")
    (path,) = checkpoint_paths(run / "checkpoints")
    good = Checkpoint.from_bytes(path.read_bytes())
    write_checkpoint(path.parent, replace(good, deciding=good.deciding | {"model.name": "planted:Net"}), 9, ())
    text = (run / "job.toml").read_text()
    (run / "job.toml").write_text(text.replace('"small_conv_net"', '"planted:Net"').replace('"idx"', '"planted:data"'))
    assert main(["train", job, "--resume", "auto"]) == 1
    assert "model.name: was 'planted:Net', is 'small_conv_net'" in capsys.readouterr().err
    assert not Path("imported").exists()
