"""What two cameras on one mount see of its motion, through clocks that are off by known amounts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np

from calibration.ego_motion import EgoMotion
from calibration.time_offset import MotionSignal
from pipeline.clock import MotionLog
from pipeline.config import SyntheticSource
from pipeline.frame import Camera
from pipeline.shutter import Shutter
from pipeline.sources.synthetic import SyntheticCamera

Path2D = Callable[[np.ndarray], np.ndarray]  # true seconds -> (N, 2) pixels


def hand_held(seed: int) -> Path2D:
    """Irregular turning: many waves of 0.15 to 2.5 Hz with random phases."""
    random = np.random.default_rng(seed)
    rates = random.uniform(0.15, 2.5, 30)
    sizes = random.normal(0, 1.2, (30, 2)) / rates[:, None]
    phases = random.uniform(0, 2 * np.pi, (30, 2))
    return lambda t: np.sum(sizes * np.sin(2 * np.pi * rates[:, None] * t[:, None, None] + phases), axis=1)


def seen(
    path: Path2D,
    seconds: float,
    rate_hz: float,
    seed: int = 0,
    offset_ms: float = 0.0,
    drift_ppm: float = 0.0,
    jitter_ms: float = 0.0,
    drops: float = 0.0,
    noise_px: float = 0.03,
    scale: float = 1.0,
    roll_deg: float = 0.0,
) -> MotionSignal:
    """What a camera with this clock measures of a motion."""
    random = np.random.default_rng(seed)
    true_s = np.arange(int(seconds * rate_hz)) / rate_hz + random.uniform(0, 1 / rate_hz)
    true_s = true_s[random.random(len(true_s)) >= drops]
    angle = np.radians(roll_deg)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    places = scale * path(true_s) @ turn + random.normal(0, noise_px, (len(true_s), 2))
    told_s = true_s * (1 + drift_ppm * 1e-6) + offset_ms / 1e3 + random.normal(0, jitter_ms / 1e3, len(true_s))
    order = np.argsort(told_s)
    keep = np.concatenate(([True], np.diff(told_s[order]) > 1e-6))
    return MotionSignal(told_s[order][keep], places[order][keep])


def blurred(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image.astype(np.float32), (0, 0), 2.5) * 6


def sampled(image: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return cv2.remap(image, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR)


def rendered(camera: Camera, seconds: float, **settings) -> MotionSignal:
    source = SyntheticCamera(
        SyntheticSource(scene="day", width=256, height=192, rate_hz=25, realtime=False, **settings), camera
    )
    source.open()
    log, shutter = MotionLog(), Shutter()
    for _ in range(int(25 * seconds)):
        log.add(shutter.judged(source.grab()))
    return log.signal()


def first_picture(video: Path) -> np.ndarray:
    with av.open(str(video)) as container:
        return next(container.decode(video=0)).to_ndarray(format="gray")


def moved_picture(still: np.ndarray, path: Path2D, seconds: float, rate_hz: float, seed: int, **clock) -> MotionSignal:
    """A still, moved as a camera that turns would move it, with new noise in each picture; measured as if live."""
    random = np.random.default_rng(seed)
    told = seen(path, seconds, rate_hz, seed, noise_px=0.0, **clock)
    ego, places = EgoMotion(), []
    rows, columns = np.mgrid[30 : still.shape[0] - 30, 30 : still.shape[1] - 30].astype(np.float32)
    noise = random.normal(0, 3, (still.shape[0], still.shape[1])).astype(np.float32)
    for x, y in np.clip(told.path_px, -28, 28):
        picture = sampled(still, columns - x, rows - y)
        dy, dx = random.integers(0, 60, 2)
        grain = np.roll(noise, (dy, dx), (0, 1))[: picture.shape[0], : picture.shape[1]]
        motion = ego.add(np.clip(picture + grain, 0, 255).astype(np.uint8))
        places.append((motion.x_px, motion.y_px))
    return MotionSignal(told.times_s, np.array(places))
