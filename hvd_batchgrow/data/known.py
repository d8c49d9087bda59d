"""What is known of a source without touching it."""

from __future__ import annotations

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.errors import Fault, JobError

_NUM_TRAIN = {
    "fashion_mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "imagenet": 1_281_167,
    "covtype": 581_012,  # all of it: a job that holds some back for testing says data.num_samples
}


def known_num_samples(data: DataSection) -> int:
    """N without touching the data: what the job says, or what is known of the source.

    Raises:
        JobError: neither is there.
    """
    known = data.num_samples or _NUM_TRAIN.get(data.source)
    if known is None:
        raise JobError([Fault("data.num_samples", f"is needed: the size of a source {data.source!r} is not known")])
    return known
