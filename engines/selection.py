"""Which runtime serves: the fastest that works here, with a word on every one that does not."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from engines.base import EngineError, FusionEngine

log = logging.getLogger("dspfusion.engines")

RUNTIMES = ("auto", "tensorrt", "compile", "openvino", "pytorch")
PROBE_TIMEOUT_S = 60


def create_engine(
    runtime: str = "auto",
    variant: str = "nano",
    precision: str = "auto",
    threads: int = 0,
    diffusion_steps: int = 4,
    weights: Path | str | None = None,
) -> FusionEngine:
    """Creates the engine that fuses.

    Args:
        runtime: "auto" takes OpenVINO, and PyTorch where that does not serve; another one is that or an error.
        variant: a name of `engines.dspfusion.variants.VARIANTS`.
        precision: "auto", "fp32", "bf16" or "fp16", as far as the runtime serves it.
        threads: 0 chooses.
        diffusion_steps: 1 to 10.
        weights: a safetensors file; None takes the shipped weights of the variant.

    Raises:
        EngineError: if nothing serves, or what was asked for by name does not.
    """
    path = None if weights is None else Path(weights)
    if not 1 <= diffusion_steps <= 10:
        raise EngineError(f"diffusion_steps is {diffusion_steps}: choose 1 to 10")
    if runtime == "openvino":
        return _openvino(variant, path, precision, threads, diffusion_steps, "asked for")
    if runtime == "pytorch":
        return _pytorch(variant, path, precision, threads, diffusion_steps, "asked for")
    if runtime in ("tensorrt", "compile"):
        raise EngineError(f"runtime '{runtime}' does not serve here: {gpu_refusal(runtime)}. Use 'auto'")
    if runtime != "auto":
        raise EngineError(f"there is no runtime '{runtime}': choose one of {', '.join(RUNTIMES)}")
    return _automatic(variant, path, precision, threads, diffusion_steps)


def gpu_refusal(runtime: str) -> str:
    """Why a GPU runtime does not serve on this machine, without loading it into this process."""
    if not nvidia_driver_present():
        return "it needs an NVIDIA GPU, and this machine has none (or no driver for it)"
    if runtime == "tensorrt" and importlib.util.find_spec("torch_tensorrt") is None:
        return "torch_tensorrt is not installed: install the extra 'tensorrt'"
    if (reason := _torch_sees_no_gpu()) is not None:
        return reason
    return "this version serves no GPU yet"


def nvidia_driver_present() -> bool:
    """Whether an NVIDIA driver is loaded (Linux, and Linux inside Windows)."""
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


@cache
def _torch_sees_no_gpu() -> str | None:
    """Asks in another process: with a driver and a CUDA build that do not fit, the question can end in a crash."""
    question = "import sys, torch; sys.exit(0 if torch.version.cuda and torch.cuda.is_available() else 3)"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", question], capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"the GPU could not be probed ({type(error).__name__})"
    if answer.returncode == 3:
        return "the installed PyTorch has no CUDA, or finds no GPU: install its CUDA build"
    return None if answer.returncode == 0 else f"the GPU probe failed with status {answer.returncode}"


def _automatic(variant: str, weights: Path | None, precision: str, threads: int, diffusion_steps: int) -> FusionEngine:
    fallbacks: list[str] = []

    def fall_back(runtime: str, reason: object) -> None:
        fallbacks.append(f"{runtime}: {reason}")
        log.warning("runtime %s does not serve: %s", runtime, reason)

    if nvidia_driver_present():  # a machine without one gives up nothing, so there is nothing to tell
        fall_back("tensorrt", gpu_refusal("tensorrt"))
    try:
        engine = _openvino(variant, weights, precision, threads, diffusion_steps, "the compiled engine for processors")
    except EngineError as error:
        # A missing file or a wrong name is no fault of OpenVINO: PyTorch then says the same, and that is the answer.
        engine = _pytorch(variant, weights, precision, threads, diffusion_steps, "the reference; nothing faster serves")
        fall_back("openvino", error)
    if fallbacks:
        engine.description = replace(engine.description, fallbacks=(*fallbacks, *engine.description.fallbacks))
    return engine


def _openvino(
    variant: str, weights: Path | None, precision: str, threads: int, diffusion_steps: int, why: str
) -> FusionEngine:
    from engines.openvino_engine import OpenVINOEngine

    return OpenVINOEngine(variant, weights, precision, threads, diffusion_steps, why)


def _pytorch(
    variant: str, weights: Path | None, precision: str, threads: int, diffusion_steps: int, why: str
) -> FusionEngine:
    from engines.pytorch_engine import PyTorchEngine

    return PyTorchEngine(variant, weights, precision, threads, diffusion_steps, why)
