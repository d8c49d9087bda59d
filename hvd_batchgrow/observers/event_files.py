"""TensorBoard's event files in a run folder, and the points to keep when a run resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

_PATTERN = "events.out.tfevents.*"


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a folder, the oldest first."""
    return sorted(folder.glob(_PATTERN))


def points_up_to(
    files: list[Path], samples: int, dropped: frozenset[str], repeated: tuple[str, ...] = ()
) -> list[Event]:
    """Return the points of a run up to its checkpoint, one per tag and step, in the order of the steps.

    Later points will be trained again. If a writer was killed, its file may end within an event; reading stops there.

    Args:
        files: from `event_files`. Two files have the same points if an earlier resume was killed.
        samples: sample counter of the checkpoint; 0: keep no points.
        dropped: tags that the resumed run writes again.
        repeated: prefixes of tags whose points at the checkpoint it writes again.
    """
    kept = {}
    for event in _events(files) if samples else ():
        tags = tuple(value.tag for value in event.summary.value)
        is_repeated = event.step == samples and any(tag.startswith(repeated) for tag in tags)
        if tags and event.step <= samples and not dropped & {*tags} and not is_repeated:
            kept[tags, event.step] = event
    return sorted(kept.values(), key=lambda event: event.step)


def _events(files: list[Path]) -> Iterator[Event]:
    for path in files:
        yield from map(Event.FromString, RawEventFileLoader(str(path)).Load())
