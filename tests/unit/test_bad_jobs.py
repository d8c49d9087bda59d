"""Bad job files, and all that is said of them, compared whole."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.job_file import load_job, parse_job, variants
from hvd_batchgrow.messages.errors import JobError
from tests.helpers import job_tree

GOOD = """name = "small"
seed = 7

[data]
source = "idx"
root = "data"
num_samples = 300

[model]
name = "small_conv_net"
ghost_batch = 8

[optim]
name = "sgd"
lr = 0.05
momentum = 0.9

[schedule]
policy = "grow"
epochs = 2.2
boundaries_epochs = [0.5, 1.0, 1.5]
noise_factor = 3.0
global_batch = 16
max_batch = 96
"""
SOURCES = (
    "one of cifar10, cifar100, covtype, csv, fashion_mnist, idx, image_folder, imagenet, numpy, parquet, "
    "synthetic_images, synthetic_rows, tfrecord, tokens, webdataset, or your own module:function"
)
NAME = "a name of at most 200 letters, digits, dots, dashes and underscores"
POLICIES = "adabatch, adaptive, decay, grow, hybrid, import, late, seesaw, steps"
OF_SGD = (
    "name, lr, weight_decay, weight_decay_rule, decay_norm_and_bias, groups, layer_decay, momentum, nesterov, "
    "rescale_momentum"
)

EDITS: dict[str, tuple[dict[str, str], list[str]]] = {
    "numbers as text": (
        {"lr = 0.05": 'lr = "0.05"', "= 2.2": '= "2.2"', "seed = 7": 'seed = "seven"', "batch = 8": 'batch = "8"'},
        [
            "seed: must be a whole number, got 'seven'",
            "model.ghost_batch: must be a whole number, got '8'",
            "optim.lr: must be a number, got '0.05'",
            "schedule.epochs: must be a number, got '2.2'",
        ],
    ),
    "no numbers": (
        {"lr = 0.05": "lr = nan", "= 0.9": "= inf", "= 2.2": "= -inf"},
        [
            "optim.lr: must be a finite number, got nan",
            "optim.momentum: must be a finite number, got inf",
            "schedule.epochs: must be a finite number, got -inf",
        ],
    ),
    "negative": (
        {"lr = 0.05": "lr = -0.05", "= 0.9": "= -0.9", "seed = 7": "seed = -7", "= 300": "= -300", "= 96": "= -96"},
        [
            "seed: must be at least 0, got -7; nearest: 0",
            "data.num_samples: must be greater than 0, got -300; nearest: 1",
            "optim.lr: must be greater than 0, got -0.05",
            "optim.momentum: must be at least 0, got -0.9; nearest: 0.0",
            "schedule.max_batch: must be greater than 0, got -96; nearest: 1",
        ],
    ),
    "huge": (
        {"lr = 0.05": "lr = 1e999", "seed = 7": f"seed = 1{'0' * 400}", "= 2.2": f"= 0x1{'0' * 5000}"},
        [
            "seed: must fit into 64 bits, got a number of 401 digits; nearest: 9223372036854775807",
            "optim.lr: must be a finite number, got inf",
            "schedule.epochs: must fit into 64 bits, got a number of 6021 digits; nearest: 9223372036854775807",
        ],
    ),
    "unicode": (
        {'"small"': '"klein\u202e🙂"', '"idx"': '"ıdx"\n"größe" = 1', '"data"': '"da\\u0000ta"'},
        [
            f"name: must be {NAME}, got 'klein\\u202e🙂'",
            "data.root: must be text that UTF-8 can hold, without NUL, got 'da\\x00ta'",
            f"data.source: did you mean 'idx'? {SOURCES}, got 'ıdx'",
            "data.'größe': unknown key; known here: " + ", ".join(DataSection.model_fields),
        ],
    ),
    "wrong types": (
        {
            "lr = 0.05": "lr = [0.05]",
            '= "small"': "= 7",
            "[0.5, 1.0, 1.5]": "0.5",
            '"idx"': '["idx"]',
            "= 3.0": "= {x = 1}",
            '"data"': '2020-02-29\nhflip = "yes"',
        },
        [
            "name: must be text, got 7",
            "data.source: must be text, got ['idx']",
            "data.root: must be text, got datetime.date(2020, 2, 29)",
            "data.hflip: must be true or false, got 'yes'",
            "optim.lr: must be a number, got [0.05]",
            "schedule.boundaries_epochs: must be a list, got 0.5",
            "schedule.noise_factor: must be a number or a list, got {'x': 1}",
        ],
    ),
    "unknown keys": (
        {
            "lr = 0.05": "lr = 0.05\nlearning_rate = 1\nmomentun = 0.9\nbatch_size = 8\nfoo = 1",
            'name = "small"\n': 'name = "small"\nlr = 1\nnum_epochs = 3\n',
            "[model]": "[modle]\n[model]",
            "= 2.2": "= 2.2\nevery_epochs = 1.0",
        },
        [
            "lr: unknown key; did you mean optim.lr?",
            "num_epochs: unknown key; did you mean schedule.epochs?",
            "modle: unknown key; did you mean model?",
            "optim.learning_rate: unknown key; did you mean optim.lr?",
            "optim.momentun: unknown key; did you mean optim.momentum?",
            "optim.batch_size: unknown key; did you mean schedule.global_batch or evaluation.batch_size?",
            f"optim.foo: unknown key; known here: {OF_SGD}",
            "schedule.every_epochs: unknown key of 'grow'; it belongs to adabatch",
        ],
    ),
    "choices": (
        {'"sgd"': '"sdg"\nprecision = 1', '"grow"': '"grwo"\nlr_rule = "liner"', "= 7": "= 7.0"},
        [
            "seed: must be a whole number, got 7.0",
            "optim.name: must be one of sgd, adam, adamw, lars, got 'sdg'; nearest: 'sgd'",
            f"schedule.policy: must be one of {POLICIES}, got 'grwo'; nearest: 'grow'",
        ],
    ),
    "absent": (
        {'name = "small"\n': "", '[model]\nname = "small_conv_net"\nghost_batch = 8\n': "", "lr = 0.05\n": ""}
        | {'policy = "grow"\n': ""},
        [
            "name: is required",
            "model: is required",
            "optim.lr: is required",
            f"schedule.policy: is required: one of {POLICIES}",
        ],
    ),
    "faults of sections that hold no other": (
        {"= 0.05": '= "x"', '"data"': '"data"\nlabel = 3\nimage_size = 4', "= 8": "= 8\ndropout = 0.5"},
        [
            "data.image_size: is for encoded images, and 'idx' has images of one size; use data.crop_padding",
            "data.label: is not used by the source 'idx', but by csv, parquet, tfrecord, webdataset",
            "model.dropout: is not used by 'small_conv_net', but by dense7, wrn_D_K of depth D = 6n+4",
            "optim.lr: must be a number, got 'x'",
        ],
    ),
    "what a plan would refuse too, but for what has to do with a value at fault": (
        {"[0.5, 1.0, 1.5]": "[1.5, 1.0]", "= 96": '= "N/0"\nwarmup_epochs = "1"', "seed = 7": "seed = -7"}
        | {"ghost_batch = 8\n": "ghost_batch = 8\n[layout]\nmax_micro_batch = 12\n"},
        [
            "seed: must be at least 0, got -7; nearest: 0",
            "schedule.warmup_epochs: must be a number, got '1'",
            "schedule.max_batch: must be a fraction of the training set such as \"N/10\", got 'N/0'",
            "schedule.boundaries_epochs: must rise: 1 follows 1.5; nearest: [1.0, 1.5]",
            "layout.max_micro_batch: 12 = 1.50 ghost batches of 8, which are never cut; nearest: 8, 16",
        ],
    ),
    "lists": (
        {"[0.5, 1.0, 1.5]": '[0.5, "1", -1]', "= 8": "= 8\nchannels = []", "= 3.0": "= [3.0, 0.5]"},
        [
            "model.channels: must have at least 1 item, not 0, got []",
            "schedule.boundaries_epochs.1: must be a number, got '1'",
            "schedule.boundaries_epochs.2: must be greater than 0, got -1",
            "schedule.noise_factor.1: must be at least 1, got 0.5; nearest: 1.0",
        ],
    ),
    "a value for a section": (
        {'[optim]\nname = "sgd"\nlr = 0.05\nmomentum = 0.9\n': "", "seed = 7": 'seed = 7\noptim = "sgd"\nupdate = []'},
        [
            "optim: must be a section, got 'sgd'",
            "update: must be a section, got []",
        ],
    ),
}


def edited(edits: dict[str, str]) -> str:
    text = GOOD
    for old, new in edits.items():
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    return text


def refusal(data: bytes, folder: Path) -> str:
    path = folder / "job.toml"
    path.write_bytes(data)
    with pytest.raises(JobError) as caught:
        load_job(path)
    return str(caught.value).replace(str(path), "job.toml")


@pytest.mark.parametrize("case", EDITS)
def test_all_faults_with_path_value_what_is_allowed_and_the_nearest(case: str, tmp_path: Path) -> None:
    edits, faults = EDITS[case]
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    assert refusal(edited(edits).encode(), tmp_path) == "\n  ".join([f"job.toml: {count}", *faults])


FILES: dict[str, tuple[bytes, str]] = {
    "a key twice": (
        edited({"lr = 0.05": "lr = 0.05\nlr = 0.1"}).encode(),
        "is not valid TOML: a key appears twice at line 16, column 9\n    lr = 0.1\n            ^",
    ),
    "a section twice": (
        (GOOD + "[data]\n").encode(),
        "is not valid TOML: the section 'data' appears twice at line 25, column 6\n    [data]\n         ^",
    ),
    "no value": (
        edited({"lr = 0.05": "lr ="}).encode(),
        "is not valid TOML: invalid value at line 15, column 5\n    lr =\n        ^",
    ),
    "no equals sign, Windows' line ends": (
        edited({"lr = 0.05": "lr 0.05"}).replace("\n", "\r\n").encode(),
        "is not valid TOML: expected '=' after a key in a key/value pair at line 15, column 4\n    lr 0.05\n       ^",
    ),
    "writing that would turn round": (
        edited({"lr = 0.05": "lr \u202e 0.05"}).encode(),
        "is not valid TOML: expected '=' after a key in a key/value pair at line 15, column 4\n    lr � 0.05\n       ^",
    ),
    "an open text": (
        edited({'"idx"': '"idx'}).encode(),
        "is not valid TOML: illegal character '\\n' at line 5, column 14\n    source = \"idx\n                 ^",
    ),
    "NUL": (
        edited({'"idx"': '"id\0x"'}).encode(),
        "is not valid TOML: illegal character '\\x00' at line 5, column 13\n    source = \"id�x\"\n                ^",
    ),
    "cut at its end": (
        (GOOD + "[upd").encode(),
        "is not valid TOML: expected ']' at the end of a table declaration at line 25, column 5\n    [upd\n        ^",
    ),
    "Latin-1": (
        edited({'"small"': '"sm\xe4ll"'}).encode("latin-1"),
        'is not UTF-8: byte 0xe4 at line 1, column 11\n    name = "sm\\xe4ll"\n              ^',
    ),
    "UTF-16": (GOOD.encode("utf-16"), "is UTF-16, but a job file must be UTF-8: save it as UTF-8"),
    "lists in lists": ((GOOD + "x = " + "[" * 5000).encode(), "is nested too deeply; at most 32 levels"),
    "a number of 5000 digits": (
        edited({"= 7": "= " + "9" * 5000}).encode(),
        "holds a number that cannot be read: Exceeds the limit (4300 digits) for integer string conversion: value has "
        "5000 digits",
    ),
    "eleven megabytes": (
        b"#" * (11 << 20),
        "has 11534336 bytes, but a job file has at most 1048576: is it another file?",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_toml_is_reported_with_line_and_column(case: str, tmp_path: Path) -> None:
    data, fault = FILES[case]
    assert refusal(data, tmp_path) == f"job.toml: 1 fault\n  {fault}"


def test_an_empty_file_lacks_everything(tmp_path: Path) -> None:
    first, *faults = refusal(b"", tmp_path).split("\n  ")
    assert first == "job.toml: 5 faults"
    assert [fault.partition(":")[0] for fault in faults] == ["name", "data", "model", "optim", "schedule"]


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_job(tmp_path / "job.toml").name == "small"


def test_sections_in_each_other_are_refused_however_they_are_written(tmp_path: Path) -> None:
    text = edited({"= 8": f"= 8\n[model.kwargs]\n{'.'.join('a' * 3000)} = 1"})
    assert "model.kwargs.a…: is nested too deeply; at most 32 levels" in refusal(text.encode(), tmp_path)


def test_hundreds_of_faults_are_counted_and_a_hundred_listed(tmp_path: Path) -> None:
    lines = refusal((GOOD + "[update]\n" + "".join(f"a{k} = 1\n" for k in range(250))).encode(), tmp_path).splitlines()
    assert lines[0] == "job.toml: 250 faults"
    assert len(lines) == 102
    assert lines[-1] == "  … and 150 more"


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (Path.mkdir, "is a folder, not a job file"),
        (os.mkfifo, "is a pipe or device, not a job file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe or device, not a job file"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: None, "cannot be read: No such file or directory"),
    ],
)
def test_a_folder_pipe_or_device_is_not_read(make: Callable[[Path], Any], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    make(path)
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert str(caught.value) == f"{path}: 1 fault\n  {fault}"


def test_a_folder_leads_to_a_job_in_it_and_a_missing_file_to_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(GOOD)
    with pytest.raises(JobError, match=rf"is a folder, .*; did you mean {tmp_path}/small.toml\?"):
        load_job(tmp_path)
    with pytest.raises(JobError, match=rf"No such file or directory; did you mean {tmp_path}/small.toml\?"):
        load_job(tmp_path / "smal.toml")
    with pytest.raises(JobError, match=r"cannot be read: .*null (byte|character)"):
        load_job(tmp_path / "a\0b")


def test_values_are_shown_in_one_short_line(tmp_path: Path) -> None:
    text = edited({'"idx"': '"' + "x" * 5000 + '"', "= 7": '= "a\\nb\\u001b[2J"'})
    lines = refusal(text.encode(), tmp_path).splitlines()
    assert len(lines) == 3
    assert "got 'a\\nb\\x1b[2J'" in lines[1]
    assert lines[2].endswith(f"got '{'x' * 79}… (5002 characters)")


# --- any value at any key --------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0]))
SCALARS = st.one_of(NUMBERS, st.booleans(), st.text(max_size=8), st.dates(), NUMBERS.map(repr))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=5,
)
SECTIONS = "data", "model", "optim", "schedule", "update", "layout", "evaluation", "checkpoint", "checks", "logging"
KEYS = [
    (section, key)
    for section in SECTIONS
    for key in (variants(section).get({"optim": "sgd"}.get(section, "grow")) or variants(section)[""]).model_fields
    if (section, key) not in {("optim", "name"), ("schedule", "policy")}
]


def faults_of(section: str, key: str, value: Any) -> list[str]:
    """The faults at a key of a job that has a value there; whatever it is, nothing but JobError may come of it."""
    try:
        parse_job(job_tree(**{section: {key: value}}))
    except JobError as error:
        return [str(fault) for fault in error.faults if fault.path.startswith(f"{section}.{key}")]
    return []


@pytest.mark.slow
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_at_any_key_is_accepted_or_reported(place: tuple[str, str], value: Any) -> None:
    for fault in faults_of(*place, value):
        assert "\n" not in fault
        assert fault.isprintable()
        assert "input should" not in fault.lower()


@pytest.mark.slow
@given(st.sampled_from(KEYS), SCALARS)
def test_the_nearest_value_is_a_valid_one(place: tuple[str, str], value: Any) -> None:
    for fault in faults_of(*place, value):
        near = re.search(r"; nearest: (\S+)$", fault)
        if near and "must fit into 64 bits" not in fault:
            assert not [other for other in faults_of(*place, ast.literal_eval(near[1])) if " must be " in other], fault


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4))
def test_any_tree_is_refused_with_its_faults(tree: dict[str, Any]) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(tree)
    report = {fault.path.partition(".")[0] for fault in caught.value.faults}
    assert {"name", "data", "model", "optim", "schedule"} - set(tree) <= report


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.toml"
    path.write_bytes(data)
    with pytest.raises(JobError):
        load_job(path)


def test_faults_of_overrides_are_reported_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.toml").write_text(GOOD)
    words = ["plan", str(tmp_path / "job.toml"), "--optim..lr", "1", "--name.x", "2", "--.=3"]
    assert main(words) == 2
    key = "is not a key of a job file: write --SECTION.KEY VALUE, such as --optim.lr 0.2"
    faults = [f"'optim..lr': {key}", "name.x: name is a value, not a section", f"'.': {key}"]
    assert capsys.readouterr().err == "\n  ".join([f"{tmp_path / 'job.toml'}: 3 faults", *faults]) + "\n"


@pytest.mark.parametrize(("lr", "scale"), [("1e308", "5.0"), ("5e-324", "0.1"), ("5e-324", "1.0")])
def test_numbers_that_leave_the_range_are_reported(
    lr: str, scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.toml"
    path.write_text(edited({"lr = 0.05": f"lr = {lr}", "= 2.2": f"= 2.2\nlr_scale = {scale}"}))
    assert main(["plan", str(path), "--twin"]) == 2
    assert "schedule: its numbers leave the range of floating point (" in capsys.readouterr().err


def test_a_run_is_not_longer_than_its_counter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.toml"
    path.write_text(edited({"= 2.2": "= 1e308"}))
    assert main(["plan", str(path)]) == 2
    assert "schedule.epochs: 1e+308 of N = 300 samples are more than a sample counter can hold; nearest: 1.5" in (
        capsys.readouterr().err
    )
