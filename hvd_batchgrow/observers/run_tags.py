"""Tags by which a service can filter runs."""

from __future__ import annotations

from hvd_batchgrow.results.run_files import read_attempts
from hvd_batchgrow.train.events import RunStarted

_TWIN = "-twin"


def run_tags(start: RunStarted) -> dict[str, str]:
    """Return the policy, the pair of a run and its twin, and the commits of this package and of the user's code.

    A commit is missing if the code is not in a git checkout, or if record.json cannot be read.
    """
    name = start.job.name
    is_twin = name.endswith(_TWIN) and start.job.schedule.is_own_twin
    tags = {
        "policy": start.job.schedule.policy,
        "pair": name.removesuffix(_TWIN) if is_twin else name,
        "twin": "yes" if is_twin else "no",
    }
    attempt = ({}, *read_attempts(start.folder / "record.json"))[-1]
    commits = {"commit": attempt.get("git_commit"), "user_commit": attempt.get("user_git_commit")}
    return tags | {key: commit for key, commit in commits.items() if isinstance(commit, str)}
