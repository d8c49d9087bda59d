"""`report`: the whole text of reports, runs that are damaged or unfinished, and the command."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.reports.build import build_document
from hvd_batchgrow.reports.chart import band_path, curve_path, scales
from hvd_batchgrow.reports.curves import Points
from hvd_batchgrow.reports.document import Code, Curve, Document, Figure, FigureRow, Paragraph, Style, Table
from hvd_batchgrow.reports.html import html_text
from hvd_batchgrow.reports.markdown import markdown_text
from hvd_batchgrow.reports.order_record import common_order, read_order
from hvd_batchgrow.reports.pictures import pictures
from hvd_batchgrow.schedule.adaptive.decisions import decisions_text
from tests.reported_runs import STORED, change_json, change_lines, copied, long_run

PAIRS = ("small-seed7", "small-seed7-twin", "small-seed8", "small-seed8-twin")
COMMAND = ["hvd-batchgrow", "report", "runs"]


def titles(document: Document) -> list[str]:
    return [section.title for section in document.sections]


def rows(document: Document, name: str) -> list[dict[str, Any]]:
    (table,) = (table for table in document.blocks(Table) if table.name == name)
    return [dict(row) for row in table.rows]


def figure_names(document: Document) -> list[str]:
    return [figure.name for row in document.blocks(FigureRow) for figure in row.figures]


def renderable(document: Document) -> str:
    """Return the HTML of a report, after the Markdown too was made."""
    assert markdown_text(document)
    return html_text(document)


@pytest.mark.parametrize(("golden", "names"), [("pairs.md", PAIRS), ("measured.md", ("measured",))])
def test_the_markdown_of_stored_runs(golden: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STORED.parent)  # the commands of a report have the paths of its runs
    paths = [Path("runs", name) for name in names]
    document = build_document(paths, margin=20.0, price=0.1, command=[*COMMAND, "--margin", "20"], made="Made today")
    assert markdown_text(document) == (STORED.parent / golden).read_text()


def test_a_report_has_the_results_of_the_records() -> None:
    document = build_document([STORED], price=36.0)
    for row in rows(document, "runs"):
        lines = [json.loads(line) for line in (STORED / row["run"] / "metrics.jsonl").read_text().splitlines()]
        trained = [line for line in lines if line["kind"] == "train"]
        assert row["updates"] == trained[-1]["updates"]
        assert row["last"] == [line["top1"] for line in lines if line["kind"] == "eval"][-1]
        ends = [0, *(line["samples"] for line in trained)]
        taken = [(b - a) / line["samples_per_s"] for a, b, line in zip(ends, ends[1:], trained, strict=False)]
        assert row["seconds"] == pytest.approx(sum(taken))
        assert row["cost"] == pytest.approx(sum(taken) * 0.01)  # one rank, 36 an hour


def test_every_pair_of_runs_is_in_the_report_with_its_difference() -> None:
    document = build_document([STORED / name for name in PAIRS], margin=20.0)
    found = [(row["seed"], row["first"], row["second"]) for row in rows(document, "pairs")]
    assert found == [(7, "small-seed7", "small-seed7-twin"), (8, "small-seed8", "small-seed8-twin")]
    verdict = document.sections[0].blocks[0]
    assert isinstance(verdict, Paragraph)
    # The differences 12 and -2 have the mean 5 and the standard error 7; Student's t(0.95, 1) is 6.3138.
    assert f"{5 - 7 * 6.3138:+.2f} to {5 + 7 * 6.3138:+.2f} points" in verdict.text
    assert [row["updates"] for row in rows(document, "arms")] == [17, 42, pytest.approx(42 / 17)]


def test_phases_have_what_the_plan_wants_and_what_was_done() -> None:
    done = rows(build_document([STORED / "small-seed7"]), "phases")
    plan = json.loads((STORED / "small-seed7" / "plan.json").read_text())["phases"]
    assert [row["updates"] for row in done] == [row["planned_updates"] for row in done]
    assert [row["planned_updates"] for row in done] == [phase["num_updates"] for phase in plan]
    unfinished = rows(build_document([STORED / "measured"]), "phases")
    assert sum(row["samples"] for row in unfinished) == 672  # of the last record, within the last phase
    assert unfinished[-1]["samples"] < unfinished[-1]["planned_samples"]
    assert unfinished[-1]["seconds_left"] is None  # no speed in this phase yet


def test_the_time_line_has_decisions_with_their_measurements_and_the_resume() -> None:
    events = rows(build_document([STORED / "measured"]), "events")
    assert [event["event"] for event in events] == [
        *("started", "decision of gradient_noise", "decision of gradient_noise"),
        *("resumed, invocation 2", "decision of gradient_noise", "stopped"),
    ]
    decisions = (STORED / "measured" / "decisions.jsonl").read_text().splitlines()
    for event, line in zip([e for e in events if "decision" in e["event"]], map(json.loads, decisions), strict=True):
        assert event["samples"] == line["samples"]
        assert f"B {line['old_batch']} → {line['new_batch']}" in event["detail"]
        assert f"b_simple = {line['measured']['b_simple']:.4g}" in event["detail"]
    assert events[3]["samples"] == 480


def test_a_decision_has_the_learning_rate_of_the_plan(tmp_path: Path) -> None:
    """The defect: the rates of a decision are those before `lr_boundaries_epochs`, whose change was not shown."""
    (run,) = copied(tmp_path, "measured")

    def lower(plan: dict[str, Any]) -> None:
        for phase in plan["phases"][1:]:
            phase["lr"] = 0.025

    change_json(run / "plan.json", lower)
    details = [e["detail"] for e in rows(build_document([run]), "events") if "decision" in e["event"]]
    assert ["ε 0.05 → 0.025" in detail for detail in details] == [True, False, False]
    change_json(run / "plan.json", lambda plan: plan.update(phases=plan["phases"][:1]))  # a kill before the new plan
    details = [e["detail"] for e in rows(build_document([run]), "events") if "decision" in e["event"]]
    assert ["B 16 → 32, global_batch" in detail for detail in details] == [True, False, False]


def test_a_replay_and_a_fork_are_trained_again_as_they_were(tmp_path: Path) -> None:
    run, replay, fork = (*copied(tmp_path, "measured", "small-seed7"), tmp_path / "fork")
    (replay / "decisions.jsonl").write_bytes(decisions_text("other/decisions.jsonl", []))
    shutil.copytree(run, fork)

    def forked(record: dict[str, Any]) -> None:
        del record["attempts"][1:]
        record["attempts"][0].update(start_samples=3840, argv=["x", "train", "a.toml", "--fork", "fork"])

    change_json(fork / "record.json", forked)
    document = build_document([run, replay, fork])
    (again,) = [code.text for code in document.blocks(Code) if code.title == "To train them again"]
    assert again.splitlines() == [
        f"hvd-batchgrow train {run}/job.toml --runs-dir again",  # measures, and decides itself
        f"hvd-batchgrow train {replay}/job.toml --runs-dir again --replay {replay}/decisions.jsonl",
        "# fork continues another run from its checkpoint at sample 3,840; it was forked by",
        "hvd-batchgrow train a.toml --fork fork",
    ]


def test_a_missing_record_of_samples_is_named(tmp_path: Path) -> None:
    (run,) = copied(tmp_path, "small-seed7")
    (run / "consumed.jsonl").write_text("")
    assert [row["is_whole"] for row in rows(build_document([run]), "orders")] == ["has no updates"]
    (run / "consumed.jsonl").unlink()
    assert [row["is_whole"] for row in rows(build_document([run]), "orders")] == ["no consumed.jsonl"]


def test_a_loss_of_zero_in_a_band_is_drawn(tmp_path: Path) -> None:
    """The defect: a logarithmic axis has no place for the low end of the band, so the report ended with a traceback."""
    run = long_run(tmp_path, 2000)

    def vanish(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**line, "loss": 0.0 if k == 1000 else 100.0 / (1 + k)} for k, line in enumerate(lines)]

    change_lines(run / "metrics.jsonl", vanish)
    document = build_document([run])
    (drawn,) = [f for row in document.blocks(FigureRow) for f in row.figures if f.name == "train-loss-by-epoch"]
    low = drawn.curves[0].points.low
    assert low is not None
    assert (drawn.is_log, low.min()) == (False, 0.0)
    assert renderable(document)
    # A low end without a place on a logarithmic axis is a gap in the band, not in the curve.
    points = Points(np.arange(4.0), np.ones(4), np.array([0.5, 0.5, 0.0, 0.5]), np.full(4, 2.0))
    curve = Curve("a", points, Style())
    x, y = scales(Figure("a", "a", "x", "y", (curve,), is_log=True))
    assert [path(curve, x, y).count("M") for path in (curve_path, band_path)] == [1, 1]


def test_the_notes_of_a_plan_are_in_the_report(tmp_path: Path) -> None:
    runs = copied(tmp_path, "small-seed7", "small-seed8")
    for run in runs:
        change_json(run / "plan.json", lambda plan: plan.update(notes=["phase 2 has 1 rank", 5]))
    texts = [block.text for block in build_document(runs).blocks(Paragraph)]
    assert "Note of the plan of small-seed7, small-seed8: phase 2 has 1 rank." in texts


def test_transitions_are_in_the_time_line_at_their_updates() -> None:
    events = rows(build_document([STORED / "small-seed7"]), "events")
    plan = json.loads((STORED / "small-seed7" / "plan.json").read_text())["phases"]
    starts = [(phase["start_samples"], sum(p["num_updates"] for p in plan[:k])) for k, phase in enumerate(plan)][1:]
    assert [(e["samples"], e["updates"]) for e in events if e["event"] == "transition"] == starts


def test_a_measured_noise_scale_has_a_figure(tmp_path: Path) -> None:
    (run,) = copied(tmp_path, "measured")
    assert "gradient-noise" in figure_names(build_document([run]))

    def forget(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key != "gradient_noise"} for line in lines]

    change_lines(run / "metrics.jsonl", forget)
    assert "gradient-noise" not in figure_names(build_document([run]))


def test_runs_with_a_raised_learning_rate_are_beside_those_without(tmp_path: Path) -> None:
    base, raised = copied(tmp_path, "small-seed7", "small-seed8")
    assert "Raised learning rate and momentum" not in titles(build_document([base, raised]))

    def raise_lr(plan: dict[str, Any]) -> None:
        plan["phases"][0]["lr"] *= 5

    change_json(raised / "plan.json", raise_lr)
    document = build_document([base, raised])
    assert [row["raised"] for row in rows(document, "raised")] == ["no", "ε 0.05 → 0.25"]
    assert "raised-1-test-top1-by-updates" in figure_names(document)


def test_runs_of_unequal_training_sets_are_drawn_by_samples(tmp_path: Path) -> None:
    runs = copied(tmp_path, "small-seed7", "small-seed8")
    axes = {f.x_label for row in build_document(runs).blocks(FigureRow) for f in row.figures}
    assert axes == {"epochs", "updates"}
    change_json(runs[1] / "plan.json", lambda plan: plan.update(num_samples=400))
    axes = {f.x_label for row in build_document(runs).blocks(FigureRow) for f in row.figures}
    assert axes == {"samples", "updates"}


def test_the_order_of_samples_of_two_runs_is_compared_where_both_ended_an_update() -> None:
    records = [read_order(STORED / name / "consumed.jsonl") for name in PAIRS]
    assert [(record.fault, record.gaps, record.num_replaced) for record in records] == [("", (), 0)] * 4
    last, different = common_order(records[0], records[1])
    assert different is None  # twins of one seed
    ends = [{*record.bounds.tolist()} for record in records[:2]]
    assert last == max(ends[0] & ends[1])
    assert common_order(records[0], records[2]) == (0, 16)  # other seeds differ in the first update


def test_a_damaged_record_of_samples_has_its_fault(tmp_path: Path) -> None:
    (run,) = copied(tmp_path, "small-seed7")
    path = run / "consumed.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for text, fault in (
        ("".join(lines)[:-9], ""),  # cut short by a kill
        ("".join(lines[:3] + lines[4:]), "line 4 does not follow line 3"),
        ("".join([*lines[:2], "{\n", *lines[3:]]), "line 3 cannot be read"),
        ("".join([*lines[:2], '{"samples": 32, "missing_to": 64}\n']), ""),
    ):
        path.write_text(text)
        assert read_order(path).fault == fault
    assert read_order(path).gaps == ((32, 64),)
    assert any(e["event"] == "gap in the record" for e in rows(build_document([run]), "events"))


def change_nothing(run: Path) -> None:
    pass


def without_records(run: Path) -> None:
    for name in ("metrics.jsonl", "consumed.jsonl", "record.json", "job.toml"):
        (run / name).unlink()


def without_evaluations(run: Path) -> None:
    change_lines(run / "metrics.jsonl", lambda lines: [line for line in lines if line["kind"] == "train"])


def with_evaluations_only(run: Path) -> None:
    change_lines(run / "metrics.jsonl", lambda lines: [line for line in lines if line["kind"] == "eval"])


def with_one_record(run: Path) -> None:
    change_lines(run / "metrics.jsonl", lambda lines: lines[:1])


def one_epoch(run: Path) -> None:
    change_lines(run / "metrics.jsonl", lambda lines: [line for line in lines if line["epoch"] <= 1.1])
    change_json(run / "plan.json", lambda plan: plan.update(end_samples=304, phases=plan["phases"][:2]))


def with_lines_of_other_types(run: Path) -> None:
    def change(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        wrong: list[Any] = [None, "text", [1], {"a": 1}, True, 1e308, -5]
        changed = [{**line, key: value} for line, value in zip(lines, wrong, strict=False) for key in ("loss", "lr")]
        return [{**line, "epoch": "x", "updates": None, "ranks": "two"} for line in changed] + lines[-2:]

    change_lines(run / "metrics.jsonl", change)


def with_values_that_are_not_finite(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"(loss|lr|samples_per_s)": [0-9.e-]+', r'"\1": NaN', text))


def with_a_record_of_other_types(run: Path) -> None:
    attempt = {"argv": 5, "packages": [1], "hardware": "x", "ranks": [2], "git_diff": 7, "started": 3, "slurm": None}
    (run / "record.json").write_text(json.dumps({"attempts": [attempt, {}, {"start_samples": "x"}]}))


def with_decisions_of_other_types(run: Path) -> None:
    wrong = {
        "samples": 5,
        "old_batch": "x",
        "new_batch": None,
        "measured": {"a": "b", "c": [1]},
        "why": 5,
        "trigger": {},
    }
    (run / "decisions.jsonl").write_text(json.dumps(wrong) + "\n" + json.dumps({**wrong, "measured": 3}) + "\n")


def with_phases_of_other_types(run: Path) -> None:
    def change(plan: dict[str, Any]) -> None:
        for phase in plan["phases"]:
            phase.update(momentum="x", ranks=None, accumulation=[1], micro_batch={}, noise_scale="y")

    change_json(run / "plan.json", change)


def with_a_job_of_other_types(run: Path) -> None:
    def change(plan: dict[str, Any]) -> None:
        plan["job_file"].update(optim=[1], data="x", model=None, layout=[])
        plan.update(notes="x", num_validation="many", warmup_samples=None, ghost_batch=[])

    change_json(run / "plan.json", change)


def with_noise_in_files(run: Path) -> None:
    for name in ("consumed.jsonl", "record.json", "job.toml", "metrics.jsonl"):
        (run / name).write_bytes(bytes(range(256)) * 3)


CHANGES = [
    change_nothing,
    without_records,
    without_evaluations,
    with_evaluations_only,
    with_one_record,
    one_epoch,
    with_lines_of_other_types,
    with_values_that_are_not_finite,
    with_a_record_of_other_types,
    with_decisions_of_other_types,
    with_phases_of_other_types,
    with_a_job_of_other_types,
    with_noise_in_files,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["small-seed7", "measured"])
def test_a_damaged_or_unfinished_run_is_reported(name: str, change: Any, tmp_path: Path) -> None:
    run, other = copied(tmp_path, name, "small-seed8")
    change(run)
    for paths in ([run], [run, other], [other, run]):
        document = build_document(paths, margin=1.0, price=1.0)
        assert "<h2>Runs</h2>" in renderable(document)
        assert ("What could not be read" in titles(document)) == (change in (without_records, with_noise_in_files))


@pytest.mark.parametrize("change", [{"phases": []}, {"num_samples": 0}, {"job": 5}, {"end_samples": 10**400}])
def test_a_run_whose_plan_is_damaged_is_named_and_the_others_are_reported(
    change: dict[str, Any], tmp_path: Path
) -> None:
    damaged, good = copied(tmp_path, "small-seed7", "small-seed8")
    change_json(damaged / "plan.json", lambda plan: plan.update(change))
    document = build_document([tmp_path])
    assert [row["run"] for row in rows(document, "runs")] == [good.name]
    assert str(damaged / "plan.json") in renderable(document)
    with pytest.raises(RunError, match=r"no run can be reported:\n.*plan\.json"):
        build_document([damaged])


def test_runs_of_one_name_have_different_labels_and_a_run_is_reported_once(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        copied(tmp_path / folder, "small-seed7")
    document = build_document([tmp_path / "a", tmp_path / "b" / "small-seed7", tmp_path / "b"])
    assert [row["run"] for row in rows(document, "runs")] == ["a/small-seed7", "b/small-seed7"]


def test_the_command_writes_one_html_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my report.html"
    assert main(["report", str(STORED), "--out", str(out), "--margin", "20"]) == 0
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size / 1e6:.2f} MB\n"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert shlex.quote(f"--out={out}").replace("'", "&#39;") in out.read_text()  # the command that makes it again


def test_without_out_and_dir_the_report_is_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(STORED / "small-seed7")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_ticks_of_a_logarithmic_picture_are_plain_numbers() -> None:
    """Matplotlib writes the text of each label into a comment of the SVG."""
    points = Points(np.arange(3.0), np.array([10.0, 1e3, 1e5]))
    figure = Figure("log", "a title", "epoch", "samples", (Curve("a curve", points, Style()),), is_log=True)
    labels = re.findall(r"<!-- (.*?) -->", pictures(figure)["log.svg"].decode())
    assert {"10", "1,000", "100,000"} <= {*labels}
    assert not any("$" in label for label in labels)


@pytest.mark.slow
def test_a_legend_of_many_curves_leaves_the_axes_free() -> None:
    """The defect: the legend of 40 runs covered their curves."""
    points = Points(np.arange(3.0), np.arange(3.0))
    heights = {}
    for count in (10, 40):
        curves = tuple(Curve(f"small-seed{k}-twin", points, Style(k % 8)) for k in range(count))
        drawn = pictures(Figure("many", "many", "x", "y", curves))["many.svg"].decode()
        box = {name: float(re.findall(rf'id="{name}".*?<path d="M [0-9.]+ ([0-9.]+)', drawn, re.DOTALL)[0])
               for name in ("patch_2", "legend_1")}  # fmt: skip
        heights[count] = box["patch_2"], box["legend_1"]  # the lower ends, from the top
    assert heights[10][1] < heights[10][0]
    assert heights[40][1] > heights[40][0]


def test_the_batch_beside_a_noise_scale_has_other_dashes_than_any_run(tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(STORED / "measured", tmp_path / f"measured-{k}")) for k in range(5)]
    for k, run in enumerate(runs):
        change_json(run / "plan.json", lambda plan, k=k: plan["job_file"].update(seed=k))  # type: ignore[misc]
    document = build_document(runs)
    (drawn,) = [f for row in document.blocks(FigureRow) for f in row.figures if f.name == "gradient-noise"]
    dashes = [{curve.style.dash for curve in drawn.curves if curve.label.startswith(start)} for start in ("m", "batch")]
    assert dashes == [{0, 1, 2, 3}, {4}]
    assert renderable(document)
    assert pictures(drawn)


def test_the_command_writes_markdown_csv_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, names = tmp_path / "out", [*PAIRS, "measured"]
    assert main(["report", *(str(STORED / name) for name in names), "--dir", str(folder)]) == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert capsys.readouterr().out == f"{folder}: {len(files)} files\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    text = (folder / "report.md").read_text()
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert links == {f"figures/{path.name}" for path in files if path.suffix == ".svg"}
    for path in files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.with_suffix(".svg").exists()
    tables = {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in files if path.suffix == ".csv"}
    assert tables.keys() == {"runs", "pairs", "arms", "phases", "events", "orders", "curves"}
    assert [row["run"] for row in tables["runs"]] == names
    drawn = {(row["figure"], row["curve"]) for row in tables["curves"]}
    assert {("learning-rate", name) for name in names} <= drawn
    assert {f"figures/{figure}.svg" for figure, _ in drawn} == links


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-run"], "no-such-run is not a folder"),
        (["."], "contains no run"),
        ([str(STORED), "--out", "nowhere/r.html"], "nowhere does not exist"),
        ([str(STORED), "--dir", "nowhere/deep"], "nowhere does not exist"),
        ([str(STORED / "small-seed7"), "--out", "."], "is a folder; name a file in it: report.html"),
        ([str(STORED), "--margin", "0"], "--margin"),
        ([str(STORED), "--price", "nan"], "--price"),
        ([], "RUN: name at least one run folder"),
    ],
)
def test_errors_say_what_is_wrong(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) in {1, 2}
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
