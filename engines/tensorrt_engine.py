"""TensorRT, through torch-tensorrt: the fastest engine for NVIDIA GPUs.

One style for torch-tensorrt 2.11 to 2.14: the types come from the graph (halves and their fp32 islands are written into
what is exported), and no precision is handed to the compiler, because newer versions refuse that and older ones then
build something else. An engine is built for one picture size, so that it is replayed as a CUDA graph; a range of sizes
can be built instead, without the graph. Engines are kept in our own cache: the library's own has no weights in its key
and reads pickles. What is read back is only ever a file that this user alone could have written.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from engines.arrays import last_line
from engines.base import EngineError
from engines.cache import private_folder, refuse_foreign
from engines.dspfusion.network import DSPFusion, pad
from engines.gpu_frames import WARM_UP_RUNS, GPUEngine, GPUOptions, Graph, InPrecision
from engines.gpu_probe import partner_versions
from engines.pytorch_engine import PriorGraph, unit_infrared, unit_visible
from engines.sizes import Size, SizeRange

if TYPE_CHECKING:
    import types

ENGINE_FILE = "engine.pt2"
OPTIMIZATION_LEVEL = 4  # of 0 to 5; 5 tries every tactic and takes several times as long
TIMING_RUNS = 4  # of every tactic: one run alone picks by chance


class PaddedFrame(nn.Module):
    """What TensorRT runs of a frame: padded pictures in [0, 1] and tokens -> the fused picture, (1, 3, H, W)."""

    def __init__(self, network: DSPFusion) -> None:
        super().__init__()
        self.network = network

    def forward(self, infrared: Tensor, visible: Tensor, *tokens: Tensor) -> Tensor:
        return self.network.fuse_padded(infrared, visible, *(one[None] for one in tokens)).float()


class UnitPriors(nn.Module):
    """What TensorRT runs of the priors: pictures in [0, 1] -> the arrays of `Priors`."""

    def __init__(self, graph: PriorGraph) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, infrared: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        return self.inner.of_units(infrared, visible)


class TensorRTEngine(GPUEngine):
    """Runs the network compiled by TensorRT. Implements `FusionEngine`; see `GPUEngine` for the arguments.

    Args:
        sizes: build one engine for a range of sizes; None builds one for every size that comes.
    """

    RUNTIME = "tensorrt"
    CAPTURES = False  # torch-tensorrt records its engine's CUDA graph itself

    def __init__(self, sizes: SizeRange | None = None, **options: Unpack[GPUOptions]) -> None:
        self._trt = import_torch_tensorrt()
        self._sizes = sizes
        self._open = ExitStack()  # CUDA graphs stay on while the engine lives
        self._quiet = Quiet()
        self._ranged: Graph | None = None
        self.built = 0  # engines that were compiled, not found in the cache
        super().__init__(**options)

    def close(self) -> None:
        """See `FusionEngine`."""
        super().close()
        self._ranged = None
        self._open.close()

    def _start(self) -> None:
        network = self._network()
        self._multiple = network.variant.multiple
        self._padded = InPrecision(PaddedFrame(network), self.description.precision)  # type: ignore[arg-type]
        self._prior = UnitPriors(PriorGraph(self._network(), self._diffusion_steps))

    def _versions(self) -> dict[str, str]:
        return {
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "torch_tensorrt": self._trt.__version__,
            "tensorrt": str(partner_versions()["tensorrt"]),
        }

    def _frame_graph(self, size: Size) -> Graph:
        if self._sizes is not None and self._sizes.holds(size):
            self._ranged = engine = self._ranged or self._engine_for_range(self._sizes)
        else:
            example = self._frame_example(self._padded_size(size))
            engine = self._replayed(self._engine("frame", self._padded, example), example)
        height, width = size

        def run(infrared: Tensor, visible: Tensor, *tokens: Tensor) -> Tensor:
            pictures = (pad(picture, self._multiple) for picture in (unit_infrared(infrared), unit_visible(visible)))
            with self._quiet.running():
                fused = engine(*(picture.contiguous() for picture in pictures), *tokens)[0, :, :height, :width]
            return (fused.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)

        return run

    def _prior_graph(self, size: Size) -> Graph:
        example = self._pictures(size)
        engine = self._replayed(self._engine("priors", self._prior, example), example)

        def run(infrared: Tensor, visible: Tensor) -> Any:
            pictures = unit_infrared(infrared), unit_visible(visible)
            with self._quiet.running():
                return engine(*(picture.contiguous() for picture in pictures))

        return run

    def _pictures(self, size: Size) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(1, channels, *size, device=self.device) for channels in (1, 3))

    def _frame_example(self, size: Size) -> tuple[Tensor, ...]:
        degradation, semantic = self._token_widths
        tokens = (torch.zeros(16, width, device=self.device) for width in (degradation, degradation, semantic))
        return (*self._pictures(size), *tokens)

    def _padded_size(self, size: Size) -> Size:
        height, width = (-(-side // self._multiple) * self._multiple for side in size)
        return height, width

    def _engine_for_range(self, sizes: SizeRange) -> Graph:
        """One engine for all sizes in a range; not replayed as a CUDA graph, whose shapes are fixed."""
        ends = [self._padded_size(size) for size in (sizes.smallest, sizes.usual, sizes.largest)]
        axes: dict[int, Any] = {}
        for axis, name, low, high in ((2, "rows", ends[0][0], ends[2][0]), (3, "columns", ends[0][1], ends[2][1])):
            if low < high:
                step = self._multiple
                axes[axis] = step * torch.export.Dim(name, min=low // step, max=high // step)
        _, _, *tokens = example = self._frame_example(ends[1])
        pictures = [
            self._trt.Input(
                min_shape=(1, channels, *ends[0]),
                opt_shape=(1, channels, *ends[1]),
                max_shape=(1, channels, *ends[2]),
                dtype=torch.float32,
            )
            for channels in (1, 3)
        ]
        # One entry for all inputs, because `InPrecision` takes them as one list.
        shapes = ((axes, axes, None, None, None),)
        return self._engine("frame", self._padded, example, (*pictures, *tokens), shapes)

    def _engine(
        self,
        kind: str,
        module: nn.Module,
        example: tuple[Tensor, ...],
        inputs: tuple[Any, ...] | None = None,
        dynamic_shapes: Any = None,
    ) -> Graph:
        """The engine of a module, from the cache or built; `inputs` and `dynamic_shapes` describe a range of sizes."""
        shapes = [tuple(one.shape) for one in example]
        key = self._key(kind, [shapes, str(self._sizes) if dynamic_shapes else ""])
        with self.cache.building(key):
            if (entry := self.cache.find(key)) is not None:
                try:
                    loaded: Graph = torch.export.load(entry / ENGINE_FILE).module()
                    return loaded
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self.cache.report(f"entry {key[:8]} cannot be loaded and is built again ({last_line(error)})")
            compiled = self._build(module, example, inputs or example, dynamic_shapes)
            self.built += 1

            def write(folder: Path) -> None:
                try:
                    self._trt.save(
                        compiled,
                        str(folder / ENGINE_FILE),
                        output_format="exported_program",
                        arg_inputs=list(example),
                        dynamic_shapes=dynamic_shapes,
                    )
                except OSError:
                    raise
                except Exception as error:  # serialising is a convenience: what was built serves all the same
                    raise RuntimeError(f"the engine cannot be saved: {last_line(error)}") from error

            self.cache.store(key, write)
            return compiled

    def _build(
        self, module: nn.Module, example: tuple[Tensor, ...], inputs: tuple[Any, ...], dynamic_shapes: Any
    ) -> Graph:
        exact = module is self._prior or self.description.precision == "fp32"
        with torch.no_grad(), self._timing_cache() as timing_cache:
            program = torch.export.export(module.eval(), example, dynamic_shapes=dynamic_shapes)
            compiled: Graph = self._trt.dynamo.compile(
                program,
                arg_inputs=list(inputs),
                min_block_size=1,
                require_full_compilation=True,  # a network in pieces is no longer one CUDA graph
                optimization_level=OPTIMIZATION_LEVEL,
                num_avg_timing_iters=TIMING_RUNS,
                disable_tf32=exact,
                immutable_weights=True,
                hardware_compatible=False,
                version_compatible=False,
                cache_built_engines=False,
                reuse_cached_engines=False,
                timing_cache_path=str(timing_cache),
            )
            return compiled

    @contextmanager
    def _timing_cache(self) -> Iterator[Path]:
        """What TensorRT measured before. Never the library's own place, which others can foresee in /tmp."""
        path = self.cache.folder / "timing.bin"
        try:
            private_folder(self.cache.folder)
            if path.exists():
                refuse_foreign(path)
        except OSError:
            with tempfile.TemporaryDirectory(prefix="dspfusion-") as folder:
                yield Path(folder) / "timing.bin"
            return
        yield path
        if path.is_file():
            path.chmod(0o600)

    def _replayed(self, engine: Graph, example: tuple[Tensor, ...]) -> Graph:
        """The engine with its CUDA graph, which it records in its first runs."""
        replayed: Graph = self._open.enter_context(self._trt.runtime.enable_cudagraphs(engine))
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with self._quiet.alone(), torch.inference_mode():
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    replayed(*example)
            if stream is not None:
                stream.synchronize()
        return replayed


def import_torch_tensorrt() -> types.ModuleType:
    """torch_tensorrt, whatever its import raises: it is known to raise bare exceptions.

    Raises:
        EngineError: if it cannot be imported.
    """
    try:
        import torch_tensorrt
    except Exception as error:
        raise EngineError(
            f"torch_tensorrt cannot be imported ({type(error).__name__}: {last_line(error)}): "
            "install the extra 'tensorrt', or use runtime 'compile'"
        ) from error
    module: types.ModuleType = torch_tensorrt
    return module


class Quiet:
    """Lets engines run at once, and a CUDA graph be recorded while none does: recording sees all of a device."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._recording = False

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._recording)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._recording and not self._running)
            self._recording = True
        try:
            yield
        finally:
            with self._changed:
                self._recording = False
                self._changed.notify_all()
