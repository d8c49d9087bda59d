"""The program of docs/library.md, as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_forms import ENVIRONMENT, FORMS

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    programs = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (text,) = [text for text in programs if text.startswith('"""train_mine.py')]
    path = tmp_path_factory.mktemp("library") / "train_mine.py"
    path.write_text(text)
    return path


def run(program: Path, form: str) -> tuple[str, str]:
    done = subprocess.run(
        [*FORMS[form], sys.executable, str(program)],
        check=True,
        cwd=program.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (digest,) = re.findall(r"\b[0-9a-f]{64}\b", done.stdout)
    return digest, done.stderr + done.stdout


def test_it_learns_and_two_ranks_end_with_the_bits_of_one(program: Path) -> None:
    digest, text = run(program, "one")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
    assert "sample 3072: batch 256" in text
    for form in ("mpirun", "horovodrun-gloo"):
        assert run(program, form)[0] == digest
