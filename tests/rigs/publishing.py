"""Synthetic fused frames, and the real publisher fed with them at a steady rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline.config import PublishConfig
from pipeline.frame import AlignedPair, Frame, FramePair, FusedFrame, Mode
from pipeline.publish import PublishContext, Publisher

LOOPBACK = "tcp://127.0.0.1:0"


def fused_frame(
    index: int = 0,
    *,
    mode: Mode = "fused",
    width: int = 64,
    height: int = 48,
    color: tuple[int, int, int] = (200, 40, 40),
    age_ms: float = 0.0,
    captured_ns: int | None = None,
    degradation: dict[str, dict[str, float]] | None = None,
) -> FusedFrame:
    """A plain-coloured fused picture; visible is its half, infrared is gray 120. Captured `age_ms` ago."""
    moment = captured_ns if captured_ns is not None else time.monotonic_ns() - round(age_ms * 1e6)
    gray = np.full((height, width), 120, np.uint8)
    picture = np.full((height, width, 3), color, np.uint8)
    infrared = visible = None
    if mode != "vis_only":
        infrared = Frame("infrared", gray, moment - 4_000_000, index, "rtcp_ntp", 1_500_000, moment)
    if mode != "ir_only":
        visible = Frame("visible", picture // 2, moment, index, "driver", 200_000, moment)
    return FusedFrame(
        image=picture,
        aligned=AlignedPair(
            FramePair(infrared, visible, mode),
            None if infrared is None else infrared.image,
            None if visible is None else visible.image,
            None,
            calibrated=True,
            gain={"method": "percentile", "low": 7100.0, "high": 9020.0},
        ),
        mode=mode,
        index=index,
        latency_ms={"sync": 8.0, "fuse": 17.5},
        degradation=degradation or {"infrared": {"none": 1.0}, "visible": {"none": 0.25, "low_light": 0.75}},
        priors_age_frames=3,
    )


@contextmanager
def publishing(config: PublishConfig | None = None, **options: Any) -> Iterator[Publisher]:
    """A publisher of rig "car" on a free port of this machine."""
    publisher = Publisher(config or PublishConfig(endpoint=LOOPBACK), "car", **options)
    try:
        yield publisher
    finally:
        publisher.close()


@contextmanager
def feeding(
    publisher: Publisher,
    make: Callable[[int], FusedFrame] = fused_frame,
    rate_hz: float = 30.0,
    context: PublishContext | None = None,
) -> Iterator[None]:
    """Publishes `make(0)`, `make(1)`, ... from a thread of its own until the block ends."""
    ended = threading.Event()

    def feed() -> None:
        index, due = 0, time.monotonic()
        while not ended.wait(max(0.0, due - time.monotonic())):
            publisher.publish(make(index), context)
            index, due = index + 1, due + 1 / rate_hz

    thread = threading.Thread(target=feed, name="feed")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=20)


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Returns as soon as the condition holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
