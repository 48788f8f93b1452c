"""OpenVINO: the compiled engine for processors.

PyTorch is needed only to convert; what is converted is cached together with PyTorch's answer to the reference pair, so
a warm start checks against that answer and never imports torch. One network is compiled for each picture size, because
fixed shapes are what the compiler plans best for. Frames go in and come out as bytes: conversion and padding are in the
graph.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engines.arrays import (
    REFERENCE_SIZE,
    Image,
    Proofs,
    Reference,
    checked_pair,
    checked_priors,
    last_line,
    picture_of,
    priors_from,
    refuse_unless_close,
    shape_of,
    weights_sha256,
)
from engines.base import EngineDescription, EngineError, Priors
from engines.cache import EngineCache, cache_key, processor_fingerprint, source_sha256

if TYPE_CHECKING:
    from engines.pytorch_engine import PyTorchEngine

CLOSE_PATIENCE_S = 1.0  # a compiler cannot be interrupted; what it makes is then left to it
SIZES_KEPT = 4  # compiled sizes; the least recently added goes
GRAPHS = ("priors", "frame")
HINTS = {"fp32": "f32", "bf16": "bf16"}


def import_openvino() -> types.ModuleType:
    """OpenVINO, without its telemetry.

    The plain import reports itself to a server of its maker and writes into the home folder. OpenVINO does without
    where the package for that is missing, so it is made to look missing, in this process alone.

    Raises:
        EngineError: if OpenVINO cannot be imported.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino

        if not hasattr(openvino, "Core"):
            raise ImportError(f"version {getattr(openvino, '__version__', 'unknown')} has no Core")
    except Exception as error:  # a broken installation raises more than ImportError
        raise EngineError(
            f"OpenVINO cannot be imported ({last_line(error)}): install it again, or use runtime 'pytorch'"
        ) from error
    return openvino


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, and no more than a container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit, or "max"
        return cores


def default_threads() -> int:
    """Threads for the frames when none are asked for: two cores stay free for the other stages where there are more.

    On two cores both are taken: at 640x480 two threads need 18 ms where one needs 31, for a seventh more processor
    time, and the other stages fill the gaps.
    """
    cores = usable_cores()
    return min(cores, max(2, min(8, cores - 2)))


class OpenVINOEngine:
    """Runs the compiled network on the processor. Implements `FusionEngine`.

    Args:
        variant: a name of `engines.dspfusion.variants.VARIANTS`.
        weights: a safetensors file; None takes the shipped weights.
        precision: "fp32", "bf16", or "auto": bf16 where the processor computes in it, fp32 elsewhere. The hint is
            always given, because the default differs between machines and with it the pictures. Priors are always fp32.
        threads: for each frame; 0 chooses. Priors get one thread, they run beside the frames.
        at_once: frames that are fused at the same time by as many callers.
        diffusion_steps: 1 to 10.
        cache: where converted networks are kept; None takes the user's cache folder.

    Raises:
        EngineError: if OpenVINO or the weights cannot be loaded, the precision is not served, or the result is not
            PyTorch's within its tolerance.
    """

    def __init__(
        self,
        variant: str = "nano",
        weights: Path | None = None,
        precision: str = "auto",
        threads: int = 0,
        diffusion_steps: int = 4,
        why: str = "asked for",
        cache: EngineCache | None = None,
        at_once: int = 1,
    ) -> None:
        self._openvino = import_openvino()
        self._core = self._openvino.Core()
        self._variant, self._weights, self._diffusion_steps = variant, weights, diffusion_steps
        shape = shape_of(variant)
        self._token_widths = (shape.degradation_tokens, shape.semantic_tokens)
        self._folds = shape.output == "restored"
        self.cache = EngineCache() if cache is None else cache
        self._compiled: dict[tuple[int, int], dict[str, _Program]] = {}
        self._compiling = threading.Lock()
        self._reference_network: PyTorchEngine | None = None
        self._proofs = Proofs(self.cache)
        self._aside: list[tempfile.TemporaryDirectory[str]] = []
        self._closed = False
        self.description = EngineDescription(
            runtime="openvino",
            precision=self._choose_precision(precision),
            variant=variant,
            why=why,
            weights_sha256=weights_sha256(variant, weights),
            threads=threads or max(1, default_threads() // at_once),
            at_once=at_once,
        )
        self.psnr_db = self._verify()
        self._reference_network = None  # its memory; it is loaded again should a new size come

    def estimate_priors(self, infrared: Image, visible: Image) -> Priors:
        """See `FusionEngine`."""
        infrared, visible = checked_pair(infrared, visible)
        return priors_from(self._program("priors", infrared.shape)(infrared, visible))

    def fuse(self, infrared: Image, visible: Image, priors: Priors) -> Image:
        """See `FusionEngine`. The first picture of a size waits until the network is compiled for it."""
        infrared, visible = checked_pair(infrared, visible)
        tokens = checked_priors(priors, self._token_widths)
        program = self._program("frame", infrared.shape)
        if not self._folds:
            return program(infrared, visible, *tokens)[0]
        return program(infrared, visible, *tokens, keep=partial(picture_of, size=infrared.shape))[0]

    def prepare(self, height: int, width: int) -> None:
        """Compiles for a picture size ahead of its first picture."""
        self._program("frame", (height, width))

    def prove(self, infrared: Image, visible: Image, priors: Priors, fused: Image) -> float:
        """See `FusionEngine`. PyTorch is loaded for it, once for every build."""

        def ask_pytorch() -> Image:
            with _one_torch_thread():
                return self._reference().fuse(infrared, visible, priors)

        key = self._key(f"proof in {self.description.precision}", infrared.shape)
        try:
            return self._proofs.find(self, key, fused, ask_pytorch)
        finally:
            self._reference_network = None  # its memory

    def close(self) -> None:
        """See `FusionEngine`."""
        self._closed = True  # whoever waits to compile is refused
        if self._compiling.acquire(timeout=CLOSE_PATIENCE_S):
            self._compiled = {}
            while self._aside:
                self._aside.pop().cleanup()
            self._compiling.release()

    def _choose_precision(self, asked: str) -> Literal["fp32", "bf16"]:
        served = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if asked == "auto":
            return "bf16" if "BF16" in served else "fp32"
        if asked == "fp32":
            return "fp32"
        if asked == "bf16":
            if "BF16" not in served:
                raise EngineError("this processor does not compute in bf16: choose precision fp32 or auto")
            return "bf16"
        raise EngineError(f"OpenVINO on a processor does not serve {asked} here: choose fp32, bf16 or auto")

    def _verify(self) -> float:
        reference = Reference.cached(self.cache, self._key("reference", REFERENCE_SIZE), self._ask_pytorch)
        return refuse_unless_close(self, reference)

    def _ask_pytorch(self) -> Reference:
        with _one_torch_thread():
            return Reference.of(self._reference())

    def _program(self, graph: str, size: tuple[int, ...]) -> _Program:
        height, width = size
        programs = self._compiled.get((height, width))
        if programs is None:
            programs = self._compile(height, width)
        return programs[graph]

    def _compile(self, height: int, width: int) -> dict[str, _Program]:
        with self._compiling:
            if self._closed:
                raise EngineError("this engine was closed: create another one")
            if (ready := self._compiled.get((height, width))) is not None:
                return ready  # the other thread asked first
            models = self._models(height, width)
            programs = {graph: self._compile_graph(graph, models[graph]) for graph in GRAPHS}
            kept = list(self._compiled.items())[-(SIZES_KEPT - 1) :]
            self._compiled = dict([*kept, ((height, width), programs)])  # replaced, never changed: readers take no lock
            return programs

    def _compile_graph(self, graph: str, model: Any) -> _Program:
        frame = graph == "frame"
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[self.description.precision if frame else "fp32"],
            "INFERENCE_NUM_THREADS": self.description.threads * self.description.at_once if frame else 1,
            "NUM_STREAMS": self.description.at_once if frame else 1,
            # A pinned thread waits for whoever else is on its core: capture, decoding, encoding.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            return _Program(self._core.compile_model(model, "CPU", options))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile this network ({last_line(error)}): use 'pytorch'") from error

    def _models(self, height: int, width: int) -> dict[str, Any]:
        """The converted graphs for a size, from the cache or from PyTorch."""
        key = self._key("model", (height, width))
        with self.cache.building(key):
            if (models := self._cached_models(key)) is not None:
                return models
            with _one_torch_thread():
                converted = self._convert(height, width)

            def write(folder: Path) -> None:
                for graph, model in converted.items():
                    self._openvino.save_model(model, folder / f"{graph}.xml", compress_to_fp16=False)

            # Read back even now: what was saved compiles to slightly other arithmetic, and a first run shall give the
            # same bits as every later one.
            if (entry := self.cache.store(key, write)) is not None:
                return self._read_models(entry)
            aside = tempfile.TemporaryDirectory(prefix="dspfusion-")
            self._aside.append(aside)  # until the engine is closed: the weights are mapped from the file
            write(Path(aside.name))
            return self._read_models(Path(aside.name))

    def _cached_models(self, key: str) -> dict[str, Any] | None:
        if (entry := self.cache.find(key)) is None:
            return None
        try:
            return self._read_models(entry)
        except (OSError, RuntimeError) as error:
            self.cache.report(f"entry {key[:8]} cannot be read and is made again ({last_line(error)})")
            return None

    def _read_models(self, folder: Path) -> dict[str, Any]:
        return {graph: self._core.read_model(folder / f"{graph}.xml") for graph in GRAPHS}

    def _convert(self, height: int, width: int) -> dict[str, Any]:
        import torch

        from engines.dspfusion.folded import FoldedFrame
        from engines.pytorch_engine import FrameGraph, PriorGraph

        network = self._reference().network
        if network is None:
            raise EngineError("this engine was closed: create another one")
        pair = (torch.zeros(height, width, dtype=torch.uint8), torch.zeros(height, width, 3, dtype=torch.uint8))
        degradation, semantic = (torch.zeros(16, width) for width in self._token_widths)
        frame_graph = FoldedFrame if self._folds else FrameGraph
        try:
            return {
                "priors": self._convert_graph(PriorGraph(network, self._diffusion_steps), pair),
                "frame": self._convert_graph(frame_graph(network), (*pair, degradation, degradation.clone(), semantic)),
            }
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot convert this network ({last_line(error)}): use 'pytorch'") from error

    def _convert_graph(self, graph: Any, example: tuple[Any, ...]) -> Any:
        import torch
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
        from torch.fx.experimental.proxy_tensor import make_fx

        # Traced twice: make_fx turns every size into a plain number (a direct trace keeps computing with them, and
        # fails at `round`), and TorchScript is what OpenVINO reads; torch.export took four times as long.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            flat = make_fx(graph, pre_dispatch=True)(*example)
            script = torch.jit.trace(flat, example, check_trace=False)
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(script, example_input=example)  # the frontend does not keep it alive
        model = frontend.convert(frontend.load(decoder))
        model.reshape({index: list(tensor.shape) for index, tensor in enumerate(example)})
        return model

    def _reference(self) -> PyTorchEngine:
        network = self._reference_network  # read once: it may be let go at any time
        if network is None:
            from engines.pytorch_engine import PyTorchEngine

            network = PyTorchEngine(self._variant, self._weights, "fp32", diffusion_steps=self._diffusion_steps)
            self._reference_network = network
        return network

    def _key(self, kind: str, size: tuple[int, ...]) -> str:
        # Precision is no part of what is built: it is chosen when the graph is compiled, at every start.
        description = self.description
        return cache_key(
            kind=kind,
            size=size,
            variant=description.variant,
            weights=description.weights_sha256,
            diffusion_steps=self._diffusion_steps,
            network=source_sha256(Path(__file__)),
            openvino=self._openvino.__version__,
            torch=importlib.metadata.version("torch"),
            processor=processor_fingerprint(),
        )


class _Program:
    """One compiled graph. Every call takes an idle request or makes one, so threads never share one."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: list[Any] = []  # append and pop are atomic

    def __call__(self, *arrays: np.ndarray, keep: Callable[[np.ndarray], np.ndarray] = np.array) -> list[np.ndarray]:
        """Runs the graph; what `keep` makes of every output belongs to the caller, and must be a copy.

        Raises:
            EngineError: if the runtime fails, such as for want of memory.
        """
        try:
            request = self._request()
            # Shared inputs are read in place; `arrays` keeps them alive until the call returns.
            outputs = request.infer(list(arrays), share_inputs=True, share_outputs=True)
        except (RuntimeError, MemoryError) as error:
            raise EngineError(f"OpenVINO failed ({last_line(error)}): use runtime 'pytorch'") from error
        copies = [keep(outputs[index]) for index in range(len(outputs))]
        self._idle.append(request)
        return copies

    def _request(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Converting is many tiny steps: two threads waiting for each other took 28 s of processor time, one takes 10 s."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
