"""Kinds of fuzz cases: each function makes a case in the working directory from a random generator."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch

from hvd_batchgrow.cli.argv_checks import options_of
from hvd_batchgrow.cli.commands import commands_by_name
from hvd_batchgrow.train.checkpoints.checkpoint import FORMAT, checkpoint_paths
from tests.fuzz.damage import NUMBERS, TEXTS, damage_bytes, damage_entry, damage_tree, junk
from tests.fuzz.runner import Case
from tests.fuzz.world import JOBS, SOURCES, World

Make = Callable[[random.Random, World], Case]

TRAIN = ("train", "small.toml", "--max-updates", "1")
_REFUSED = frozenset({2})
_PLANNED = frozenset({0, 2})
_MAY_TRAIN = frozenset({0, 1, 2, 75})
_RESUMED = frozenset({0, 1, 75})


# --- job files -----------------------------------------------------------------------------------


def _plan_words(draw: random.Random, path: str) -> list[str]:
    return draw.choice(
        [
            ["plan", path], ["plan", path, "--json"], ["plan", path, "--twin"], ["plan", path, "--ranks", "4"],
            ["submit", path, "--nodes-max", "4", "--dry-run"], ["verify", path, "--layouts", "0x0x0"],
        ]
    )  # fmt: skip


def _written(tree: dict[str, Any]) -> None:
    Path("job.toml").write_bytes(tomli_w.dumps(tree).encode("utf-8", "surrogatepass"))


def job_values(draw: random.Random, world: World) -> Case:
    """A job of the project with damaged values."""
    path = draw.choice(JOBS)
    tree = tomllib.loads(path.read_text())
    damage = damage_tree(draw, tree)
    _written(tree)
    return Case("job values", f"{path.stem}: {damage}", _plan_words(draw, "job.toml"), _PLANNED)


def job_sure_faults(draw: random.Random, world: World) -> Case:
    """Several unambiguous faults, all of which must be reported."""
    path = draw.choice(JOBS)
    tree = tomllib.loads(path.read_text())
    section = draw.choice(["data", "model", "optim", "schedule"])
    places = [(name, key) for name in ("optim", "schedule") for key, v in tree[name].items() if type(v) in {int, float}]
    name, key = draw.choice(places)
    tree[name][key] = draw.choice([float("nan"), "a word", {"x": 1}, [["x"]]])
    unknown = draw.choice(["zzz", "lrr", "batchsize", "É", "two words"])
    tree[section][unknown] = 1
    missing = draw.choice(["name", "data", "model"])
    if missing != section:
        del tree[missing]
    _written(tree)
    damage = f"{path.stem}: {name}.{key} = {tree[name][key]}, {section}.{unknown}, no {missing}"
    named = [f"{name}.{key}", f"{section}.", *([f"{missing}: is required"] if missing != section else [])]
    return Case("job sure faults", damage, _plan_words(draw, "job.toml"), _REFUSED, named=named)


def job_bytes(draw: random.Random, world: World) -> Case:
    """A job of the project whose file is damaged, or is not a file."""
    path = draw.choice(JOBS)
    Path("job.toml").write_bytes(path.read_bytes())
    damage = damage_entry(draw, Path("job.toml")) if draw.random() < 0.1 else damage_bytes(draw, Path("job.toml"))
    return Case("job bytes", f"{path.stem}: {damage}", _plan_words(draw, "job.toml"), _PLANNED)


def job_lines(draw: random.Random, world: World) -> Case:
    """A job file with lines removed, repeated, moved, or taken from another job."""
    path = draw.choice(JOBS)
    lines = path.read_text().splitlines()
    for _ in range(draw.choice([1, 2, 4])):
        at = draw.randrange(len(lines))
        way = draw.randrange(5)
        if way == 0:
            del lines[at]
        elif way == 1:
            lines.insert(draw.randrange(len(lines)), lines[at])
        elif way == 2:
            lines[at] = lines[at].replace("=", draw.choice(["==", ":", "", "= =", "=\u202e"]))
        elif way == 3:
            lines.insert(at, draw.choice(draw.choice(JOBS).read_text().splitlines()))
        else:
            more = ["[data]", "[[data]]", "a.b.c = 1", "x = [1,", '"é" = 1', "= 1", "\ufeff", "[x"]
            lines.insert(at, draw.choice(more))
    Path("job.toml").write_text("\n".join(lines))
    return Case("job lines", path.stem, _plan_words(draw, "job.toml"), _PLANNED)


def job_trained(draw: random.Random, world: World) -> Case:
    """A small job with damaged values, run up to its first update."""
    world.lay_out("idx", Path.cwd())
    Path("runs").rename("elsewhere")
    tree = tomllib.loads(Path("small.toml").read_text())
    section = draw.choice([name for name, value in tree.items() if isinstance(value, dict)])
    damage = damage_tree(draw, tree[section])
    Path("small.toml").write_bytes(tomli_w.dumps(tree).encode("utf-8", "surrogatepass"))
    return Case("job trained", f"{section}: {damage}", TRAIN, _MAY_TRAIN)


# --- the command line ----------------------------------------------------------------------------


def overrides(draw: random.Random, world: World) -> Case:
    """Overrides of a job's keys, some of which do not exist."""
    path = draw.choice(JOBS)
    tree = tomllib.loads(path.read_text())
    keys = [f"{s}.{key}" for s, values in tree.items() if isinstance(values, dict) for key in values]
    words = _plan_words(draw, str(path))
    for _ in range(draw.choice([1, 2, 5])):
        key = draw.choice([*keys, "optim", "optim.", ".", "..", "a.b", "name.x", "optim.lr.x", "É.é", "data.r\udcff"])
        if "." not in key:
            key = f"{key}."
        odd = ["\udcff", "[", "[1", '"', "{", "[1, [2]]", "'x'", "0x" + "f" * 9000]
        text = draw.choice([*TEXTS, *odd, *map(str, NUMBERS[:12])])
        words += [f"--{key}={text}"] if draw.random() < 0.5 else [f"--{key}", text]
    return Case("overrides", f"{path.stem}", words, _PLANNED)


def command_words(draw: random.Random, world: World) -> Case:
    """Random arguments of any command."""
    commands = commands_by_name()
    name = draw.choice([*commands, "trian", "", "--json"])
    pool = [*options_of(commands[name])] if name in commands else ["--x"]
    words = [name, *draw.choice([[], [str(JOBS[0])], ["missing.toml"], ["."]])]
    for _ in range(draw.randrange(4)):
        option = draw.choice([*pool, "--nope", "-x", "--jobs-dir"])
        text = draw.choice([*TEXTS[:24], *map(str, NUMBERS[:14]), "\udcff", "auto"])
        words += draw.choice([[option], [option, text], [f"{option}={text}"]])
    words = ["verify" if word == "probe" else word for word in words]  # probing a whole job is slow
    if words[0] in {"train", "twin", "verify", "probe"}:
        words = [*words, "--zzz"]
        return Case("words", "", words, frozenset({0, 2}), named=["--zzz"])
    return Case("words", "", words, frozenset({0, 1, 2}))


# --- data ----------------------------------------------------------------------------------------


def data_files(draw: random.Random, world: World) -> Case:
    """A file of a source that is damaged, foreign or missing."""
    source = draw.choice(list(SOURCES))
    world.lay_out(source, Path.cwd())
    if source == "idx":
        Path("runs").rename("elsewhere")
    path = draw.choice(sorted(path for path in Path("data").rglob("*") if path.is_file()))
    if (way := draw.random()) < 0.15:
        damage = damage_entry(draw, path)
    elif way < 0.25:
        other = draw.choice([p for name in SOURCES for p in (world.folder / name / "data").rglob("*") if p.is_file()])
        path.write_bytes(other.read_bytes())
        damage = f"{other.name} as {path}"
    else:
        damage = damage_bytes(draw, path)
    words = [
        *TRAIN,
        *(["--data.on_bad_sample", "replace"] if source in {"tfrecord", "image_folder"} and way > 0.6 else []),
    ]
    return Case(f"data {source}", damage, words, _MAY_TRAIN, any_named=["data"])


# --- checkpoints and run folders -----------------------------------------------------------------


def _after_run(draw: random.Random, world: World) -> list[str]:
    """Return a command on the existing run."""
    return draw.choice(
        [
            [*TRAIN, "--resume", "auto"], [*TRAIN, "--resume", "auto"], [*TRAIN, "--fork", "other"],
            ["digest", "runs/small"], ["digest", "runs/small", "runs/small"], ["audit", "runs/small"],
            ["status", "runs/small"], ["submit", "small.toml", "--nodes-max", "1", "--resume", "auto", "--dry-run"],
        ]
    )  # fmt: skip


def checkpoints(draw: random.Random, world: World) -> Case:
    """Checkpoints whose bytes are damaged."""
    world.lay_out("idx", Path.cwd())
    paths = checkpoint_paths(Path("runs/small/checkpoints"))
    chosen = paths[-1:] if draw.random() < 0.5 else paths
    damage = "; ".join(damage_bytes(draw, path) for path in chosen)
    return Case("checkpoint bytes", damage, _after_run(draw, world), _RESUMED)


def _resealed(values: dict[str, Any]) -> bytes:
    """Return the bytes of a checkpoint with a valid checksum, whatever it holds."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | values, buffer)
    data = buffer.getvalue()
    return data + b"\nsha256 " + hashlib.sha256(data).hexdigest().encode() + b"\n"


def _tensor_junk(draw: random.Random, value: Any) -> Any:
    if isinstance(value, torch.Tensor) and draw.random() < 0.7:
        return draw.choice(
            [value.flatten(), value.double(), value[:0] if value.ndim else value.reshape(1), torch.tensor(0.0),
             value.to(torch.int64), value * float("nan") if value.is_floating_point() else value + 1,
             torch.zeros(2, 2).to_sparse()]
        )  # fmt: skip
    found = junk(draw)
    return found if isinstance(found, (int, float, str, bool, list, dict)) else None


def _confuse(draw: random.Random, values: dict[str, Any]) -> str:
    """Change a key, type or shape somewhere in a checkpoint; return where."""
    node: Any = values
    key = draw.choice(sorted(set(values) - {"format"}))
    path = [key]
    while isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.75:
        node = node[key]
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(key)
    if draw.random() < 0.2:
        del node[key]
    elif draw.random() < 0.1 and isinstance(node, dict):
        node["more"] = node[key]
    else:
        node[key] = _tensor_junk(draw, node[key])
    return ".".join(map(str, path))


def sealed_checkpoints(draw: random.Random, world: World) -> Case:
    """Checkpoints with valid checksums whose contents this program would not write."""
    world.lay_out("idx", Path.cwd())
    paths = checkpoint_paths(Path("runs/small/checkpoints"))
    for path in paths[-1:] if draw.random() < 0.3 else paths:
        values = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        damage = _confuse(draw, values)
        path.write_bytes(_resealed(values))
    return Case("checkpoint sealed", damage, _after_run(draw, world), _RESUMED)


_RUN_FILES = ("plan.json", "record.json", "metrics.jsonl", "consumed.jsonl", "slurm/ledger.json", "job.toml")


def run_files(draw: random.Random, world: World) -> Case:
    """The other files of a run folder: plan, records, ledger."""
    world.lay_out("idx", Path.cwd())
    run = Path("runs/small")
    path = run / draw.choice(_RUN_FILES)
    if draw.random() < 0.5 and path.suffix in {".json", ".jsonl"}:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        k = draw.randrange(len(lines))
        tree = json.loads(lines[k])
        damage = f"{path}: {damage_tree(draw, tree)}"
        lines[k] = json.dumps(tree, default=str) if draw.random() < 0.9 else json.dumps(junk(draw), default=str)
        path.write_text("\n".join(lines) + "\n")
    else:
        damage = damage_bytes(draw, path)
    return Case("run files", damage, _after_run(draw, world), _RESUMED)


def probes(draw: random.Random, world: World) -> Case:
    """A damaged probe file."""
    world.lay_out("idx", Path.cwd())
    path = Path("PROBE.json")
    if draw.random() < 0.7:
        tree = json.loads(path.read_text())
        damage = damage_tree(draw, tree)
        path.write_text(json.dumps(tree, default=str))
    else:
        damage = damage_bytes(draw, path)
    more = draw.choice([[], ["--layout.grow_by", "auto"], ["--json"]])
    return Case("probe file", damage, ["plan", "small.toml", "--cost", "PROBE.json", *more], frozenset({0, 1, 2}))


# --- the environment -----------------------------------------------------------------------------

_RANK_PAIRS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("PMI_RANK", "PMI_SIZE"),
    ("HOROVOD_RANK", "HOROVOD_SIZE"),
    ("RANK", "WORLD_SIZE"),
)
_NO_COUNTS = ("x", "-1", "²", "٣", "1.5", "1e3", " ", "0x1", "9" * 5000, "NaN", "1\n", "1 ", "é")
_OTHERS = (
    "OMP_NUM_THREADS", "COLUMNS", "LINES", "TERM", "NO_COLOR", "LANG", "TZ", "HOROVOD_ELASTIC", "HOROVOD_LOCAL_SIZE",
    "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_NODELIST", "MASTER_ADDR", "MASTER_PORT",
    "HOROVOD_FUSION_THRESHOLD", "TORCHELASTIC_RESTART_COUNT", "LOCAL_RANK", "PMIX_NAMESPACE", "GLIBC_TUNABLES",
)  # fmt: skip


def environment(draw: random.Random, world: World) -> Case:
    """Environment variables with invalid values."""
    world.lay_out("idx", Path.cwd())
    Path("runs").rename("elsewhere")
    words = draw.choice([list(TRAIN), ["plan", "small.toml"], ["digest", "elsewhere/small"]])
    if draw.random() < 0.5:
        rank, size = draw.choice(_RANK_PAIRS)
        values = {rank: draw.choice(["0", "3", *_NO_COUNTS]), size: draw.choice(_NO_COUNTS)}
        if draw.random() < 0.3:
            values = {rank: "3", size: "2"}
        if rank == "RANK":
            values["TORCHELASTIC_RESTART_COUNT"] = "0"
        named = [name for name in values if values[name] in {*_NO_COUNTS} or (name == rank and values[size] == "2")]
        return Case("environment ranks", str(values)[:200], words, _REFUSED, named=named, environment=values)
    if draw.random() < 0.4:
        places = ["small.toml", "/dev/null", "/dev/null/x", "/proc/nowhere", "x" * 300, "a/" * 2000, "é\udcff", "cache"]
        values = {draw.choice(["HVD_BATCHGROW_CACHE", "XDG_CACHE_HOME"]): draw.choice(places)}
        if "XDG_CACHE_HOME" in values:
            values["HVD_BATCHGROW_CACHE"] = ""
        return Case("environment cache", str(values)[:200], words, frozenset({0, 1, 75}), environment=values)
    values = {name: draw.choice([*_NO_COUNTS, "0", "2"]) for name in draw.sample(_OTHERS, 3)}
    if values.get("SLURM_PROCID") == "2":  # only the first task prints messages
        values["SLURM_PROCID"] = "0"
    return Case("environment others", str(values)[:200], words, _MAY_TRAIN, environment=values)


KINDS: dict[Make, int] = {
    job_values: 18,
    job_sure_faults: 6,
    job_bytes: 10,
    job_lines: 6,
    job_trained: 8,
    overrides: 10,
    command_words: 8,
    data_files: 14,
    checkpoints: 4,
    sealed_checkpoints: 6,
    run_files: 5,
    probes: 2,
    environment: 3,
}
"""Cases of each kind in a hundred."""


def make_case(seed: int, index: int, world: World) -> Case:
    """Return the case with an index; the same seed gives the same case."""
    draw = random.Random(f"{seed} {index}")  # noqa: S311
    make = draw.choices(list(KINDS), list(KINDS.values()))[0]
    return make(draw, world)
