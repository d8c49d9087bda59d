"""The short form of the fuzz: a few cases of every kind. make fuzz: ten thousand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.__main__ import make_world
from tests.fuzz.cases import KINDS, Make
from tests.fuzz.runner import Case, folder, run
from tests.fuzz.world import SOURCES, World

SEED = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVD_BATCHGROW_CACHE", "cache")
        yield make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_bad_input_is_reported_and_leaves_nothing(make: Make, world: World, tmp_path: Path) -> None:
    codes = set()
    for number in range(max(15, KINDS[make])):
        with folder(tmp_path / "at"):
            case = make(random.Random(f"{SEED} {number}"), world)  # noqa: S311
            outcome = run(case)
        assert not outcome.faults, f"{case.about}: {case.words}\n{outcome.text}"
        codes.add(outcome.code)
    assert codes & {1, 2}, "nothing was found wrong: what was damaged?"


@pytest.mark.parametrize("source", SOURCES)
def test_what_the_fuzz_damages_is_whole_before(source: str, world: World, tmp_path: Path) -> None:
    with folder(tmp_path / "at"):
        world.lay_out(source, Path.cwd())
        words = ["train", "small.toml", "--max-updates", "1", "--name", "other"]
        outcome = run(Case("whole", source, words, frozenset({75})))
    assert not outcome.faults, outcome.text


def test_the_fuzz_sees_what_is_wrong(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(words: list[str]) -> int:
        print("Traceback (most recent call last):")
        Path("runs/small").mkdir(parents=True)
        Path("runs/small/job.toml.writing").touch()
        return 1

    with folder(tmp_path / "at"):
        monkeypatch.setattr("tests.fuzz.runner.main", bad)
        faults = "\n".join(run(Case("bad", "", ["plan"], frozenset({2}), any_named=["optim.lr"])).faults)
    for wrong in (
        "ends with 1",
        "prints a traceback",
        "names none of",
        "leaves a temporary file",
        "part of a run folder",
    ):
        assert wrong in faults
    with folder(tmp_path / "at"):
        monkeypatch.setattr("tests.fuzz.runner.main", lambda words: 1 // 0)
        assert "ZeroDivisionError" in run(Case("bug", "", ["plan"], frozenset({0}))).faults[0]
