"""torch.compile: the engine for NVIDIA GPUs where TensorRT is not installed.

The whole path of a frame, from bytes to bytes, is one graph without a break: Inductor writes its kernels, and a CUDA
graph of our own replays them. (Inductor's own CUDA graphs belong to the thread that recorded them; the frames and the
priors come from two.) Where Inductor cannot work (no compiler, no Triton), the CUDA graph of the uncompiled network
serves, and that is reported: replaying is most of the gain, because a frame is hundreds of launches.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch

from engines.arrays import last_line
from engines.cache import cache_folder, private_folder
from engines.gpu_frames import GPUEngine, GPUOptions, Graph, Size, frame_graph_in
from engines.pytorch_engine import PriorGraph

log = logging.getLogger("dspfusion.engines")

Backend = Literal["inductor", "aot_eager", "eager", "none"]


class CompileEngine(GPUEngine):
    """Runs the network compiled by torch.compile. Implements `FusionEngine`; see `GPUEngine` for the arguments.

    Args:
        backend: of torch.compile; "none" captures the uncompiled network.
        tune: let Inductor measure its choices: slower to compile, a little faster to run.
    """

    RUNTIME = "compile"

    def __init__(self, backend: Backend = "inductor", tune: bool = False, **options: Unpack[GPUOptions]) -> None:
        self._backend, self._tune = backend, tune
        super().__init__(**options)

    def _start(self) -> None:
        self._keep_kernels()
        self._frame = frame_graph_in(self.description.precision, self._network())  # type: ignore[arg-type]
        self._prior = PriorGraph(self._network(), self._diffusion_steps)

    def _frame_graph(self, size: Size) -> Graph:
        if self._backend == "none":
            return self._frame
        try:
            return self._compiled(size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever goes wrong in a compiler says nothing about the network: it runs without.
            reason = last_line(getattr(error, "inner_exception", None) or error)  # the outer text ends in advice
            line = f"compile: torch.compile cannot work here ({reason}): the uncompiled network is replayed"
            log.warning("runtime %s", line)
            self._backend = "none"
            self.description = replace(self.description, fallbacks=(*self.description.fallbacks, line))
            return self._frame

    def _prior_graph(self, size: Size) -> Graph:
        return self._prior  # not compiled: it runs every few frames, in the background

    def _compiled(self, size: Size) -> Graph:
        """Compiled, and run once so that a compiler that cannot work here shows it now."""
        import torch._dynamo

        options: Any = {"max_autotune": True} if self._tune and self._backend == "inductor" else None
        # Every size is one more compiled form of the same code; the usual limit of eight is for accidents.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        compiled: Graph = torch.compile(
            self._frame, fullgraph=True, dynamic=False, backend=self._backend, options=options
        )
        degradation, semantic = ((16, width) for width in self._token_widths)
        height, width = size
        with torch.inference_mode():
            compiled(
                torch.zeros(height, width, dtype=torch.uint8, device=self.device),
                torch.zeros(height, width, 3, dtype=torch.uint8, device=self.device),
                *(torch.zeros(shape, device=self.device) for shape in (degradation, degradation, semantic)),
            )
        return compiled

    def _keep_kernels(self) -> None:
        """Has Inductor keep its kernels beside our engines: its own place is one that others can foresee in /tmp."""
        if self._backend != "inductor" or "TORCHINDUCTOR_CACHE_DIR" in os.environ:
            return
        folder = cache_folder().parent / "inductor"
        try:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder(folder))
        except OSError as error:
            self.cache.report(f"{folder} cannot be used for compiled kernels ({error})")

    def close(self) -> None:
        """See `FusionEngine`."""
        super().close()
        self._frame = self._prior = None  # type: ignore[assignment]
