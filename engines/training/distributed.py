"""Several processes that train one network, as torchrun starts them: every one draws items of its own.

Gradients are averaged in one exchange; the first process alone decides how far the training is, and alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engines.base import EngineError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the processes. A missing gradient counts as zero."""
        if self.size == 1:
            return
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= self.size
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()

    def agree(self, progress: float, stop: bool) -> tuple[float, bool]:
        """The first process's progress, and whether any process is asked to stop."""
        if self.size == 1:
            return progress, stop
        said = torch.tensor([progress if self.first else 0.0, float(stop)], dtype=torch.float64, device=self.device)
        dist.all_reduce(said)
        return float(said[0]), bool(said[1] > 0)

    def share(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites tensors by those of the first process."""
        if self.size > 1:
            for tensor in tensors.values():
                dist.broadcast(tensor, 0)


ALONE = Processes()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the processes that torchrun started, or stands alone.

    Args:
        device: auto, cpu or cuda.

    Raises:
        EngineError: CUDA is asked for and not there.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not cuda:
        raise EngineError("device: cuda, but PyTorch sees no NVIDIA GPU here: choose cpu or auto")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if chosen.type == "cuda":
        if chosen.index >= torch.cuda.device_count():
            raise EngineError(f"process {rank} has no GPU of its own: start {torch.cuda.device_count()} a machine")
        torch.cuda.set_device(chosen)
    if size == 1:
        yield Processes(device=chosen)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(rank, size, chosen)
    finally:
        dist.destroy_process_group()
