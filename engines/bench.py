"""How long the network takes for a frame: wall and processor time, after warming up."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.arrays import reference_pair
from engines.base import FusionEngine


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
        p99_ms, cpu_ms` (processor time of all threads, mean), `fps` (of the median), `rss_mb` (of the process now),
        `threads`, and `frames`, how many were timed.
    """
    return [_row(engine, width, height, repeats, warm_up, seconds) for engine in engines for width, height in sizes]


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
    cpu_start, end = time.process_time(), time.perf_counter() + seconds
    while len(times_ms) < repeats and (len(times_ms) < 3 or time.perf_counter() < end):
        start = time.perf_counter()
        engine.fuse(infrared, visible, priors)
        times_ms.append((time.perf_counter() - start) * 1000)
    cpu_ms = (time.process_time() - cpu_start) * 1000 / len(times_ms)
    median_ms = float(np.median(times_ms))
    description = engine.description
    return {
        "engine": description.runtime,
        "precision": description.precision,
        "variant": description.variant,
        "width": width,
        "height": height,
        "what": "network",
        "median_ms": median_ms,
        "p99_ms": float(np.percentile(times_ms, 99)),
        "cpu_ms": cpu_ms,
        "fps": 1000 / median_ms,
        "rss_mb": resident_mb(),
        "threads": description.threads,
        "frames": len(times_ms),
    }
