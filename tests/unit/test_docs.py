"""What the documents point at is there."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from hvd_batchgrow.config import Job
from hvd_batchgrow.data.sources.specs import known_num_samples
from hvd_batchgrow.job_file import load_job, parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.cost.probe_file import subject_of
from hvd_batchgrow.schedule.plan import compile_plan
from tests.helpers import job_tree, small_job

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


def test_the_jobs_and_tools_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\b(?:jobs|tools|docs|tests)/[\w./-]*\w", text))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_no_gap_is_left_to_be_filled() -> None:
    for page in PAGES:
        assert not re.findall(r"^[A-Z_]{4,}$", page.read_text(), flags=re.MULTILINE), page.name


def test_the_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)) <= targets


def test_the_page_on_cost_names_the_keys_that_a_probe_is_bound_to() -> None:
    text = (ROOT / "docs" / "cost.md").read_text()
    section = text[text.index("## Which jobs a probe is good for") : text.index('## grow_by = "auto"')]
    assert set(re.findall(r"`([a-z]+\.[a-z_]+)`", section)) == set(subject_of(small_job()))


def keys_by_section() -> dict[str, set[str]]:
    """Keys of every model that a section may follow."""
    sections: dict[str, set[str]] = {}
    for section, field in Job.model_fields.items():
        models = get_args(field.annotation) or (field.annotation,)
        keys = {key for m in models if isinstance(m, type) and issubclass(m, BaseModel) for key in m.model_fields}
        if keys:
            sections[section] = keys
    return sections


def test_the_whole_job_of_the_page_can_be_planned(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "job-file.md").read_text()
    (tmp_path / "photos.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    job = load_job(tmp_path / "photos.toml")
    plan = compile_plan(job, ranks=2, num_samples=known_num_samples(job.data))
    assert [phase.global_batch for phase in plan.schedule.phases] == [64, 128, 192]


def test_the_keys_that_the_readme_calls_required_are() -> None:
    text = (ROOT / "README.md").read_text().split("Required are")[1].split(";")[0]
    said = re.findall(r"`([\w.]+)`", text)
    for key in said:
        tree = job_tree("data")
        section, _, name = key.rpartition(".")
        del (tree[section] if section else tree)[name]
        with pytest.raises(JobError, match=re.escape(key)):
            parse_job(tree)
    least: dict[str, Any] = {"name": "least", "data": {}, "model": {}, "optim": {}, "schedule": {}}
    for section, _, name in (key.rpartition(".") for key in said[1:]):
        least[section][name] = job_tree("data")[section][name]
    assert parse_job(least).name == "least"


def test_every_key_of_the_job_file_is_described() -> None:
    text = (ROOT / "docs" / "job-file.md").read_text().split("## Policies")[0]
    for section, keys in keys_by_section().items():
        table = text.split(f"**`[{section}]`**")[1].split("**`[")[0]
        rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, flags=re.MULTILINE)
        assert {key for row in rows for key in re.findall(r"\w+", row)} == keys, section
    assert keys_by_section().keys() | {"name", "seed"} == Job.model_fields.keys()


def test_every_known_defect_has_a_test_that_exists() -> None:
    rows = re.findall(r"^\| ([a-z]) \|(.*)$", (ROOT / "docs" / "defects.md").read_text(), flags=re.MULTILINE)
    assert "".join(letter for letter, _ in rows) == "abcdefghijklmnopqrstuvwx"
    for letter, row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, letter
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{letter}: {file}::{name}"


def test_every_promise_of_reliability_has_a_test_that_exists() -> None:
    tables = (ROOT / "docs" / "reliability.md").read_text().split("| promise | test |\n|---|---|\n")[1:]
    promises = [row for table in tables for row in table.split("\n\n")[0].strip().splitlines()]
    assert len(promises) >= 20
    for row in promises:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_every_line_of_what_is_supported_has_a_test_that_exists() -> None:
    lines = (ROOT / "docs" / "supported.md").read_text().splitlines()
    rows = [line for line, after in pairwise([*lines, ""]) if line.startswith("| ") and not after.startswith("|---")]
    assert len(rows) >= 60
    defined = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    zoo = "\n".join(path.read_text() for path in (ROOT / "tests/fuzz/zoo").glob("*.py"))
    for row in rows:
        cell = row.rstrip("| ").rpartition("|")[2]
        files, names = re.findall(r"tests/[\w/]+\.py", cell), re.findall(r"\btest_\w+\b(?!\.py)", cell)
        networks = [name for name in re.findall(r"`(\w+)`", cell) if not name.startswith("test_")]
        assert files or names or networks or "the same test" in cell, row
        assert not [f for f in files if not (ROOT / f).exists()], row
        assert not [name for name in names if f"def {name}(" not in defined], row
        assert files or not [name for name in networks if f"{name}(" not in zoo], row
