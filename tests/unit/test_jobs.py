"""The shipped jobs against the papers: every count is from the paper, or worked out here from N, epochs and batches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvd_batchgrow.data.source_checks import check_data, known_num_samples
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.nn.checks.model_keys import check_network
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest, form_decision
from hvd_batchgrow.schedule.plan import Plan, compile_plan

JOBS = Path(__file__).parents[2] / "jobs"


@dataclass(frozen=True)
class Course:
    """What the jobs of one experiment share."""

    num_samples: int
    ends_epochs: tuple[int, ...]
    """Where each phase ends."""
    noise_factor: float
    """By how much the noise scale falls at every boundary."""


@dataclass(frozen=True)
class Row:
    """One job."""

    course: Course
    lr: float
    momentum: float
    batches: tuple[int, ...]
    updates: tuple[int, ...]


SMITH_CIFAR = Course(50_000, (60, 120, 160, 200), 5.0)
SMITH_IMAGENET = Course(1_281_167, (30, 60, 80, 90), 10.0)
ADABATCH_CIFAR = Course(50_000, (20, 40, 60, 80, 100), 2 / 0.75)  # β/α
ADABATCH_IMAGENET = Course(1_281_167, (30, 60, 90), 2 / 0.2)
COVER_TYPE = Course(464_809, (10, 20, 30, 40, 50), 5.0)
FASHION = Course(60_000, (3, 7, 10, 12), 5.0)
FASHION_LATE = Course(60_000, (6, 8, 10, 12), (5888 / 128) ** (1 / 3))

# 10⁶ samples a phase: /128 = 7812.5, up, 64 too many; (10⁶ - 64)/256 = 3906, none too many; 10⁶/512 = 1953.1, up,
# 448 too many; (10⁶ - 448)/1024 = 976.1, up, 896 too many; (10⁶ - 896)/2048 = 487.8, up.
_ADABATCH_BATCHES, _ADABATCH_UPDATES = (128, 256, 512, 1024, 2048), (7813, 3906, 1954, 977, 488)

ROWS = {
    # Smith et al. 2018 (arXiv 1711.00489), §5.1 and §5.2.
    "cifar10_wrn16_4_decay": Row(SMITH_CIFAR, 0.1, 0.9, (128,) * 4, (23438, 23437, 15625, 15625)),
    # 4687 · 640 = 2 999 680 is short of the 60 epochs; then 40 epochs are 2 · 10⁶ = 3125 · 640.
    "cifar10_wrn16_4_hybrid": Row(SMITH_CIFAR, 0.1, 0.9, (128, 640, 640, 640), (23438, 4688, 3125, 3125)),
    "cifar10_wrn16_4_grow": Row(SMITH_CIFAR, 0.1, 0.9, (128, 640, 3200, 5120), (23438, 4688, 625, 391)),
    "cifar10_wrn16_4_grow_lr": Row(SMITH_CIFAR, 0.5, 0.9, (640, 3200, 5120, 5120), (4688, 938, 391, 390)),
    "cifar10_wrn16_4_grow_momentum": Row(SMITH_CIFAR, 0.5, 0.98, (3200, 5120, 5120, 5120), (938, 586, 391, 390)),
    # The same, §5.3 and, for ResNet-50, §5. 30 epochs are 38 435 010 samples: /8192 = 4691.8; /65536 = 586.5;
    # /81920 = 469.2; /16384 = 2345.9. What a phase takes too many, the next has less.
    "imagenet_inception_resnet_v2_decay": Row(SMITH_IMAGENET, 3.0, 0.9, (8192,) * 4, (4692, 4692, 3128, 1564)),
    "imagenet_inception_resnet_v2_grow": Row(
        SMITH_IMAGENET, 3.0, 0.9, (8192, 65536, 65536, 65536), (4692, 587, 391, 195)
    ),
    "imagenet_inception_resnet_v2_grow_to_81920": Row(
        SMITH_IMAGENET, 3.0, 0.9, (8192, 81920, 81920, 81920), (4692, 470, 312, 157)
    ),
    "imagenet_inception_resnet_v2_grow_m095": Row(
        SMITH_IMAGENET, 3.0, 0.95, (16384, 65536, 65536, 65536), (2346, 587, 391, 195)
    ),
    "imagenet_inception_resnet_v2_grow_m0975": Row(
        SMITH_IMAGENET, 3.0, 0.975, (32768, 65536, 65536, 65536), (1173, 587, 391, 195)
    ),
    "imagenet_resnet50_grow": Row(SMITH_IMAGENET, 3.2, 0.9, (8192, 16384, 16384, 16384), (4692, 2346, 1564, 782)),
    # Devarakonda et al. 2017 (arXiv 1712.02029).
    "cifar10_alexnet_adabatch": Row(ADABATCH_CIFAR, 0.01, 0.9, _ADABATCH_BATCHES, _ADABATCH_UPDATES),
    "cifar10_resnet20_adabatch": Row(ADABATCH_CIFAR, 0.1, 0.9, _ADABATCH_BATCHES, _ADABATCH_UPDATES),
    "cifar10_vgg19_adabatch": Row(ADABATCH_CIFAR, 0.1, 0.9, _ADABATCH_BATCHES, _ADABATCH_UPDATES),
    "cifar100_alexnet_adabatch": Row(ADABATCH_CIFAR, 0.01, 0.9, _ADABATCH_BATCHES, _ADABATCH_UPDATES),
    "cifar100_resnet20_adabatch": Row(ADABATCH_CIFAR, 0.1, 0.9, _ADABATCH_BATCHES, _ADABATCH_UPDATES),
    "cifar100_vgg19_adabatch": Row(ADABATCH_CIFAR, 0.1, 0.9, _ADABATCH_BATCHES, _ADABATCH_UPDATES),
    "imagenet_resnet50_adabatch": Row(ADABATCH_IMAGENET, 3.2, 0.9, (8192, 16384, 32768), (4692, 2346, 1173)),
    # N/10 = 46 480 is 726 ghost batches of 64: 46 464. 10 epochs are 4 648 090 samples: /256 = 18156.6;
    # /1280 = 3631.3; /6400 = 726.3; /32000 = 145.3; /46464 = 100.04, less what the phase before took too many.
    "covtype_dense7_grow": Row(COVER_TYPE, 6e-4, 0.9, (256, 1280, 6400, 32000, 46464), (18157, 3632, 727, 146, 100)),
    # The CIFAR-10 rows of Smith et al. for two cores. 3, 4, 3 and 2 epochs: /128 = 1406.25, 1875, 1406.25, 937.5;
    # /640 = 281.25, 375, 281.25, 187.5; /1280 = 140.6; /3200 = 56.25; /5888 = 40.8, 30.6, 20.4.
    "fashion_mnist_decay": Row(FASHION, 0.1, 0.9, (128,) * 4, (1407, 1875, 1406, 937)),
    "fashion_mnist_hybrid": Row(FASHION, 0.1, 0.9, (128, 640, 640, 640), (1407, 375, 282, 187)),
    # 128 grows to 640, 3200 and 16 000; N/10 = 6000 holds 46 times the 128 samples of two ranks: 5888.
    "fashion_mnist_grow": Row(FASHION, 0.1, 0.9, (128, 640, 3200, 5888), (1407, 375, 57, 20)),
    # /2560 = 70.3, 46.9.
    "fashion_mnist_quickstart": Row(FASHION, 0.1, 0.9, (128, 640, 2560, 2560), (1407, 375, 71, 47)),
    # 128 · 3.583 = 458.6 and 128 · 12.84 = 1643.3, in multiples of 128.
    "fashion_mnist_late": Row(FASHION_LATE, 0.1, 0.9, (128, 512, 1664, 5888), (2813, 235, 72, 21)),
    "fashion_mnist_grow_lr": Row(FASHION, 0.5, 0.9, (640, 3200, 5888, 5888), (282, 75, 31, 20)),
    "fashion_mnist_grow_momentum": Row(FASHION, 0.5, 0.95, (1280, 5888, 5888, 5888), (141, 41, 31, 20)),
}

TOTALS = {
    "cifar10_wrn16_4_decay": 78125,
    "cifar10_wrn16_4_grow": 29142,
    "cifar10_wrn16_4_grow_lr": 6407,
    "cifar10_wrn16_4_grow_momentum": 2305,
    "imagenet_inception_resnet_v2_decay": 14076,
    "imagenet_inception_resnet_v2_grow": 5865,
    "imagenet_inception_resnet_v2_grow_to_81920": 5631,
    "imagenet_inception_resnet_v2_grow_m095": 3519,
    "imagenet_inception_resnet_v2_grow_m0975": 2346,
    "imagenet_resnet50_grow": 9384,
}
"""Updates that the rows of the papers come to."""

_FORMULAS = ("norm_test", "cabs", "similarity", "gradient_noise")
MEASURED = {
    **dict.fromkeys(
        [f"fashion_mnist_{trigger}" for trigger in (*_FORMULAS, "plateau", "branch")],
        (60_000, 128, 46 * 128),
    ),
    "fashion_mnist_adascale": (60_000, 512, 46 * 128),
    "covtype_dense7_plateau": (464_809, 256, 181 * 256),
}
"""N, the first batch, and the largest: N/10 in whole first batches."""

each_job = pytest.mark.parametrize("name", sorted(ROWS))
# The quickstart's header is its own.
each_header = pytest.mark.parametrize("name", sorted(ROWS.keys() - {"fashion_mnist_quickstart"}))


def header(name: str) -> list[str]:
    """The lines of comment that a job file opens with."""
    lines = (JOBS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    return lines[: next(k for k, line in enumerate(lines) if not line.startswith("#"))]


def ranks_of_header(name: str) -> int:
    launch = re.search(r"mpirun -np (\d+) ", "\n".join(header(name)))
    return int(launch[1]) if launch else 1


def plan_of(name: str, ranks: int) -> Plan:
    job = load_job(JOBS / f"{name}.toml")
    return compile_plan(job, ranks, known_num_samples(job.data))


def updates_by_hand(course: Course, batches: tuple[int, ...]) -> tuple[int, ...]:
    """Each phase takes the fewest whole batches that bring the sample counter to its end."""
    samples, updates = 0, []
    for end_epoch, batch in zip(course.ends_epochs, batches, strict=True):
        updates.append(-((samples - end_epoch * course.num_samples) // batch))
        samples += updates[-1] * batch
    return tuple(updates)


def first_noise(row: Row) -> float:
    """ε N / (B (1-m)) of the first phase; ε N / B for Adam, with which the cover type is trained."""
    rest = 1 if row.course is COVER_TYPE else 1 - row.momentum
    return row.lr * row.course.num_samples / (row.batches[0] * rest)


def test_every_shipped_job_has_a_row() -> None:
    assert {path.stem for path in JOBS.glob("*.toml")} == set(ROWS) | set(MEASURED)


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_a_measured_job_begins_as_its_row_says_and_may_grow_to_a_tenth(name: str) -> None:
    num_samples, batch, largest = MEASURED[name]
    plan = plan_of(name, ranks_of_header(name))
    phase = plan.schedule.phases[0]
    assert (plan.num_samples, phase.global_batch) == (num_samples, batch)
    request = BatchRequest("the largest batch", batch=float(num_samples))
    decision = form_decision(plan.job, num_samples, (), 100 * batch, request, {})
    assert decision is not None
    assert decision.new_batch == largest
    assert compile_plan(plan.job, plan.num_ranks, num_samples, None, [decision]).layouts[-1].uneven_ranks is False


@each_job
def test_every_key_of_data_is_used_by_its_source(name: str) -> None:
    assert check_data(load_job(JOBS / f"{name}.toml").data) == []


@pytest.mark.parametrize("name", sorted(name for name in ROWS if name.startswith(("cifar", "imagenet"))))
def test_a_job_for_gpus_uses_tensor_cores_or_says_why_not(name: str) -> None:
    job = load_job(JOBS / f"{name}.toml")
    (line,) = [line for line in (JOBS / f"{name}.toml").read_text().splitlines() if line.startswith("precision = ")]
    if "resnet20" in name or "alexnet" in name:
        assert (job.update.precision, job.data.channels_last) == ("float32", False)
        assert "# as published; not tried in bfloat16" in line
    else:
        assert (job.update.precision, job.data.channels_last) == ("bfloat16", True)
        assert "# ours, for GPUs, as is channels_last" in line


@each_job
def test_the_rows_are_whole_batches_up_to_each_boundary(name: str) -> None:
    row = ROWS[name]
    assert row.updates == updates_by_hand(row.course, row.batches)
    assert sum(row.updates) == TOTALS.get(name, sum(row.updates))


@each_job
@pytest.mark.parametrize("launch", ["one rank", "the header's ranks"])
def test_every_job_is_planned_to_its_row(name: str, launch: str) -> None:
    row = ROWS[name]
    plan = plan_of(name, 1 if launch == "one rank" else ranks_of_header(name))
    phases = plan.schedule.phases
    assert plan.num_samples == row.course.num_samples
    assert tuple(phase.global_batch for phase in phases) == row.batches
    assert tuple(phase.num_updates for phase in phases) == row.updates
    assert (phases[0].lr, phases[0].momentum) == pytest.approx((row.lr, row.momentum), rel=1e-12)
    for layout, batch in zip(plan.layouts, row.batches, strict=True):
        assert layout.ranks * layout.accumulation * layout.micro_batch == batch


@each_job
def test_the_noise_falls_by_the_factor_at_every_boundary(name: str) -> None:
    row, plan = ROWS[name], plan_of(name, 1)
    noise = [plan.noise_scale(phase) for phase in plan.schedule.phases]
    by_hand = [first_noise(row) / row.course.noise_factor**k for k in range(len(row.batches))]
    assert noise == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("family", ["cifar10_wrn16_4_", "imagenet_inception_resnet_v2_", "fashion_mnist_"])
def test_the_schedules_of_a_family_have_the_same_noise(family: str) -> None:
    members = [row for name, row in ROWS.items() if name.startswith(family)]
    assert len(members) >= 5
    assert [first_noise(row) for row in members] == pytest.approx([first_noise(members[0])] * len(members), rel=1e-12)


@pytest.mark.parametrize("name", sorted(ROWS.keys() | MEASURED.keys()))
def test_a_header_is_short_and_says_command_and_time(name: str) -> None:
    lines = header(name)
    assert len(lines) <= 12
    assert sum(f"hvd-batchgrow train jobs/{name}.toml" in line for line in lines) == 1
    (time,) = [line for line in lines if line.startswith("# Time: ")]
    assert re.search(r" \d+ (s|minutes) on |with `hvd-batchgrow probe` and `plan --cost`", time)
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("name", sorted(name for name in MEASURED if name.startswith("fashion_mnist_")))
def test_a_measured_header_says_its_updates_and_those_of_the_decaying_schedule(name: str) -> None:
    text = " ".join(line.removeprefix("#").strip() for line in header(name))
    own, decaying = re.findall(r"\b(\d+) updates\b", text)
    assert int(decaying) == sum(ROWS["fashion_mnist_decay"].updates)
    assert int(own) < int(decaying)


@each_header
def test_a_header_says_its_updates(name: str) -> None:
    lines = header(name)
    stated = [found[1] for line in lines if (found := re.match(r"# (\d+) updates\b", line))]
    assert stated == [str(plan_of(name, 1).num_updates)]


@each_job
def test_every_key_of_model_is_used_by_its_network(name: str) -> None:
    assert check_network(load_job(JOBS / f"{name}.toml").model) == []


@each_job
def test_a_header_says_what_to_install_for_a_network_of_another_package(name: str) -> None:
    package, _, own = load_job(JOBS / f"{name}.toml").model.name.partition(".models:")
    wanted = {"": [], "torchvision": ["torchvision"], "timm": ["timm", "torchvision"]}[package if own else ""]
    installs = [found[1].split() for line in header(name) if (found := re.search(r"pip install (.*) torch==", line))]
    assert installs == ([wanted] if wanted else [])
