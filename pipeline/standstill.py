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
from pipeline.shutter import LONGEST_NS

LATE_NS = 500_000_000  # by which the visible view may come to rest after the infrared one...
TOO_LATE_NS = 1_000_000_000  # ...and from which on infrared is known to hang
APART_NS = 105_000_000  # between two visible pictures that are compared...
STEPS = 8  # ...and so many of these make up a second
PAUSE_NS = 3 * APART_NS  # visible pictures farther apart are not compared
BLOCKS = (20, 15)
SAMPLES_PER_BLOCK = 8  # a side
TEXTURED_SHARE = 0.5  # of the blocks, those with the most texture
CHANGED_SHARE = 0.4  # of these change by more than what counts as the change
MOVING_LEVELS = 1.0  # grey levels that a moving view changes by in a second, at least...
MOVING_USUALS = 2.5  # ...and so many times the usual change of a step: noise gives 1, motion 3 to 9
JUMP_SHARE = 0.6  # of what changes in a second: where one step has so much, a lamp was switched on
MOVING_STEPS = 4  # in a row...
STOP_STEP = 3  # of a second's steps, where the view came to rest that was seen to move until then
DOUBT_STEPS = 2  # ...and so many leave open whether the view is still at rest
CREPT_SHARE = 0.1  # of what a second of motion changes: a view at rest that has become so different has crept
FADING = 0.98  # of what is remembered of the motion, a step
CONTRAST_SHARE = 0.5  # of the contrast while moving: with less, the view might move unseen


class _Picture:
    """What is compared of a visible picture: the means of large blocks of its green channel, from a few samples."""

    def __init__(self, image: np.ndarray) -> None:
        self.blocks = _blocks(image)
        texture = np.abs(cv2.Laplacian(self.blocks, cv2.CV_32F)).ravel()
        self.contrast = _quantile(texture, 1 - TEXTURED_SHARE)
        self._textured = texture >= self.contrast

    def change_from(self, before: _Picture) -> float:
        """By how many grey levels the blocks with texture have changed, apart from a change of all."""
        change = (self.blocks - before.blocks).ravel()
        return _quantile(np.abs(change - _quantile(change, 0.5))[self._textured], 1 - CHANGED_SHARE)


def _blocks(image: np.ndarray) -> np.ndarray:
    steps = [
        max(1, side // (blocks * SAMPLES_PER_BLOCK)) for side, blocks in zip(image.shape[:2], BLOCKS[::-1], strict=True)
    ]
    samples = np.ascontiguousarray(image[:: steps[0], :: steps[1], 1]).astype(np.float32)
    return cv2.resize(samples, BLOCKS, interpolation=cv2.INTER_AREA)


def _quantile(values: np.ndarray, share: float) -> float:
    place = min(int(share * values.size), values.size - 1)
    return float(np.partition(values, place)[place])


class VisibleView:
    """Whether the view of the visible camera moves, or since when it has been at rest."""

    def __init__(self) -> None:
        self._views: deque[_Picture] = deque(maxlen=STEPS + 1)
        self._times_ns: deque[int] = deque(maxlen=STEPS + 1)
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._changed_steps = self._moving_steps = self._crept_steps = 0  # in a row
        self._contrast: float | None = None  # when the view was last seen to move...
        self._speed_levels = 0.0  # ...and by how much it did in a second
        self._reference: _Picture | None = None  # the view at rest
        self._rests_since_ns: int | None = None

    @property
    def rests_since_ns(self) -> int | None:
        """None: it moves, or nothing is known."""
        in_doubt = len(self._steps) < STEPS or max(self._changed_steps, self._crept_steps) >= DOUBT_STEPS
        return None if in_doubt else self._rests_since_ns

    def moved_since(self, when_ns: int) -> bool:
        """Whether the view is known to have moved after a moment."""
        if self._moving_steps >= MOVING_STEPS:
            return self._times_ns[0] >= when_ns
        return self._rests_since_ns is not None and self._rests_since_ns > when_ns

    def add(self, frame: Frame) -> None:
        """Looks at a frame, if it comes long enough after the last one looked at."""
        passed_ns = frame.captured_ns - self._times_ns[-1] if self._times_ns else 0
        if self._times_ns and passed_ns < APART_NS:
            return
        if passed_ns > PAUSE_NS:
            for history in (self._views, self._times_ns, self._steps):
                history.clear()
        self._views.append(_Picture(frame.image))
        self._times_ns.append(frame.captured_ns)
        if len(self._views) > 1:
            self._steps.append(self._views[-1].change_from(self._views[-2]))
        if len(self._steps) == STEPS:
            self._judge()

    def _judge(self) -> None:
        newest, usual = self._views[-1], median(self._steps)
        moved, least = newest.change_from(self._views[0]), max(MOVING_LEVELS, MOVING_USUALS * usual)
        changed, jumped = moved >= least, max(self._steps) >= JUMP_SHARE * moved
        self._changed_steps = self._changed_steps + 1 if changed else 0
        self._moving_steps = self._moving_steps + 1 if changed and not jumped else 0
        if self._moving_steps >= MOVING_STEPS:
            self._contrast, self._rests_since_ns = newest.contrast, None
            self._speed_levels = max(moved, FADING * self._speed_levels)
        elif self._contrast is None or newest.contrast < CONTRAST_SHARE * self._contrast:
            self._rests_since_ns = None
        elif self._rests_since_ns is None or self._reference is None:
            self._reference, self._rests_since_ns, self._crept_steps = newest, self._times_ns[STOP_STEP], 0
        elif changed and jumped:
            self._reference = newest
        else:
            crept = newest.change_from(self._reference) >= max(least, CREPT_SHARE * self._speed_levels)
            self._crept_steps = self._crept_steps + 1 if crept else 0
            if self._crept_steps >= MOVING_STEPS:
                self._rests_since_ns = None


class Standstill:
    """Takes the frames of both cameras, in about their order in time, with their times on one clock."""

    def __init__(self) -> None:
        self._view = VisibleView()
        self._visible_ns = 0
        self._began_ns: int | None = None  # when infrared began to show nothing new
        self.hangs = False  # the newest infrared picture repeats, and neither a shutter nor rest explains that
        self.resting = False  # the newest infrared picture repeats, because nothing moves

    def judged(self, frame: Frame) -> Frame:
        """The frame, an infrared one with what the visible view tells of its repeats."""
        if frame.camera == "visible":
            if frame.captured_ns < self._visible_ns:  # its clock was set back
                self._view = VisibleView()
            self._visible_ns = frame.captured_ns
            self._view.add(frame)
            return frame
        self.resting = False
        if not frame.repeats and not frame.still:
            self._began_ns, self.hangs = None, False
            return frame
        if self._began_ns is None or frame.captured_ns < self._began_ns:
            self._began_ns = frame.captured_ns
        latest_ns = self._began_ns + LATE_NS
        long_enough = frame.captured_ns - self._began_ns >= LONGEST_NS
        # Sixteen bits come without a codec: a live picture has noise in them.
        self.hangs |= self._view.moved_since(self._began_ns + TOO_LATE_NS) or (
            long_enough and frame.image.dtype != np.uint8
        )
        if self.hangs:
            return frame if frame.repeats else replace(frame, repeats=frame.still)
        if not frame.repeats or not frame.still or not self._watched_until(frame.captured_ns):
            return frame
        since_ns = self._view.rests_since_ns
        self.resting = since_ns is not None and since_ns <= latest_ns and long_enough
        return replace(frame, repeats=0) if self.resting else frame

    def _watched_until(self, now_ns: int) -> bool:
        return now_ns - self._visible_ns <= LATE_NS
