"""What both GPU runtimes share: the path of a frame over the device, the network in its precision, the check.

A frame crosses the bus once each way: both pictures and the tokens go up in one pinned block, the fused picture comes
down in one. Uploading, computing and downloading have a stream each, and two slots of buffers, so that one frame is
copied while another is computed where two threads fuse. Everything between is on the device: conversion, the warp of
the infrared picture, padding, the network, packing. The same code runs on a processor (`device="cpu"`), without streams
and graphs; that is how it is tested where there is no GPU.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.arrays import (
    REFERENCE_SIZE,
    Image,
    Proofs,
    Reference,
    checked_pair,
    checked_priors,
    last_line,
    priors_from,
    refuse_unless_close,
    shape_of,
    weights_sha256,
)
from engines.base import EngineDescription, EngineError, PictureError, PixelMap, Priors
from engines.cache import EngineCache, cache_key, source_sha256
from engines.dspfusion.loading import load
from engines.dspfusion.network import DSPFusion
from engines.pytorch_engine import FrameGraph, PyTorchEngine, tensor_of
from engines.sizes import Size

Precision = Literal["fp32", "bf16", "fp16"]
Graph = Callable[..., Any]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FRAMES_FIRST = -1  # stream priority of the frames: CUDA runs lower numbers first, and gives 0 to all others
SIZES_KEPT = 4  # compiled sizes; the least recently added goes
SLOTS = 2  # frames in flight
WARM_UP_RUNS = 3  # before a graph is captured: libraries choose their kernels and allocate in the first runs
CLOSE_PATIENCE_S = 1.0  # a compiler cannot be interrupted; what it makes is then left to it


class InPrecision(nn.Module):
    """The frame's path in one precision, bytes to bytes.

    Half precision is written into the graph, so that a compiler only has to keep the types it finds. The weights of
    convolutions and linear layers are halves; autocast casts around them and leaves what overflows or loses digits in
    halves (norms, softmax, sums over the picture) in fp32.
    """

    def __init__(self, graph: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.inner = graph  # not `graph`: an exported module has an attribute of that name
        self.dtype = DTYPES[precision]
        if precision != "fp32":
            for module in graph.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(self.dtype)

    def forward(self, *inputs: Tensor) -> Any:
        half = self.dtype != torch.float32
        # No autocast cache: what it holds would be read from the wrong place when a captured graph is replayed.
        with torch.autocast(inputs[0].device.type, self.dtype if half else None, enabled=half, cache_enabled=False):
            return self.inner(*inputs)


class Warp(nn.Module):
    """Samples the infrared picture where the visible camera's pixels see it; outside, its border is repeated.

    Args:
        size: height and width of the visible picture.
        infrared_size: of the infrared picture.
    """

    grid: Tensor

    def __init__(self, size: Size, infrared_size: Size) -> None:
        super().__init__()
        self._infrared_size = infrared_size
        self.register_buffer("grid", torch.zeros(1, *size, 2))

    def follow(self, pixel_map: PixelMap) -> None:
        """Takes another map over, in place: a captured graph goes on reading where it was recorded."""
        rows, columns = self._infrared_size
        places = ((pixel_map.map_x, columns), (pixel_map.map_y, rows))
        scaled = [2 * place / max(1, side - 1) - 1 for place, side in places]
        self.grid.copy_(torch.from_numpy(np.stack(scaled, -1).astype(np.float32))[None])

    def forward(self, infrared: Tensor) -> Tensor:
        """uint8 (h, w) -> uint8 (H, W)."""
        picture = infrared[None, None].float()
        # In fp32 also inside of autocast: half a mantissa cannot name a pixel of a wide picture.
        with torch.autocast(infrared.device.type, enabled=False):
            warped = F.grid_sample(picture, self.grid, "bilinear", "border", align_corners=True)
        return warped[0, 0].round().to(torch.uint8)


class _Slot:
    """The buffers of one frame in flight, on both sides of the bus, and the events that order its steps."""

    def __init__(self, up_bytes: int, down: tuple[int, int, int], device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.up = torch.empty(up_bytes, dtype=torch.uint8, pin_memory=cuda)
        self.down = torch.empty(down, dtype=torch.uint8, pin_memory=cuda)
        self.on_device = torch.empty(up_bytes, dtype=torch.uint8, device=device)
        self.result = torch.empty(down, dtype=torch.uint8, device=device)
        self.uploaded, self.computed, self.downloaded = (torch.cuda.Event() if cuda else None for _ in range(3))


class FramePath:
    """Carries frames of one size over the device. Calls may overlap; each returns its own picture.

    Args:
        graph: uint8 (H, W), uint8 (H, W, 3) and the token sets, float32 -> uint8 (H, W, 3), on the device.
        size: height and width of the visible and of the fused picture.
        tokens: the shape of every token set.
        device: "cuda", or "cpu" without streams and capture.
        infrared_size: of infrared pictures that are warped here, by the map that comes with them; None: they are
            registered already.
        capture: replay the whole path as one CUDA graph; False where the runtime has its own.
    """

    def __init__(
        self,
        graph: Graph,
        size: Size,
        tokens: Sequence[Size],
        device: torch.device,
        infrared_size: Size | None = None,
        capture: bool = True,
    ) -> None:
        self._graph, self._device = graph, device
        self._parts = _layout(tokens, infrared_size or size, (*size, 3))
        up_bytes = self._parts[-1].end
        self._input = torch.zeros(up_bytes, dtype=torch.uint8, device=device)
        self._views = [part.view_of(self._input) for part in self._parts]
        self._warp = None if infrared_size is None else Warp(size, infrared_size).to(device)
        self._followed: PixelMap | None = None
        self._slots: queue.Queue[_Slot] = queue.Queue()
        for _ in range(SLOTS):
            self._slots.put(_Slot(up_bytes, (*size, 3), device))
        self._order = threading.Lock()
        self._cuda = device.type == "cuda"
        self._upload, self._compute, self._download = (
            torch.cuda.Stream(device, priority=FRAMES_FIRST) if self._cuda else None for _ in range(3)
        )
        self._replay = self._prepare(capture)

    def __call__(
        self,
        infrared: Image,
        visible: Image,
        tokens: Sequence[NDArray[np.float32]],
        pixel_map: PixelMap | None = None,
    ) -> Image:
        """Fuses one pair; waits for its own frame alone."""
        slot = self._slots.get()
        try:
            arrays: tuple[NDArray[Any], ...] = (*tokens, infrared, visible)
            for part, array in zip(self._parts, arrays, strict=True):
                np.copyto(part.view_of(slot.up).numpy(), array)
            with self._order:
                self._enqueue(slot, pixel_map)
            if slot.downloaded is not None:
                slot.downloaded.synchronize()
            return slot.down.numpy().copy()
        finally:
            self._slots.put(slot)

    def _enqueue(self, slot: _Slot, pixel_map: PixelMap | None) -> None:
        with torch.inference_mode():
            with self._on(self._upload):
                slot.on_device.copy_(slot.up, non_blocking=True)
                self._record(slot.uploaded, self._upload)
            with self._on(self._compute):
                self._wait(slot.uploaded, self._compute)
                self._follow(pixel_map)
                self._input.copy_(slot.on_device)
                slot.result.copy_(self._replay())
                self._record(slot.computed, self._compute)
            with self._on(self._download):
                self._wait(slot.computed, self._download)
                slot.down.copy_(slot.result, non_blocking=True)
                self._record(slot.downloaded, self._download)

    def _follow(self, pixel_map: PixelMap | None) -> None:
        """In the stream that computes, so that the frames before keep their map. Maps change rarely: a plain copy."""
        if self._warp is not None and pixel_map is not None and pixel_map is not self._followed:
            self._warp.follow(pixel_map)
            self._followed = pixel_map

    def _run(self) -> Tensor:
        *tokens, infrared, visible = self._views
        fused: Tensor = self._graph(infrared if self._warp is None else self._warp(infrared), visible, *tokens)
        return fused

    def _prepare(self, capture: bool) -> Callable[[], Tensor]:
        """Runs the graph until it is warm, and captures it."""
        with torch.inference_mode(), self._on(self._compute):
            for _ in range(WARM_UP_RUNS if self._cuda else 1):
                self._run()
            if self._compute is None or not capture:
                return self._run
            self._compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: the priors' thread may allocate meanwhile without breaking the capture.
            with torch.cuda.graph(graph, stream=self._compute, capture_error_mode="thread_local"):
                fused = self._run()

        def replay() -> Tensor:
            graph.replay()
            return fused

        return replay

    def _on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    @staticmethod
    def _record(event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
        if event is not None:
            event.record(stream)

    @staticmethod
    def _wait(event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
        if event is not None and stream is not None:
            stream.wait_event(event)


class _Part(NamedTuple):
    """Where one input lies in the block that goes up."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view_of(self, block: Tensor) -> Tensor:
        return block[self.start : self.end].view(self.dtype).reshape(self.shape)


def _layout(tokens: Sequence[Size], infrared: Size, visible: tuple[int, int, int]) -> list[_Part]:
    """Tokens first: they are floats, and so lie at multiples of four."""
    parts: list[_Part] = []
    start = 0
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, torch.float32) for shape in tokens]
    for shape, dtype in [*shapes, (infrared, torch.uint8), (visible, torch.uint8)]:
        end = start + int(np.prod(shape)) * dtype.itemsize
        parts.append(_Part(start, end, shape, dtype))
        start = end
    return parts


class _Programs(NamedTuple):
    graph: Graph
    priors: Callable[[Image, Image], list[NDArray[np.float32]]]
    frames: dict[Size | None, FramePath]  # by the size of infrared pictures that are warped; None: registered ones


class GPUOptions(TypedDict, total=False):
    """What every GPU engine is given; see `GPUEngine`."""

    variant: str
    weights: Path | None
    precision: str
    diffusion_steps: int
    why: str
    cache: EngineCache | None
    device: str


class GPUEngine(ABC):
    """A compiled engine on an NVIDIA GPU. Implements `FusionEngine`; a runtime adds how it compiles.

    Args:
        variant: a name of `engines.dspfusion.variants.VARIANTS`.
        weights: a safetensors file; None takes the shipped weights.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the GPU computes in it (compute capability 8.0 and
            newer), fp16 elsewhere. Priors are always fp32.
        diffusion_steps: 1 to 10.
        cache: where compiled engines are kept; None takes the user's cache folder.
        device: "cuda", or "cpu" for tests.

    Raises:
        EngineError: if the runtime or the weights cannot be loaded, the GPU lacks the memory or the precision, or the
            result is not PyTorch's within its tolerance.
    """

    RUNTIME: ClassVar[Literal["tensorrt", "compile"]]
    CAPTURES: ClassVar[bool] = True  # whether the frame path is captured here; False: the runtime replays by itself

    def __init__(
        self,
        variant: str = "nano",
        weights: Path | None = None,
        precision: str = "auto",
        diffusion_steps: int = 4,
        why: str = "asked for",
        cache: EngineCache | None = None,
        device: str = "cuda",
    ) -> None:
        shape = shape_of(variant)
        self._token_widths = (shape.degradation_tokens, shape.semantic_tokens)
        self._variant, self._weights, self._diffusion_steps = variant, weights, diffusion_steps
        self.device = torch.device(device)
        self.cache = EngineCache() if cache is None else cache
        self._programs: dict[Size, _Programs] = {}
        self._proofs = Proofs(self.cache)
        self._compiling = threading.Lock()
        self._closed = False
        self.description = EngineDescription(
            runtime=self.RUNTIME,
            precision=self._choose_precision(precision),
            variant=variant,
            why=why,
            weights_sha256=weights_sha256(variant, weights),
        )
        with gpu_errors(variant):
            self._start()
        self.psnr_db = self._verify()

    def estimate_priors(self, infrared: Image, visible: Image) -> Priors:
        """See `FusionEngine`."""
        infrared, visible = checked_pair(infrared, visible)
        with gpu_errors(self._variant):
            return priors_from(self._for_size(visible.shape[:2]).priors(infrared, visible))

    def fuse(self, infrared: Image, visible: Image, priors: Priors) -> Image:
        """See `FusionEngine`. The first picture of a size waits until the network is compiled for it."""
        infrared, visible = checked_pair(infrared, visible)
        tokens = checked_priors(priors, self._token_widths)
        with gpu_errors(self._variant):
            return self._frame_path(visible.shape[:2])(infrared, visible, tokens)

    def fuse_unregistered(self, infrared: Image, visible: Image, priors: Priors, pixel_map: PixelMap) -> Image:
        """See `RegisteringEngine`."""
        size = pixel_map.map_x.shape
        _, visible = checked_pair(np.empty(size, np.uint8), visible)
        if infrared.dtype != np.uint8 or infrared.ndim != 2:
            raise PictureError(f"infrared must be uint8 (h, w), got {infrared.dtype = } and {infrared.shape = }")
        tokens = checked_priors(priors, self._token_widths)
        with gpu_errors(self._variant):
            return self._frame_path(size, infrared.shape)(infrared, visible, tokens, pixel_map)

    def prove(self, infrared: Image, visible: Image, priors: Priors, fused: Image) -> float:
        """See `FusionEngine`."""

        def ask_pytorch() -> Image:
            reference = PyTorchEngine(self._variant, self._weights, "fp32", diffusion_steps=self._diffusion_steps)
            return reference.fuse(infrared, visible, priors)

        return self._proofs.find(self, self._key("proof", visible.shape[:2]), fused, ask_pytorch)

    def prepare(self, height: int, width: int) -> None:
        """Compiles for a picture size ahead of its first picture."""
        with gpu_errors(self._variant):
            self._frame_path((height, width))

    def close(self) -> None:
        """See `FusionEngine`."""
        self._closed = True  # whoever waits to compile is refused
        if self._compiling.acquire(timeout=CLOSE_PATIENCE_S):
            self._programs = {}
            self._compiling.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # What a runtime adds

    @abstractmethod
    def _start(self) -> None:
        """Loads what all sizes share."""

    @abstractmethod
    def _frame_graph(self, size: Size) -> Graph:
        """The frame's path on the device for a size: both pictures as bytes, and the tokens -> the fused picture."""

    @abstractmethod
    def _prior_graph(self, size: Size) -> Graph:
        """The priors' path on the device for a size: pictures as bytes -> the arrays of `Priors`."""

    def _versions(self) -> dict[str, str]:
        """Of everything that takes part in compiling."""
        return {"torch": torch.__version__}

    # What both share

    def _network(self) -> DSPFusion:
        network, _ = load(self._variant, self._weights)
        # Channels last is what the GPU's convolutions work in.
        placed: DSPFusion = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return placed.requires_grad_(False)

    def _for_size(self, size: tuple[int, ...]) -> _Programs:
        height, width = size
        programs = self._programs.get((height, width))
        return self._compile((height, width)) if programs is None else programs

    def _compile(self, size: Size) -> _Programs:
        with self._compiling:
            if self._closed:
                raise EngineError("this engine was closed: create another one")
            if (ready := self._programs.get(size)) is not None:
                return ready  # the other thread asked first
            programs = _Programs(self._frame_graph(size), self._prior_path(self._prior_graph(size)), {})
            kept = list(self._programs.items())[-(SIZES_KEPT - 1) :]
            self._programs = dict([*kept, (size, programs)])  # replaced, never changed: readers take no lock
            return programs

    def _frame_path(self, size: tuple[int, ...], infrared_size: tuple[int, ...] | None = None) -> FramePath:
        """Of pictures of a size; with `infrared_size`, of infrared pictures that are warped to it."""
        height, width = size
        programs = self._for_size((height, width))
        warped = None if infrared_size is None else (infrared_size[0], infrared_size[1])
        path = programs.frames.get(warped)
        if path is None:
            with self._compiling:
                path = programs.frames.get(warped)  # the other thread may have asked first
                if path is None:
                    degradation, semantic = ((16, width) for width in self._token_widths)
                    tokens = (degradation, degradation, semantic)
                    path = FramePath(programs.graph, (height, width), tokens, self.device, warped, self.CAPTURES)
                    programs.frames[warped] = path
        return path

    def _prior_path(self, graph: Graph) -> Callable[[Image, Image], list[NDArray[np.float32]]]:
        """Priors take their time: plain copies, on a stream that yields to the frames'."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def run(infrared: Image, visible: Image) -> list[NDArray[np.float32]]:
            with torch.inference_mode(), nullcontext() if stream is None else torch.cuda.stream(stream):
                outputs = graph(*(tensor_of(array).to(self.device) for array in (infrared, visible)))
                return [output.float().cpu().numpy() for output in outputs]

        return run

    def _choose_precision(self, asked: str) -> Precision:
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (8, 0)
        served: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
        if asked == "auto":
            return "bf16" if capability >= (8, 0) else "fp16"
        if asked not in served:
            raise EngineError(f"{self.RUNTIME} does not serve {asked}: choose fp32, bf16, fp16 or auto")
        if asked == "bf16" and capability < (8, 0):
            raise EngineError("this GPU does not compute in bf16: choose precision fp16 or auto")
        return served[asked]

    def _verify(self) -> float:
        def ask_pytorch() -> Reference:
            reference = PyTorchEngine(self._variant, self._weights, "fp32", diffusion_steps=self._diffusion_steps)
            return Reference.of(reference)

        key = cache_key(
            kind="reference",
            runtime="pytorch",
            size=REFERENCE_SIZE,
            variant=self._variant,
            weights=self.description.weights_sha256,
            diffusion_steps=self._diffusion_steps,
            network=source_sha256(),
            torch=torch.__version__,
        )
        return refuse_unless_close(self, Reference.cached(self.cache, key, ask_pytorch))

    def _key(self, kind: str, size: object) -> str:
        """The cache's name for what is compiled here."""
        gpu = "cpu"
        if self.device.type == "cuda":
            capability = "{}.{}".format(*torch.cuda.get_device_capability(self.device))
            gpu = f"{torch.cuda.get_device_name(self.device)} sm {capability}"
        return cache_key(
            kind=kind,
            runtime=self.RUNTIME,
            size=size,
            variant=self._variant,
            weights=self.description.weights_sha256,
            precision=self.description.precision,
            diffusion_steps=self._diffusion_steps,
            network=source_sha256(Path(__file__)),
            gpu=gpu,
            **self._versions(),
        )


def frame_graph_in(precision: Precision, network: DSPFusion) -> InPrecision:
    """The frame's path of a network, bytes to bytes, in a precision. The network's own weights are converted."""
    return InPrecision(FrameGraph(network), precision)


@contextmanager
def gpu_errors(variant: str) -> Iterator[None]:
    """Turns what the GPU's libraries raise into one line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise EngineError(
            f"the GPU's memory does not suffice for '{variant}' at this size ({_memory_needed(error)}): end other "
            "programs that use it, send smaller pictures, or choose a smaller variant"
        ) from error
    except (EngineError, ValueError):
        raise
    except Exception as error:
        raise EngineError(
            f"the GPU runtime failed ({type(error).__name__}: {last_line(error)}): use runtime 'openvino' or 'pytorch'"
        ) from error


def _memory_needed(error: BaseException) -> str:
    return str(error).strip().split(". ")[0][:120].replace("\n", " ") or "out of memory"
