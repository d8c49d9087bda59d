"""MACHINE.toml: published figures of a machine and a model, to predict costs that cannot be measured yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.types import Section
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.value_faults import value_fault
from hvd_batchgrow.schedule.cost.allreduce import Algorithm, Link, SyncCost, hierarchical_cost
from hvd_batchgrow.schedule.cost.probe_file import Count
from hvd_batchgrow.schedule.cost.step_time import StepTime
from hvd_batchgrow.storage.toml_file import read_toml

_LONGEST_S = 1e9
"""Longest credible time of a sample, a byte, a micro-batch or a message, about 30 years; a total stays finite."""
_Positive = Annotated[float, Field(gt=0)]
_Rate = Annotated[float, Field(ge=1 / _LONGEST_S)]
_Seconds = Annotated[float, Field(ge=0, le=_LONGEST_S)]
_Microseconds = Annotated[float, Field(ge=0, le=1e6 * _LONGEST_S)]
_Text = Annotated[str, Field(min_length=1)]


class Compute(Section):
    """What one rank computes. Its speed is `samples_per_s`, or `flop_per_s` / `flop_per_sample`."""

    model: _Text
    """`model.name` of the jobs that the figures hold for."""
    num_parameters: Count
    """Trained parameters; the job's `update.allreduce_dtype` and `layout.exact` give the bytes of each."""
    samples_per_s: _Rate | None = None
    """Samples that one rank trains in a second: forward, backward and data."""
    flop_per_sample: _Positive | None = None
    """Floating-point operations of training one sample."""
    flop_per_s: _Positive | None = None
    """Floating-point operations per second that one rank reaches, which is less than the vendor's peak."""
    micro_batch_s: _Seconds = 0.0
    """a: seconds of a micro-batch in addition to those of its samples."""
    fixed_s: _Seconds = 0.0
    """f: seconds of an update whatever its size, such as the optimizer step."""
    overlap: Annotated[float, Field(ge=1, le=10)] = 1.0
    """c. With 1, the all-reduce follows the last backward pass; with 10, almost all of the shorter one is hidden."""

    @model_validator(mode="after")
    def _check_speed(self) -> Compute:
        by_flop = (self.flop_per_sample is not None) + (self.flop_per_s is not None)
        if (self.samples_per_s is not None) + by_flop / 2 != 1:
            raise ValueError("must have either samples_per_s, or both flop_per_sample and flop_per_s")
        if self.sample_s > _LONGEST_S:
            raise ValueError(f"flop_per_sample / flop_per_s must be at most {_LONGEST_S:g} s, got {self.sample_s:g}")
        return self

    @property
    def sample_s(self) -> float:
        """b: seconds of one sample."""
        if self.samples_per_s is not None:
            return 1 / self.samples_per_s
        assert self.flop_per_sample is not None
        assert self.flop_per_s is not None
        return self.flop_per_sample / self.flop_per_s


class Network(Section):
    """The links between hosts."""

    gigabytes_per_s: _Rate
    """Bandwidth of a host in one direction, all its links together; 1 GB = 10⁹ bytes, 8 Gbit."""
    latency_us: _Microseconds
    """Microseconds of an empty message from a rank to one on another host."""
    algorithm: Algorithm = "ring"
    """Of the all-reduce between hosts."""

    @property
    def link(self) -> Link:
        """The link in seconds and bytes."""
        return Link(1e-6 * self.latency_us, 1e-9 / self.gigabytes_per_s)


class Host(Section):
    """The ranks of one host and their links."""

    ranks: Count = 1
    gigabytes_per_s: _Rate = 1.0
    """Bandwidth of a rank to the others of its host, in one direction."""
    latency_us: _Microseconds = 0.0
    """Microseconds of an empty message to another rank of the host."""

    @property
    def link(self) -> Link:
        """The link in seconds and bytes."""
        return Link(1e-6 * self.latency_us, 1e-9 / self.gigabytes_per_s)


class Machine(Section):
    """The content of MACHINE.toml."""

    name: _Text
    source: _Text
    """Where the figures are published, and what is assumed; `plan` prints it."""
    compute: Compute
    network: Network
    host: Host = Host()

    @model_validator(mode="after")
    def _check_host(self) -> Machine:
        missing = {"gigabytes_per_s", "latency_us"} - self.host.model_fields_set
        if self.host.ranks > 1 and missing:
            raise ValueError(f"[host] with {self.host.ranks} ranks needs {' and '.join(sorted(missing))}")
        return self


_SECTIONS: dict[str, type[Section]] = {"compute": Compute, "network": Network, "host": Host}


def load_machine(path: Path) -> Machine:
    """Read a MACHINE.toml.

    Raises:
        JobError: it cannot be read or is not TOML, or values are missing, unknown or impossible; lists them all.
    """
    tree = read_toml(path)
    if {"data", "schedule"} <= tree.keys():
        fault = "is a job file; --cost needs the PROBE.json of hvd-batchgrow probe, or a MACHINE.toml"
        raise JobError([Fault("", fault)], str(path))
    try:
        return Machine.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False)
    raise JobError([Fault(".".join(map(str, detail["loc"])), _fault(detail)) for detail in details], str(path))


def _fault(detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        section = _SECTIONS[detail["loc"][0]] if len(detail["loc"]) > 1 else Machine
        return f"unknown key; known here: {', '.join(section.model_fields)}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return value_fault([detail])


class MachineTimes:
    """The step-time model of a machine, for every number of ranks.

    Args:
        machine: the figures.
        job: gives the bytes of a parameter.

    Raises:
        JobError: the figures are for another model.
    """

    def __init__(self, machine: Machine, job: Job) -> None:
        compute = machine.compute
        if compute.model != job.model.name:
            figures = f"{machine.name!r} has figures for {compute.model!r}"
            fault = f"is {job.model.name!r}, but {figures}: use a file with figures for the job's model"
            raise JobError([Fault("model.name", fault)], job.name)
        self._machine = machine
        self.gradient_bytes = compute.num_parameters * _bytes_per_parameter(job)
        self.origin: str | None = f"predicted from figures, not measured: {machine.name}: {machine.source}"

    @property
    def summing_ranks(self) -> tuple[int, ...]:
        """No number of ranks was measured."""
        return ()

    def sync(self, ranks: int) -> SyncCost:
        """Return the cost of an all-reduce over a number of ranks."""
        host, network = self._machine.host, self._machine.network
        return hierarchical_cost(ranks, host.ranks, host.link, network.link, network.algorithm)

    def at(self, ranks: int) -> StepTime:
        """Return the model for a number of ranks."""
        compute, sync = self._machine.compute, self.sync(ranks)
        return StepTime(
            ranks=ranks,
            fixed_s=compute.fixed_s,
            pass_s=compute.micro_batch_s,
            sample_s=compute.sample_s,
            sync_s=sync.latency_s,
            sync_s_per_byte=sync.s_per_byte,
            overlap=compute.overlap,
            misfit=0.0,
            micro_batches=(1, 1 << 53),
            data_wait_share=None,
            measured_ranks=ranks,
        )


def _bytes_per_parameter(job: Job) -> int:
    if job.layout.exact:
        return 8  # exact sums are int64
    return 4 if job.update.allreduce_dtype == "none" else 2
