"""Tells an infrared view that stands still from a camera that hangs: the visible camera sees whether anything moves.

Behind a codec that smooths all noise away, a live infrared camera at rest repeats its picture, as does one that hangs.
Where the visible view came to rest before that, or at most half a second later, and has not moved since, the infrared
picture repeats because nothing moves, and is as good as a new one. Where the visible view moves while infrared shows
nothing new, infrared hangs, whatever it looked like before. No shutter is closed for longer than 3.6 s, so no repeat
counts as new before that.

Two changes of the visible view are compared, that of a second and the usual one of a tenth of it. Noise gives both
alike, motion adds up to several times as much, and a lamp that is switched on changes the view once. Changes are those
of most of the large blocks that have texture, so that what passes through a standing view hardly counts. A view that
is dark or flat, or was never seen to move, tells nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from statistics import median

import cv2
import numpy as np

from pipeline.frame import Frame

LONGEST_NS = 3_600_000_000  # that a shutter is closed
LATE_NS = 500_000_000  # by which the visible view may come to rest after the infrared one
APART_NS = 105_000_000  # between two visible pictures that are compared...
STEPS = 8  # ...and so many of these make up a second
PAUSE_NS = 3 * APART_NS  # visible pictures farther apart are not compared
BLOCKS = (20, 15)
SAMPLES_PER_BLOCK = 8  # a side
TEXTURED_SHARE = 0.5  # of the blocks, those with the most texture
CHANGED_PERCENTILE = 60
MOVING_LEVELS = 1.0  # grey levels that a moving view changes by in a second...
MOVING = (
    2.5,
    16.0,
)  # ...and how many times the usual change of a step: noise 1, even motion 3 to 9, a single jump more
MOVING_STEPS = 4  # in a row...
DOUBT_STEPS = 2  # ...and so many leave open whether the view is still at rest
FADING = 0.98  # a step
ELSEWHERE_SHARE = 0.1  # of what a second of motion changes: a view at rest that differs by more has crept
CONTRAST_SHARE = 0.5  # of the contrast while moving: with less, the view might move unseen


class VisibleView:
    """Whether the view of the visible camera moves, or since when it has been at rest."""

    def __init__(self) -> None:
        self._views: deque[np.ndarray] = deque(maxlen=STEPS + 1)
        self._times_ns: deque[int] = deque(maxlen=STEPS + 1)
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._moving_steps = self._elsewhere_steps = 0
        self._contrast: float | None = None  # when the view was last seen to move...
        self._speed_levels = 0.0  # ...and by how much it did in a second
        self._reference: np.ndarray | None = None  # the view at rest
        self._rests_since_ns: int | None = None

    @property
    def moves(self) -> bool:
        return self._moving_steps >= MOVING_STEPS

    @property
    def rests_since_ns(self) -> int | None:
        """None: it moves, or nothing is known."""
        return self._rests_since_ns if max(self._moving_steps, self._elsewhere_steps) < DOUBT_STEPS else None

    def moved_since(self, when_ns: int) -> bool:
        """Whether the view is known to have moved after a moment."""
        moves = self.moves and self._times_ns[0] >= when_ns
        return moves or (self._rests_since_ns is not None and self._rests_since_ns > when_ns)

    def add(self, frame: Frame) -> None:
        """Looks at a frame, if it comes long enough after the last one looked at."""
        passed_ns = frame.captured_ns - self._times_ns[-1] if self._times_ns else 0
        if self._times_ns and 0 <= passed_ns < APART_NS:
            return
        if not 0 <= passed_ns <= PAUSE_NS:
            self.__init__()  # type: ignore[misc]
        self._views.append(_blocks(frame.image))
        self._times_ns.append(frame.captured_ns)
        if len(self._views) > 1:
            self._steps.append(_change(self._views[-2], self._views[-1]))
        if len(self._steps) == STEPS:
            self._judge()

    def _judge(self) -> None:
        newest, usual = self._views[-1], median(self._steps)
        least = max(MOVING_LEVELS, MOVING[0] * usual)
        moved = _change(self._views[0], newest)
        moving = least <= moved <= MOVING[1] * usual
        self._moving_steps = self._moving_steps + 1 if moving else 0
        if self.moves:
            self._contrast, self._rests_since_ns = _contrast(newest), None
            self._speed_levels = max(moved, FADING * self._speed_levels)
        elif self._contrast is None or _contrast(newest) < CONTRAST_SHARE * self._contrast:
            self._rests_since_ns = None
        elif self._rests_since_ns is None or self._reference is None:
            self._reference, self._rests_since_ns = newest, self._times_ns[STEPS // 2]
            self._elsewhere_steps = 0
        else:
            elsewhere = _change(self._reference, newest) >= max(least, ELSEWHERE_SHARE * self._speed_levels)
            self._elsewhere_steps = self._elsewhere_steps + 1 if elsewhere else 0
            if self._elsewhere_steps >= MOVING_STEPS:
                self._rests_since_ns = None


class Standstill:
    """Takes the frames of both cameras, in about their order in time, with their times on one clock."""

    def __init__(self) -> None:
        self._view = VisibleView()
        self._began_ns: int | None = None  # when infrared began to show nothing new
        self._hangs = False
        self.resting = False  # the newest infrared picture repeats, because nothing moves

    def judged(self, frame: Frame) -> Frame:
        """The frame, an infrared one with what the visible view tells of its repeats."""
        if frame.camera == "visible":
            self._view.add(frame)
            return frame
        if not frame.repeats and not frame.still:
            self._began_ns, self._hangs, self.resting = None, False, False
            return frame
        if self._began_ns is None or frame.captured_ns < self._began_ns:
            self._began_ns = frame.captured_ns
        self._hangs |= self._view.moved_since(self._began_ns + LATE_NS)
        self.resting = not self._hangs and bool(frame.repeats) and bool(frame.still) and self._rests(frame.captured_ns)
        if self.resting:
            return replace(frame, repeats=0)
        return replace(frame, repeats=frame.still) if self._hangs and not frame.repeats else frame

    def _rests(self, now_ns: int) -> bool:
        assert self._began_ns is not None
        since_ns = self._view.rests_since_ns
        return since_ns is not None and since_ns <= self._began_ns + LATE_NS and now_ns - self._began_ns >= LONGEST_NS


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
    texture = _texture(blocks)
    textured = texture >= np.quantile(texture, 1 - TEXTURED_SHARE)
    return float(np.percentile(change[textured], CHANGED_PERCENTILE))


def _texture(blocks: np.ndarray) -> np.ndarray:
    return np.abs(cv2.Laplacian(blocks, cv2.CV_32F))


def _contrast(blocks: np.ndarray) -> float:
    return float(np.quantile(_texture(blocks), 1 - TEXTURED_SHARE))
