"""What the documents point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from hvd_batchgrow.config import Job

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


def test_the_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)) <= targets


def test_every_key_of_the_job_file_is_described() -> None:
    text = (ROOT / "docs" / "job-file.md").read_text()
    for section, field in Job.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            table = text.split(f"**`[{section}]`**")[1].split("**`[")[0].split("\n## ")[0]
            described = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
            assert described == set(field.annotation.model_fields), section
        else:
            assert f"| `{section}` |" in text
