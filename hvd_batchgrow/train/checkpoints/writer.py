"""Write checkpoints in the background: training waits for a copy in memory, but not for the disk."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, write_checkpoint


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one at a time.

    As a context manager it waits at the end for the checkpoint that is being written, also if the run fails, but not
    if the user ends it at once (KeyboardInterrupt).

    Args:
        folder: the run's checkpoint folder.
        keep: number of newest checkpoints to keep.
        milestones: sample counters whose checkpoints are never removed.
    """

    def __init__(self, folder: Path, keep: int, milestones: Collection[int]) -> None:
        self._folder, self._keep, self._milestones = folder, keep, milestones
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def keep_for_good(self, samples: int) -> None:
        """Add the sample counter of a checkpoint to the milestones."""
        self._milestones = {*self._milestones, samples}

    def save(self, checkpoint: Checkpoint) -> None:
        """Wait for the previous write, then copy a checkpoint and start writing it.

        Args:
            checkpoint: its tensors may change as soon as this returns.

        Raises:
            RunError: the previous checkpoint could not be written.
        """
        self.wait()
        copied = Checkpoint(
            **{f.name: self._copies.copy(f.name, getattr(checkpoint, f.name)) for f in fields(Checkpoint)}
        )
        self._copies.finish()
        # A daemon thread, so that an immediate exit does not wait for it.
        self._thread = threading.Thread(target=self._write, args=(copied,), name="checkpoint", daemon=True)
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

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            write_checkpoint(self._folder, checkpoint, self._keep, self._milestones)
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
    """Copies trees of tensors to host memory, and reuses that memory for the next tree."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._from_gpu = False

    def copy(self, path: str, value: Any) -> Any:
        """Return a copy of a tree with its tensors on the host; complete once `finish` has returned.

        Args:
            path: of the value in the whole tree.
            value: dicts, lists, tuples, tensors and plain values.
        """
        if isinstance(value, Tensor):
            return self._copy_tensor(path, value.detach())
        if isinstance(value, Mapping):
            return {key: self.copy(f"{path}/{key}", item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.copy(f"{path}/{index}", item) for index, item in enumerate(value))
        return value

    def finish(self) -> None:
        """Wait for copies from the GPU."""
        if self._from_gpu:
            torch.cuda.synchronize()

    def _copy_tensor(self, path: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        ):
            # Copies from a GPU to pinned memory are much faster, and do not wait for each tensor.
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[path] = buffer
        self._from_gpu |= tensor.is_cuda
        return buffer.copy_(tensor, non_blocking=True)
