"""Text that users wrote is printed as it is: rich never reads it as markup, emoji or anything else."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvd_batchgrow
from hvd_batchgrow.cli import main
from hvd_batchgrow.cli.common import terminal
from hvd_batchgrow.comm.hardware import Hardware
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.console_tables import number_table, print_table
from hvd_batchgrow.observers.progress import ProgressDisplay, work_progress
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.events import Evaluation, RunEnded, RunStarted, TrainRecord
from tests.helpers import NUM_TRAIN, small_job

ROOT = Path(hvd_batchgrow.__file__).parent
NASTY = [
    "x[/b]",
    "[bold]x[/bold]",
    "pip install 'hvd_batchgrow[tables]'",
    "a:bug:b",
    "[red",
    "\\[a]",
    "[link=http://x]y[/link]",
    "[@click=f]z[/]",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(text: str) -> str:
    """What a terminal shows, without colors and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("text", NASTY)
def test_a_line_is_printed_as_it_is(stream: type[io.StringIO], text: str) -> None:
    out = stream()
    terminal(out).print(text, style="yellow", soft_wrap=True)
    assert plain(out.getvalue()) == f"{text}\n"


@pytest.mark.parametrize("columns", ["0", "-1", "wide", "999999"])
def test_a_terminal_of_no_width_has_the_usual_one(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect: rich printed nothing, without an error."""
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["--version"]) == 0
    out = Terminal()
    terminal(out).print("text")
    assert plain(out.getvalue()) == "text\n"


@pytest.mark.parametrize("text", NASTY)
def test_every_part_of_a_table_is_printed_as_it_is(text: str) -> None:
    out = io.StringIO()
    table = number_table(f"title {text}", (f"heading {text}", "b"))
    table.add_row(f"cell {text}", "1")
    table.caption = f"caption {text}"
    print_table(terminal(out), table)
    for part in ("title", "heading", "cell", "caption"):
        assert f"{part} {text}" in out.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("text", NASTY)
def test_progress_is_shown_as_it_is(stream: type[io.StringIO], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    out = stream()
    with work_progress(terminal(out)) as report:
        report(f"reading {text}", 1, 2)
        report(f"reading {text}", 2, 2)
    assert f"reading {text}" in plain(out.getvalue())


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("text", NASTY)
def test_what_a_run_says_is_printed_as_it_is(text: str, is_terminal: bool) -> None:
    out = io.StringIO()
    display = ProgressDisplay(PlainConsole(out, 200, is_terminal=is_terminal))
    job, plan = small_job(), compile_plan(small_job(), 1, NUM_TRAIN)
    folder, notes = Path("runs", text), (f"note {text}",)
    hardware = Hardware(f"on {text}", (0,), "")
    display.on_start(RunStarted(job, plan, folder, 16, hardware, f"over {text}", 1, 1, "torch", 9, notes))
    display.on_record(
        TrainRecord(32, 0.1, 0.1, 2, 0, 0.1, 0.9, 16, 1, 1, 9.0, 1.0, {"top1": 0.5}, 1.0, 0.0, 0.0, 0.0, 0.0, None, 0)
    )
    display.on_evaluation(Evaluation(32, 0.1, 1.0, {"top1": 0.5}))
    display.on_end(RunEnded("small", folder, True, 32, 2, 2, 1.0, None))
    for message in (f"run folder {folder}", f"note {text}", f"over {text}", f"on {text}"):
        assert message in plain(out.getvalue())


def test_folders_whose_names_are_markup_are_like_any_others(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = "x[/b] [red]:bug:"
    assert main(["train", job, "--runs-dir", runs, "--name", "a", "--max-updates", "3"]) == 75
    assert f"run folder {runs}/a" in capsys.readouterr().err
    assert main(["twin", job, "--runs-dir", runs, "--schedule.epochs", "1.6", "--evaluation.every-epochs", "9"]) == 0
    assert f"run folder: {runs}/small-twin" in capsys.readouterr().out
    assert main(["audit", f"{runs}/small", f"{runs}/small-twin"]) == 0
    message = capsys.readouterr().out
    assert f"{runs}/small: N = 300" in message
    assert f"{runs}/small-twin: N = 300" in message
    Path("[b].toml").write_text(Path(job).read_text())
    assert main(["plan", "[b].toml"]) == 0
    assert main(["plan", "[b].toml", "--optim.lr", "[/b]"]) == 2
    assert "got '[/b]'" in capsys.readouterr().err


# --- guard: nothing else of rich that could parse text -----------------------------------------------

HARMLESS = {
    "rich.box",
    "rich.cells.cell_len",
    "rich.cells.set_cell_size",
    "rich.live.Live",  # draws on the console that it is given
    "rich.measure.Measurement",
    "rich.table.Table",  # renders its strings through the console that prints it
    *(f"rich.progress.{name}" for name in ("BarColumn", "Progress", "TaskID", "TimeRemainingColumn")),
    "rich.progress.TaskProgressColumn",  # shows a percentage, no text
}


def doubtful(tree: ast.AST) -> Iterator[str]:
    """Uses of rich that may parse text: imports of anything but `HARMLESS`, and arguments that turn parsing on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rich":
            yield from (n for a in node.names if (n := f"{node.module}.{a.name}") not in HARMLESS)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] == "rich")
        elif isinstance(node, ast.Call):
            yield from (w.arg for w in node.keywords if w.arg in {"markup", "emoji"})
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in {"Progress", "Live"} and "console" not in {w.arg for w in node.keywords}:
                yield f"{name} without console="


def test_only_one_file_could_parse_markup() -> None:
    found = {str(p.relative_to(ROOT)): [*doubtful(ast.parse(p.read_text()))] for p in sorted(ROOT.rglob("*.py"))}
    assert {name: uses for name, uses in found.items() if uses and name != "observers/console.py"} == {}
    assert found["observers/console.py"]


@pytest.mark.parametrize(
    "code",
    [
        "from rich.console import Console",
        "from rich import print",
        "import rich.markup",
        "from rich.panel import Panel",
        "from rich.text import Text",
        "from rich.progress import TextColumn",
        "console.print(x, markup=True)",
        "console.print(x, emoji=True)",
        "Progress(BarColumn())",
    ],
)
def test_the_guard_finds_a_new_use(code: str) -> None:
    assert [*doubtful(ast.parse(code))]
