"""`logging.observers`: the names of further observers."""

from __future__ import annotations

from difflib import get_close_matches

from hvd_batchgrow.config.own_code import is_module_name

SERVICES = {"mlflow": "MLflow", "wandb": "WeightsAndBiases"}
"""Names of the services, and their observer classes in `observers/NAME.py`. The extra NAME installs the packages."""


def check_observer(name: str) -> str:
    """Return the name. Raises ValueError if it is neither a service nor `module:name`; the message suggests one."""
    if name in SERVICES or is_module_name(name):
        return name
    if name.lower() == "tensorboard":
        raise ValueError(f"use logging.tensorboard for TensorBoard; observers are {_CHOICES}")
    near = get_close_matches(name.lower(), SERVICES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{hint}one of {_CHOICES}")


_CHOICES = f"{', '.join(SERVICES)}, or your own module:name"
