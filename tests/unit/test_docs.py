"""What the documents point at is there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from hvd_batchgrow.config.model_specs import all_models
from hvd_batchgrow.config.source_specs import SOURCES
from hvd_batchgrow.config.task_specs import TASKS
from hvd_batchgrow.data.source_checks import known_num_samples
from hvd_batchgrow.job_file import load_job, parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.cost.probe_file import subject_of
from hvd_batchgrow.schedule.job_model import job_model
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.policy import POLICIES
from hvd_batchgrow.schedule.trigger import TRIGGERS
from tests.helpers import job_tree, small_job
from tests.unit.test_rooms import ORDER

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


def gaps(text: str) -> list[str]:
    """Return the placeholders in a page: TODO and the like, ??, {{field}}, [...].

    A word in capitals alone on a line, or one with an underscore alone in a table cell, is one too.
    """
    words = r"\b(?:TODO|TBD|TBA|FIXME|XXX+|NNN+|lorem ipsum)\b"
    alone = r"(?<=\|)[ ]*[A-Z]+_[A-Z_]+[ ]*(?=\|)|^[ ]*[A-Z_]{4,}[ ]*$"
    return re.findall(rf"{words}|\?\?+|\{{\{{\w+\}}\}}|\[\.\.\.\]|{alone}", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_gap_is_left_to_be_filled(page: Path) -> None:
    assert gaps(page.read_text()) == []


@pytest.mark.parametrize(
    "text", ["TODO: describe", "takes ?? s", "| 1 | WALL_TIME |", "SECTION\n", "commit {{hash}}", "n = XXX", "[...]"]
)
def test_a_gap_is_found(text: str) -> None:
    assert len(gaps(f"A line.\n\n{text}\n")) == 1


def test_the_citation_has_the_version_and_license_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE))
    assert [citation[key] for key in ("title", "version", "license")] == [
        project[key] for key in ("name", "version", "license")
    ]


def test_the_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)) <= targets


def test_the_page_on_architecture_lists_the_rooms_in_their_order() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().split("| room |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == ORDER


def test_the_page_on_data_lists_every_source() -> None:
    rows = [f"| `{spec.name}` | {spec.doc} | {' or '.join(spec.kinds)} |" for spec in SOURCES.specs()]
    table = (ROOT / "docs" / "data.md").read_text().split("| `data.source` |")[1].split("\n| `module:function`")[0]
    assert table.splitlines()[2:] == rows


def test_the_page_on_the_job_file_lists_every_task() -> None:
    table = (ROOT / "docs" / "job-file.md").read_text().split("| `task.name` |")[1].split("\n\n")[0]
    assert [" | ".join(row.split(" | ")[:2]) for row in table.splitlines()[2:]] == [
        f"| `{spec.name}` | {spec.doc}" for spec in TASKS.specs()
    ]


def test_the_page_on_the_job_file_lists_every_network() -> None:
    table = (ROOT / "docs" / "job-file.md").read_text().split("| `model.name` |")[1].split("\n\n")[0]
    assert [" | ".join(row.split(" | ")[:2]) for row in table.splitlines()[2:]] == [
        f"| `{spec.name}` | {spec.doc}" for spec in all_models()
    ]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_and_names_of_a_page_for_developers_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    places = [ROOT, *(path for path in (ROOT / "hvd_batchgrow").rglob("*") if path.is_dir()), ROOT / "hvd_batchgrow"]
    files = [name for name in re.findall(r"`([\w/]+\.py)`", text) if "NAME" not in name]
    assert files
    assert [name for name in files if not any((place / name).exists() for place in places)] == []
    code = "\n".join(path.read_text() for path in (ROOT / "hvd_batchgrow").rglob("*.py"))
    names = re.findall(r"`(_?[A-Z]\w+|make_\w+)`", text)
    assert [name for name in names if not re.search(rf"^(?:class |def )?{name}\b", code, flags=re.MULTILINE)] == []


def test_the_page_on_cost_names_the_keys_that_a_probe_is_bound_to() -> None:
    text = (ROOT / "docs" / "cost.md").read_text()
    section = text[text.index("## Which jobs a probe is good for") : text.index('## grow_by = "auto"')]
    assert set(re.findall(r"`([a-z]+\.[a-z_]+)`", section)) == set(subject_of(small_job()))


def keys_by_section() -> dict[str, set[str]]:
    """Keys of every model that a section may follow."""
    sections: dict[str, set[str]] = {}
    for section, field in job_model().model_fields.items():
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
    assert keys_by_section().keys() | {"name", "seed"} == job_model().model_fields.keys()


def test_every_policy_and_trigger_is_described() -> None:
    job_file, triggers = ((ROOT / "docs" / page).read_text() for page in ("job-file.md", "triggers.md"))
    for page, title, names in (
        (job_file, "## Policies", POLICIES.names()),
        (triggers, "## Triggers", [name for name in TRIGGERS.names() if name != "none"]),
    ):
        section = page.split(title)[1].split("\n#")[0]
        assert sorted(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == names
    for key, names in (("policy", POLICIES.names()), ("name", TRIGGERS.names())):
        rows = [re.findall(r'`"(\w+)"`', row) for row in job_file.splitlines() if row.startswith(f"| `{key}` |")]
        assert names in [sorted(set(row)) for row in rows]


@cache
def definitions(path: Path) -> frozenset[str]:
    """Return the names of all functions and classes of a file, nested ones too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))


@cache
def collected(path: Path) -> frozenset[str]:
    """Return what pytest collects from a file: `test_a` and `TestB::test_c`, without parameters.

    A function inside another function, in a string or in a file of another name is not a test.
    """
    if not re.fullmatch(r"test_\w+\.py", path.name):
        return frozenset()
    return frozenset(_tests_of(ast.parse(path.read_text()).body))


def _tests_of(body: Iterable[ast.stmt], inside: str = "") -> Iterable[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
            yield inside + node.name
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _tests_of(node.body, f"{inside}{node.name}::")
        elif isinstance(node, ast.If):
            yield from _tests_of([*node.body, *node.orelse], inside)


def named_tests(row: str) -> list[tuple[str, str]]:
    """Return (file, test) for every `tests/FILE.py::TEST` of a row."""
    return re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", row)


def missing(tests: Iterable[tuple[str, str]]) -> list[str]:
    """Return the tests that pytest does not collect."""
    return [
        f"{file}::{name}" for file, name in tests if not (ROOT / file).exists() or name not in collected(ROOT / file)
    ]


def test_only_what_pytest_collects_is_a_test(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "def test_1(): ...\nif True:\n    async def test_2(): ...\n"
        "class TestB:\n    def test_3(self): ...\n    def helper(self): ...\n"
        'TEXT = """\ndef test_4(): ...\n"""\ndef helper():\n    def test_5(): ...\n# def test_6(): ...\n'
        "class Net:\n    def test_7(self): ...\n"
    )
    assert collected(tmp_path / "test_a.py") == {"test_1", "test_2", "TestB::test_3"}
    assert definitions(tmp_path / "test_a.py") == {
        *("test_1", "test_2", "TestB", "test_3", "helper", "test_5", "Net", "test_7")
    }


def test_every_known_defect_has_a_test_that_exists() -> None:
    rows = re.findall(r"^\| ([a-z]) \|(.*)$", (ROOT / "docs" / "defects.md").read_text(), flags=re.MULTILINE)
    assert "".join(letter for letter, _ in rows) == "abcdefghijklmnopqrstuvwx"
    for letter, row in rows:
        assert named_tests(row), letter
        assert missing(named_tests(row)) == [], letter


def test_every_promise_of_reliability_has_a_test_that_exists() -> None:
    tables = (ROOT / "docs" / "reliability.md").read_text().split("| promise | test |\n|---|---|\n")[1:]
    promises = [row for table in tables for row in table.split("\n\n")[0].strip().splitlines()]
    assert len(promises) >= 20
    for row in promises:
        assert named_tests(row), row
        assert missing(named_tests(row)) == [], row


def rows_of_supported() -> list[str]:
    """Return the rows of the tables of docs/supported.md, without their heads."""
    lines = (ROOT / "docs" / "supported.md").read_text().splitlines()
    return [line for line, after in pairwise([*lines, ""]) if line.startswith("| ") and not after.startswith("|---")]


def test_every_line_of_what_is_supported_has_a_test_that_exists() -> None:
    assert len(rows_of_supported()) >= 60
    zoo = frozenset().union(*map(definitions, (ROOT / "tests/fuzz/zoo").glob("*.py")))
    for row in rows_of_supported():
        cell = row.rstrip("| ").rpartition("|")[2]
        files, names = re.findall(r"tests/[\w/]+\.py", cell), re.findall(r"\btest_\w+\b(?!\.py)", cell)
        networks = [name for name in re.findall(r"`(\w+)`", cell) if not name.startswith("test_")]
        assert files or names or networks or "the same test" in cell, row
        assert [file for file in files if not (ROOT / file).exists()] == [], row
        assert missing(named_tests(cell)) == [], row
        # A test or a network is in one of the files that its row names.
        paths = [ROOT / file for file in files]
        assert [path for path in paths if path.name.startswith("test_") and not collected(path)] == [], row
        tests = frozenset().union(*map(collected, paths))
        assert [name for name in names if name not in tests] == [], row
        there = frozenset().union(zoo, *map(definitions, paths))
        assert [name for name in networks if name not in there] == [], row
