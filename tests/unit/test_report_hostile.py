"""Nothing from a run's files is executed, loaded or interpreted by a reader of its report."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.reports.build import build_document
from hvd_batchgrow.reports.csv_files import csv_files
from hvd_batchgrow.reports.html import html_text
from hvd_batchgrow.reports.markdown import escape, markdown_text
from hvd_batchgrow.reports.text import clean, clean_block
from tests.reported_runs import change_json, change_lines, copied

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "<!--<script>",
    '" onload="alert(1)',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "[x](javascript:alert(1))",
    "![x](http://example.com/a.png)",
    "{{ 7 * 7 }}{% for x in y %}",
    "a|b`c`*d*\n# title\n```\n<b>",
    '=cmd|"/c calc"!A1',
    "@SUM(1)",
    "\u202egnp.exe",
    "\ud800\x00\x1b[31m\u2028\u2029",
    "$x^2$ \\textbf{a}",
    "../../../etc/passwd",
]


class Page(HTMLParser):
    """The elements, attributes and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def poison(run: Path, text: str) -> None:
    """Put a text into every place of a run's files that a report shows."""

    def change_plan(plan: dict[str, Any]) -> None:
        plan.update(job=text, notes=[text])
        plan["job_file"].update(name=text)
        plan["job_file"][text] = {text: text}
        plan["job_file"]["data"]["root"] = text
        plan["job_file"]["schedule"]["policy"] = text
        plan["job_file"]["task"] = {"name": "mine:task"}  # so that the metric's name is the user's
        for phase in plan["phases"]:
            phase["ranks"] = text

    def change_record(record: dict[str, Any]) -> None:
        for attempt in record["attempts"]:
            attempt.update(dict.fromkeys(("started", "host", "python", "backend", "working_directory"), text))
            attempt.update(git_commit=text, git_diff=f"+{text}", user_git_diff=f"-{text}", argv=["x", text])
            attempt.update(packages={text: text}, slurm={text: text}, hardware={"device": text})

    def change_metrics(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"samples": line["samples"], "updates": line["updates"], text: line["top1"], **line, "dataset": text}
            | ({"top1": text} if k % 2 else {})
            for k, line in enumerate(lines)
        ]

    change_json(run / "plan.json", change_plan)
    change_json(run / "record.json", change_record)
    change_lines(run / "metrics.jsonl", change_metrics)
    (run / "job.toml").write_bytes(f"name = '{text}'\n".encode(errors="surrogatepass"))
    decision = {"samples": 16, "trigger": text, "why": text, "old_batch": 1, "new_batch": 2, "measured": {text: 1}}
    (run / "decisions.jsonl").write_text(json.dumps(decision) + "\n" + json.dumps({"samples": 1, text: 1}) + "\n")


@pytest.fixture(scope="module", params=HOSTILE)
def document(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hostile")
    first, second = copied(folder, "small-seed7", "small-seed8")
    poison(first, request.param)
    poison(second, request.param + "2")
    (folder / "broken").mkdir()
    (folder / "broken" / "plan.json").write_text(json.dumps({"job": request.param}))
    return build_document([folder], made=request.param, command=["report", request.param])


def test_a_page_holds_only_its_own_elements(document: Any) -> None:
    text = html_text(document)
    page = Page(text)
    assert page.tags.count("script") == 2
    assert not {"img", "b", "iframe", "object", "link", "base", "form", "input"} & {*page.tags}
    assert [name for _, name, _ in page.attributes if name.startswith("on")] == []
    assert [value for _, name, value in page.attributes if name == "src"] == []
    addresses = [value for _, name, value in page.attributes if name == "href"]
    assert addresses
    assert all(re.fullmatch("#[a-z-]+", address) for address in addresses)
    assert "\n</html>" in text


def test_the_only_script_that_runs_is_that_of_the_report(document: Any) -> None:
    text = html_text(document)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules["script-src"])
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert not set("<>&\u2028\u2029") & set(data)
    assert json.loads(data)


def test_a_page_loads_nothing(document: Any) -> None:
    text = re.sub(r'xmlns="[^"]+"|"http://www.w3.org/2000/svg"', "", html_text(document))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert {name for _, name, value in Page(text).attributes if "://" in value} <= {"aria-label", "data-name"}


def test_markdown_and_csv_hold_hostile_text_as_text(document: Any) -> None:
    text = markdown_text(document)
    text.encode()
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"<[^>]*>", outside)) <= {"<details>", "</details>", "<summary>", "</summary>"}
    assert all(re.fullmatch(r"figures/[a-z0-9-]+\.svg", link) for link in re.findall(r"(?<!\\)\]\(([^)]*)\)", outside))
    for content in csv_files(document).values():
        for row in csv.reader(content.splitlines()):
            for cell in row:
                assert not re.match(r"[=+@\t\r]|-(?![0-9.])", cell), cell


def test_jinja_in_a_name_is_not_evaluated(tmp_path: Path) -> None:
    (run,) = copied(tmp_path, "small-seed7")
    poison(run, "{{ 7 * 7 }}")
    text = html_text(build_document([run]))
    assert "{{ 7 * 7 }}" in text
    assert ">49<" not in text


@pytest.mark.slow
@pytest.mark.parametrize("text", ["$x^2$ \\textbf{a}", "\ud800\u4e2d<b>&", "_hidden"])
def test_hostile_names_are_drawn(text: str, tmp_path: Path) -> None:
    from hvd_batchgrow.reports.write import write_folder

    run = copied(tmp_path, "small-seed7")[0].rename(tmp_path / text.encode(errors="replace").decode())
    poison(run, text)
    assert write_folder(build_document([run]), tmp_path / "out") > 10
    for path in (tmp_path / "out" / "figures").glob("*.svg"):
        assert "<script" not in path.read_text()


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a plain sentence: 12 of 15, in a_name.", "a plain sentence: 12 of 15, in a_name."),
        ("*a* _b_ `c` [d](e)", r"\*a\* \_b\_ \`c\` \[d\](e)"),
        ("a|b", r"a\|b"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("1.5 of -2", "1.5 of -2"),
        ("===", r"\==="),
        ("http://a.b www.a.b x@y.z", r"http:\//a.b www\.a.b x\@y.z"),
    ],
)
def test_markdown_is_escaped_where_it_would_be_markup(text: str, escaped: str) -> None:
    assert escape(text) == escaped


def test_clean_text_is_one_printable_line() -> None:
    assert clean("a\nb\t\x1b\u202e\ud800\u2028é中") == r"a\x0ab\x09\x1b\u202e\ud800\u2028é中"
    assert clean("x" * 400) == "x" * 300 + "…"
    assert clean_block("a\r\nb\tc\x00") == "a\nb\tc\\x00"
    assert clean_block("x" * 11, most=9).splitlines() == ["x" * 9, "… and 2 more characters"]
