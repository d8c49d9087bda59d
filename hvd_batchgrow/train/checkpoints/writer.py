"""Write checkpoints in the background: training waits for a copy in memory, but not for the disk."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.comm.broadcast_object import map_state
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, write_best, write_checkpoint


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one at a time.

    As a context manager it waits at the end for the checkpoint that is being written, also if the run fails, but not
    if the user ends it at once (KeyboardInterrupt).

    Args:
        folder: the run's checkpoint folder.
        keep: number of newest checkpoints to keep.
        milestones: sample counters whose checkpoints are never removed; a decision changes them.
    """

    def __init__(self, folder: Path, keep: int, milestones: Collection[int]) -> None:
        self._folder, self._keep, self.milestones = folder, keep, milestones
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, checkpoint: Checkpoint, *, as_best: bool = False) -> None:
        """Wait for the previous write, then copy a checkpoint and start writing it.

        Args:
            checkpoint: its tensors may change as soon as this returns.
            as_best: write it as that of the best evaluation.

        Raises:
            RunError: the previous checkpoint could not be written.
        """
        self.wait()
        copied = host_copy(checkpoint, self._copies)
        # A daemon thread, so that an immediate exit does not wait for it.
        self._thread = threading.Thread(target=self._write, args=(copied, as_best), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not block. Called between updates.

        Raises:
            RunError: a checkpoint could not be written.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Block until the last saved checkpoint is on the disk.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _write(self, checkpoint: Checkpoint, as_best: bool) -> None:
        try:
            if as_best:
                write_best(self._folder, checkpoint)
                return
            write_checkpoint(self._folder, checkpoint, self._keep, self.milestones)
        except Exception as error:  # the training thread raises it again
            self._error = error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, KeyboardInterrupt):
            try:
                self.wait()
            except RunError as failed:
                error.add_note(str(failed))


class HostCopies:
    """Copies checkpoints to host memory, and reuses that memory for the next one."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def copy(self, value: Any) -> Any:
        """Return a copy of dicts, lists, tuples and plain values whose tensors are on the host."""
        reusable, self._buffers = iter(self._buffers), []
        on_device = False

        def copied(tensor: Tensor) -> Tensor:
            nonlocal on_device
            on_device |= tensor.device.type != "cpu"
            buffer = next(reusable, None)
            if buffer is None or _layout(buffer) != _layout(tensor):
                # Copies from a GPU to pinned memory are much faster, and do not wait for each tensor.
                is_pinned = tensor.device.type != "cpu"
                buffer = torch.empty_like(tensor.detach(), device="cpu", pin_memory=is_pinned)
            self._buffers.append(buffer)
            return buffer.copy_(tensor.detach(), non_blocking=True)

        copy = map_state(copied, value)
        if on_device:  # the current device, which `take_device` has set to the one that holds all tensors
            torch.accelerator.synchronize()
        return copy


def host_copy(checkpoint: Checkpoint, copies: HostCopies | None = None) -> Checkpoint:
    """Return a copy of a checkpoint in host memory, that of `copies` if it fits."""
    return Checkpoint(**(copies or HostCopies()).copy(vars(checkpoint)))


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()
