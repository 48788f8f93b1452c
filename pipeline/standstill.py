"""Tells an infrared view that stands still from a camera that hangs: the visible camera sees whether anything moves.

Behind a codec that smooths all noise away, a live infrared camera at rest repeats its picture, as does one that hangs.
Where the visible view has come to rest at the same moment, within half a second, and has stayed so, the infrared
picture repeats because nothing moves. Where it moved on, or had stopped before, the infrared camera hangs or its
shutter is closed. No shutter is closed for longer than 3.6 s, so no repeat counts as fresh before that; and a camera
that repeats bit by bit from the first time on has no codec, but noise in every live picture: it is always frozen.

The visible view is told by its own change: 60th percentile over those large blocks that have texture, so that what
passes through a standing view does not count. Rest is what changes by far less than the second before it did. So a
picture that is dark or flat, in which nothing changes by motion, tells nothing, and infrared stays frozen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from statistics import median

import cv2
import numpy as np

from pipeline.frame import Frame

LONGEST_NS = 3_600_000_000  # that a shutter is closed
APART_NS = 105_000_000  # between two visible pictures that are compared
HISTORY = 80  # comparisons: 8 s and more
SMOOTHED = 3  # comparisons of which the median counts: a key picture of the codec changes one
BLOCKS = (20, 15)
SAMPLES_PER_BLOCK = 8  # a side
TEXTURED_SHARE = 0.5  # of the blocks, those with the most texture
CHANGED_PERCENTILE = 60
BEFORE_NS = (1_000_000_000, 300_000_000)  # the view moved from so long before infrared began to repeat, to so long
AFTER_NS = 500_000_000  # ...and has been at rest since so long after
FEWEST_BEFORE, FEWEST_SINCE = 3, 10  # comparisons
MOVING_LEVELS = 0.4  # grey levels; a view that changes by less is not seen to move
RESTING_SHARE = 0.3  # of the change before: a view that changes by less is at rest


class Standstill:
    """Takes the frames of both cameras, in about their order in time, with their times on one clock."""

    def __init__(self) -> None:
        self._blocks: np.ndarray | None = None
        self._compared_ns = 0
        self._changes: deque[tuple[int, float]] = deque(maxlen=HISTORY)
        self._began_ns: int | None = None  # when infrared began to repeat
        self._coded = False  # it has repeated, but not bit by bit
        self._resting_levels: float | None = None  # the view is at rest while it changes by less; None: not known to be
        self._denied = False  # until infrared shows something new
        self.resting = False  # the newest infrared picture repeats, because nothing moves

    def judged(self, frame: Frame) -> Frame:
        """The frame; an infrared one that repeats because the view rests comes back as one that does not repeat."""
        if frame.camera == "visible":
            self._look_at(frame)
            return frame
        self.resting = self._rests(frame)
        return replace(frame, repeats=0) if self.resting else frame

    def _rests(self, frame: Frame) -> bool:
        if not frame.repeats:
            self._began_ns, self._coded, self._denied = None, False, False
            return False
        if self._began_ns is None or frame.captured_ns < self._began_ns:
            self._began_ns = frame.captured_ns
        self._coded |= not frame.unchanged
        if not self._coded or self._denied or frame.captured_ns - self._began_ns < LONGEST_NS:
            return False
        if self._resting_levels is None:
            self._resting_levels = self._came_to_rest(self._began_ns)
        self._denied = self._resting_levels is None
        return not self._denied

    def _came_to_rest(self, when_ns: int) -> float | None:
        """Below which change the view is at rest, where it has come to rest at a moment and not moved since."""
        before = [levels for at_ns, levels in self._changes if BEFORE_NS[1] <= when_ns - at_ns <= BEFORE_NS[0]]
        since = [levels for at_ns, levels in self._changes if at_ns - when_ns >= AFTER_NS]
        if len(before) < FEWEST_BEFORE or len(since) < FEWEST_SINCE:
            return None
        moving = median(before)
        resting = RESTING_SHARE * moving
        return resting if moving >= MOVING_LEVELS and max(_smoothed(since)) <= resting else None

    def _look_at(self, frame: Frame) -> None:
        passed_ns = frame.captured_ns - self._compared_ns
        if 0 <= passed_ns < APART_NS:
            return
        before, self._blocks, self._compared_ns = self._blocks, _blocks(frame.image), frame.captured_ns
        if before is None or passed_ns < 0 or passed_ns > 3 * APART_NS:
            self._changes.clear()
            self._resting_levels = None
            return
        self._changes.append((frame.captured_ns, _change(before, self._blocks)))
        newest = [levels for _, levels in self._changes][-SMOOTHED:]
        if self._resting_levels is not None and median(newest) > self._resting_levels:
            self._resting_levels = None


def _smoothed(levels: list[float]) -> list[float]:
    return [median(levels[first : first + SMOOTHED]) for first in range(len(levels) - SMOOTHED + 1)]


def _blocks(image: np.ndarray) -> np.ndarray:
    """Means of large blocks of the green channel, from a few samples of each."""
    height, width = image.shape[:2]
    step_y, step_x = (
        max(1, side // (blocks * SAMPLES_PER_BLOCK)) for side, blocks in zip((height, width), BLOCKS[::-1], strict=True)
    )
    samples = np.ascontiguousarray(image[::step_y, ::step_x, 1]).astype(np.float32)
    return cv2.resize(samples, BLOCKS, interpolation=cv2.INTER_AREA)


def _change(before: np.ndarray, blocks: np.ndarray) -> float:
    """By how many grey levels most of the blocks with texture change, apart from a change of all."""
    change = blocks - before
    change = np.abs(change - np.median(change))
    texture = np.abs(cv2.Laplacian(blocks, cv2.CV_32F))
    textured = texture >= np.quantile(texture, 1 - TEXTURED_SHARE)
    return float(np.percentile(change[textured], CHANGED_PERCENTILE))
