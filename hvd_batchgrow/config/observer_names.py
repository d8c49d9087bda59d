"""`logging.observers`: the names of further observers."""

from __future__ import annotations

from hvd_batchgrow.config.own_code import checked_name

SERVICES = {"mlflow": "MLflow", "wandb": "WeightsAndBiases"}
"""Names of the services, and their observer classes in `observers/NAME.py`. The extra NAME installs the packages."""


def check_observer(name: str) -> str:
    """Return the name. Raises ValueError if it is neither a service nor `module:name`; the message suggests one."""
    if name.lower() == "tensorboard":
        raise ValueError(
            f"use logging.tensorboard for TensorBoard; observers are {', '.join(SERVICES)}, or your own module:name"
        )
    return checked_name(name, SERVICES)
