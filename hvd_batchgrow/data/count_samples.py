"""Count the training samples of a source whose size is not known."""

from __future__ import annotations

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.config.split import source_size
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import faults_of
from hvd_batchgrow.tasks.load_task import target_of


def with_counted_samples(job: Job, report: ReportProgress) -> Job:
    """Return the job with `data.num_samples`, counted if neither the job nor the source states the size.

    Args:
        job: the job.
        report: called with the progress of reading; what is read is cached for `train`.

    Raises:
        JobError, RunError: the data cannot be read.
    """
    if source_size(job.data) is not None:
        return job
    with faults_of(job.name):
        whole = job.data.model_copy(update={"validation_fraction": 0.0})
        count = len(load_source(whole, job.seed, report, target_of(job.task), any_size=True).train)
    return job.model_copy(update={"data": job.data.model_copy(update={"num_samples": count})})
