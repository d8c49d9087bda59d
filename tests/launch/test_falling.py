"""A batch that falls and grows again, on one rank and two, stopped in a phase and where the batch falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from hvd_batchgrow.verification.audit import audit, read_consumed
from hvd_batchgrow.verification.digest import Weights, compare_weights, final_weights
from tests.helpers import small_source, write_idx_folder
from tests.launch.test_forms import run
from tests.unit.test_falling import falling_tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("falling")
    root = write_idx_folder(folder / "data", small_source())
    (folder / "falling.toml").write_text(tomli_w.dumps(falling_tree(root, layout={"exact": True})))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Weights:
    done = run(folder, "one", "train", "falling.toml", "--name", "whole")
    assert done.returncode == 0, done.stderr
    return final_weights(folder / "runs" / "whole")


@pytest.mark.parametrize("form", ["mpirun", "mpirun-torch"])
def test_two_ranks_change_no_bit(folder: Path, whole: Weights, form: str) -> None:
    done = run(folder, form, "train", "falling.toml", "--name", form)
    assert done.returncode == 0, done.stderr
    assert compare_weights(whole, final_weights(folder / "runs" / form)) == "bit-identical"


@pytest.mark.parametrize(
    ("updates", "forms"),
    [(3, ("one", "mpirun")), (7, ("mpirun", "one"))],
    ids=["in a phase, then on more ranks", "where the batch falls, then on fewer ranks"],
)
def test_a_resume_on_other_ranks_changes_no_bit(
    folder: Path, whole: Weights, updates: int, forms: tuple[str, str]
) -> None:
    name = f"{forms[0]}-{updates}"
    stopped = run(folder, forms[0], "train", "falling.toml", "--name", name, "--max-updates", str(updates))
    assert stopped.returncode == 75, stopped.stderr
    done = run(folder, forms[1], "train", "falling.toml", "--name", name, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert compare_weights(whole, final_weights(folder / "runs" / name)) == "bit-identical"
    assert audit(read_consumed(folder / "runs" / name), lambda *_: None).passed
