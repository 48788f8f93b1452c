"""Which runtime serves: the fastest that works here, with a word on every one that does not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engines import gpu_probe
from engines.arrays import last_line
from engines.base import EngineError, FusionEngine
from engines.sizes import SizeRange, range_of

if TYPE_CHECKING:
    from engines.gpu_frames import GPUOptions

log = logging.getLogger("dspfusion.engines")

RUNTIMES = ("auto", "tensorrt", "compile", "openvino", "pytorch")
WHY = {
    "tensorrt": "the fastest engine for this GPU",
    "compile": "the compiled engine for GPUs without TensorRT",
    "openvino": "the compiled engine for processors",
    "pytorch": "the reference; nothing faster serves",
}


@dataclass(frozen=True)
class _Order:
    """What was asked for, but for the runtime."""

    variant: str
    precision: str
    threads: int
    diffusion_steps: int
    weights: Path | None
    sizes: SizeRange | None
    at_once: int


def create_engine(
    runtime: str = "auto",
    variant: str = "nano",
    precision: str = "auto",
    threads: int = 0,
    diffusion_steps: int = 4,
    weights: Path | str | None = None,
    sizes: str | None = None,
    at_once: int = 0,
) -> FusionEngine:
    """Creates the engine that fuses.

    Args:
        runtime: "auto" takes the fastest that serves here: TensorRT, torch.compile (both on an NVIDIA GPU), OpenVINO,
            PyTorch, in this order. Another name is that runtime or an error.
        variant: a name of `engines.dspfusion.variants.VARIANTS`.
        precision: "auto", "fp32", "bf16" or "fp16", as far as the runtime serves it.
        threads: on a processor; 0 chooses.
        diffusion_steps: 1 to 10.
        weights: a safetensors file; None takes the shipped weights of the variant.
        sizes: "SMALLEST-USUAL-LARGEST", as "320x240-640x480-1280x720": TensorRT builds one engine for this range of
            picture sizes; the other runtimes take any size.
        at_once: on a processor, frames that are fused at the same time by as many callers; 0 is one.

    Raises:
        EngineError: if nothing serves, or what was asked for by name does not.
    """
    file, served = None if weights is None else Path(weights), None if sizes is None else range_of(sizes)
    order = _Order(variant, precision, threads, diffusion_steps, file, served, at_once or 1)
    if not 1 <= diffusion_steps <= 10:
        raise EngineError(f"diffusion_steps is {diffusion_steps}: choose 1 to 10")
    if runtime not in RUNTIMES:
        raise EngineError(f"there is no runtime '{runtime}': choose one of {', '.join(RUNTIMES)}")
    if runtime == "auto":
        return _automatic(order)
    if runtime in ("tensorrt", "compile") and (reason := gpu_probe.refusal(runtime)) is not None:
        raise EngineError(f"runtime '{runtime}' does not serve here: {reason}. Use 'auto'")
    return _create(runtime, order, "asked for")


def _automatic(order: _Order) -> FusionEngine:
    refused: list[tuple[str, str]] = []
    for runtime in RUNTIMES[1:]:
        gpu = runtime in ("tensorrt", "compile")
        # A machine without an NVIDIA GPU gives nothing up, so there is nothing to tell.
        if gpu and not gpu_probe.nvidia_driver_present():
            continue
        if gpu and (reason := gpu_probe.refusal(runtime)) is not None:
            refused.append((runtime, reason))
            continue
        try:
            engine = _create(runtime, order, WHY[runtime])
        except EngineError as error:
            if runtime == "pytorch":
                raise  # a missing file or a wrong name: what the reference says is the answer
            refused.append((runtime, str(error)))
            continue
        for name, reason in refused:
            log.warning("runtime %s does not serve: %s", name, reason)
        earlier = tuple(f"{name}: {reason}" for name, reason in refused)
        engine.description = replace(engine.description, fallbacks=(*earlier, *engine.description.fallbacks))
        log.info("engine: %s (%s)", engine.description.runtime, engine.description.why)
        return engine
    raise AssertionError("unreachable: pytorch serves, or raises")


def _create(runtime: str, order: _Order, why: str) -> FusionEngine:
    try:
        return _FACTORIES[runtime](order, why)
    except EngineError:
        raise
    except Exception as error:  # a library of another version, or half installed, raises whatever it likes
        reason = f"{type(error).__name__}: {last_line(error)}"
        raise EngineError(
            f"runtime '{runtime}' cannot start here ({reason}): `dspfusion doctor` tells what is installed"
        ) from error


def _tensorrt(order: _Order, why: str) -> FusionEngine:
    from engines.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(order.sizes, **_gpu_options(order, why))


def _compile(order: _Order, why: str) -> FusionEngine:
    from engines.compile_engine import CompileEngine

    return CompileEngine(**_gpu_options(order, why))


def _gpu_options(order: _Order, why: str) -> GPUOptions:
    return {
        "variant": order.variant,
        "weights": order.weights,
        "precision": order.precision,
        "diffusion_steps": order.diffusion_steps,
        "why": why,
    }


def _openvino(order: _Order, why: str) -> FusionEngine:
    from engines.openvino_engine import OpenVINOEngine

    return OpenVINOEngine(
        order.variant,
        order.weights,
        order.precision,
        order.threads,
        order.diffusion_steps,
        why,
        at_once=order.at_once,
    )


def _pytorch(order: _Order, why: str) -> FusionEngine:
    from engines.pytorch_engine import PyTorchEngine

    threads = order.threads * order.at_once  # it fuses one frame at a time, whoever asks
    return PyTorchEngine(order.variant, order.weights, order.precision, threads, order.diffusion_steps, why)


_FACTORIES: dict[str, Callable[[_Order, str], FusionEngine]] = {
    "tensorrt": _tensorrt,
    "compile": _compile,
    "openvino": _openvino,
    "pytorch": _pytorch,
}
