"""Data for TensorBoard's hparams tab: the hyperparameters of a run, and the names of its result curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName, Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

HPARAMS_TAGS = (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)

_SHOWN = {"optim.lr", "schedule.epochs", "schedule.global_batch", "schedule.policy", "seed"}
"""The tab has columns for the first five keys, in the order of their names; the user can select others. Keys that are
marked as differing between runs come first."""


def hparams_summaries(
    name: str, values: Mapping[str, bool | int | float | str], results: Sequence[str]
) -> tuple[Summary, ...]:
    """Return the row of a finished run.

    `torch.utils.tensorboard.summary.hparams` writes booleans as numbers, and cannot choose the columns.

    Args:
        name: of the run.
        values: of its hyperparameters.
        results: names of curves, whose last values are the results; the tab shows the first one.
    """
    kinds = {key: _kind(value) for key, value in values.items()}
    infos = [HParamInfo(name=key, type=kind, differs=key in _SHOWN) for key, kind in kinds.items()]
    metrics = [MetricInfo(name=MetricName(tag=tag)) for tag in results]
    start = SessionStartInfo(group_name=name)
    for key, value in values.items():
        setattr(start.hparams[key], _FIELDS[kinds[key]], value)
    return (
        _summary(HPARAMS_TAGS[0], HParamsPluginData(experiment=Experiment(hparam_infos=infos, metric_infos=metrics))),
        _summary(HPARAMS_TAGS[1], HParamsPluginData(session_start_info=start)),
        _summary(
            HPARAMS_TAGS[2], HParamsPluginData(session_end_info=SessionEndInfo(status=Status.Value("STATUS_SUCCESS")))
        ),
    )


_BOOL, _NUMBER, _TEXT = (DataType.Value(f"DATA_TYPE_{kind}") for kind in ("BOOL", "FLOAT64", "STRING"))
_FIELDS = {_BOOL: "bool_value", _NUMBER: "number_value", _TEXT: "string_value"}


def _kind(value: bool | int | float | str) -> int:
    if isinstance(value, bool):
        return int(_BOOL)
    return int(_TEXT if isinstance(value, str) else _NUMBER)


def _summary(tag: str, data: HParamsPluginData) -> Summary:
    value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])
