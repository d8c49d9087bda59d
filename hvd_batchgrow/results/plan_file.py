"""Read plan.json of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hvd_batchgrow.messages.errors import RunError, first_fault, unreadable
from hvd_batchgrow.messages.suggest import near_run
from hvd_batchgrow.storage.regular_files import read_regular


def read_plan(run: Path) -> dict[str, Any]:
    """Return the plan of a run as plain values, as `plan --json` prints it.

    Raises:
        RunError: it cannot be read, or keys that readers need are missing or have another type.
    """
    path = run / "plan.json"
    try:
        tree = json.loads(read_regular(path))
        _Plan.model_validate(tree)
    except ValidationError as error:
        raise RunError(f"{path} is damaged, or not a plan: {first_fault(error)}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{run} does not hold a run{near_run(run)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    return tree  # type: ignore[no-any-return]


class _Schedule(BaseModel):
    policy: str


class _Job(BaseModel):
    model_config = ConfigDict(strict=True)
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    schedule: _Schedule
    task: dict[str, Any] = {}


class _Phase(BaseModel):
    model_config = ConfigDict(strict=True)
    start_samples: Annotated[int, Field(ge=0, lt=2**62)]
    lr: float
    global_batch: Annotated[int, Field(gt=0, lt=2**62)]
    num_updates: Annotated[int, Field(ge=0, lt=2**62)]


class _Plan(BaseModel):
    """The keys of a written plan that its readers need."""

    model_config = ConfigDict(strict=True)
    job: str
    num_samples: Annotated[int, Field(gt=0, lt=2**62)]
    end_samples: Annotated[int, Field(gt=0, lt=2**62)]
    num_updates: Annotated[int, Field(ge=0, lt=2**62)]
    job_file: _Job
    phases: Annotated[list[_Phase], Field(min_length=1)]
