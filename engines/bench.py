"""How long the network takes for a frame: wall and processor time, after warming up; alone, and side by side."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from engines.arrays import Image, reference_pair
from engines.base import FusionEngine

Fuse = Callable[[Image, Image], object]  # infrared uint8 (H, W), visible uint8 RGB (H, W, 3)


def bench(
    engines: Sequence[FusionEngine],
    sizes: Sequence[tuple[int, int]] = ((640, 480),),
    repeats: int = 50,
    warm_up: int = 5,
    seconds: float = 30.0,
) -> list[dict[str, Any]]:
    """Times `fuse` of every engine at every size.

    Args:
        engines: each is timed alone, in order.
        sizes: width and height.
        repeats: timed frames; fewer, but at least three, once `seconds` are over.
        warm_up: frames before, not counted; the first of a size compiles.
        seconds: the longest that one row may take, warm-up not counted.

    Returns:
        One row for each engine and size: `engine, precision, variant, width, height, what` ("network"), `median_ms,
        p95_ms, p99_ms` (latency of a frame on its own), `cpu_ms` (processor time of all threads, mean), `fps` (of the
        median), `rss_mb` (of the process now), `threads, at_once`; and `frames`, how many were timed,
        `throughput_fps` with as many callers as the engine takes, `priors_ms`, the median of an estimate, and on a GPU
        `gpu_mb`.
    """
    return [_row(engine, width, height, repeats, warm_up, seconds) for engine in engines for width, height in sizes]


def side_by_side(
    contenders: Mapping[str, Fuse],
    size: tuple[int, int] = (640, 480),
    repeats: int = 50,
    warm_up: int = 3,
    seconds: float = 60.0,
) -> dict[str, dict[str, float]]:
    """Times several ways to fuse in turns, frame by frame, so that whatever else the machine does hits all alike.

    Args:
        contenders: by name; each is given the same pair. The first one is the measure of the ratios.
        size: width and height.
        repeats: rounds; fewer, but at least three, once `seconds` are over.

    Returns:
        For each name `median_ms, p95_ms, p99_ms, cpu_ms` (mean) and `ratio`: its median divided by that of the first.
    """
    pair = reference_pair(size[::-1])
    for _ in range(max(1, warm_up)):
        for fuse in contenders.values():
            fuse(*pair)
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    names = list(contenders)
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name in names if turn % 2 == 0 else reversed(names):  # who comes second finds warm caches
            cpu_start, start = time.process_time(), time.perf_counter()
            contenders[name](*pair)
            wall[name].append((time.perf_counter() - start) * 1000)
            cpu[name].append((time.process_time() - cpu_start) * 1000)
    first = float(np.median(wall[names[0]]))
    return {
        name: {
            "median_ms": float(np.median(wall[name])),
            "p95_ms": float(np.percentile(wall[name], 95)),
            "p99_ms": float(np.percentile(wall[name], 99)),
            "cpu_ms": float(np.mean(cpu[name])),
            "ratio": float(np.median(wall[name])) / first,
        }
        for name in names
    }


def resident_mb() -> float:
    """Memory of this process in MB, now; where the system does not tell, its peak."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def _row(engine: FusionEngine, width: int, height: int, repeats: int, warm_up: int, seconds: float) -> dict[str, Any]:
    infrared, visible = reference_pair((height, width))
    priors = engine.estimate_priors(infrared, visible)
    for _ in range(max(1, warm_up)):
        engine.fuse(infrared, visible, priors)
    times_ms: list[float] = []
    gc.collect()
    cpu_start, end = time.process_time(), time.perf_counter() + seconds
    while len(times_ms) < repeats and (len(times_ms) < 3 or time.perf_counter() < end):
        start = time.perf_counter()
        engine.fuse(infrared, visible, priors)
        times_ms.append((time.perf_counter() - start) * 1000)
    cpu_ms = (time.process_time() - cpu_start) * 1000 / len(times_ms)
    throughput_fps, callers = 1000 * len(times_ms) / sum(times_ms), engine.description.at_once
    if callers > 1:
        throughput_fps = _throughput_fps(
            lambda: engine.fuse(infrared, visible, priors), callers, len(times_ms), seconds
        )
    priors_ms = []
    for _ in range(5):
        start = time.perf_counter()
        engine.estimate_priors(infrared, visible)
        priors_ms.append((time.perf_counter() - start) * 1000)
    median_ms = float(np.median(times_ms))
    description = engine.description
    row = {
        "engine": description.runtime,
        "precision": description.precision,
        "variant": description.variant,
        "width": width,
        "height": height,
        "what": "network",
        "median_ms": median_ms,
        "p95_ms": float(np.percentile(times_ms, 95)),
        "p99_ms": float(np.percentile(times_ms, 99)),
        "cpu_ms": cpu_ms,
        "fps": 1000 / median_ms,
        "rss_mb": resident_mb(),
        "threads": description.threads,
        "at_once": description.at_once,
        "frames": len(times_ms),
        "throughput_fps": throughput_fps,
        "priors_ms": float(np.median(priors_ms)),
    }
    gpu_mb = _gpu_mb(engine)
    return row if gpu_mb is None else row | {"gpu_mb": gpu_mb}


def _throughput_fps(fuse: Callable[[], object], callers: int, frames: int, seconds: float) -> float:
    """Frames a second with so many callers at the same time, who fuse `frames` together, or for `seconds`."""
    left = iter(range(frames))  # taking the next item is atomic
    end = time.perf_counter() + seconds

    def call() -> int:
        done = 0
        for _ in left:
            fuse()
            done += 1
            if time.perf_counter() > end:
                break
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        done = sum(waiting.result() for waiting in [pool.submit(call) for _ in range(callers)])
    return done / (time.perf_counter() - start)


def _gpu_mb(engine: FusionEngine) -> float | None:
    """The GPU memory that PyTorch holds, at its peak; None where the engine uses none."""
    if getattr(getattr(engine, "device", None), "type", "cpu") != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_reserved() / 2**20
