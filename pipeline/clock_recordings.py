"""The offset between two recordings' clocks: reads the frames, follows the motion, asks calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from calibration.time_offset import TimeOffset, estimate_offset
from pipeline.clock import MotionLog
from pipeline.frame import Camera
from pipeline.replay import frames_of


@dataclass(frozen=True)
class ClockReport:
    """What two recordings tell about their clocks."""

    offset: TimeOffset
    frames: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        values = {name: round(value, 4) for name, value in asdict(self.offset).items()}
        return {"state": "ok", **values, "confidence": self.offset.confidence, "frames": self.frames}


def compare_recordings(
    infrared: str,
    visible: str,
    rate_hz: float,
    max_offset_s: float,
    longest_s: float,
    on_frame: Callable[[], None] = lambda: None,
) -> ClockReport:
    """Measures offset and drift of two recordings.

    Args:
        rate_hz: of image folders, which have none of their own.
        max_offset_s: how far apart the recordings may have begun.
        longest_s: only so much of their beginning is read.
        on_frame: called with each frame that was read.

    Raises:
        SourceError: a recording cannot be read.
        NoSharedMotion: nothing can be told, and why.
    """
    logs: dict[Camera, MotionLog] = {"infrared": MotionLog(), "visible": MotionLog()}
    paths: tuple[tuple[Camera, str], ...] = (("infrared", infrared), ("visible", visible))
    for camera, path in paths:
        for frame in frames_of(path, camera, rate_hz):
            if frame.captured_ns > longest_s * 1e9:
                break
            logs[camera].add(frame)
            on_frame()
    offset = estimate_offset(logs["infrared"].signal(), logs["visible"].signal(), max_offset_s)
    return ClockReport(offset, {"ir": logs["infrared"].frames, "vis": logs["visible"].frames})
