"""Recognises a thermal camera whose shutter is closed: it repeats its last picture.

A real detector is noisy, so two pictures of the world never agree in every pixel. While the shutter closes to
recalibrate the core (0.5 to 3 s), equal pictures in a row are normal: the camera does not hang, but what it sends is
old.

A lossy codec makes each repeat a little different: it spends the bits that nothing moves for on detail, and with every
key picture the noise of the coding changes. Such a repeat is told by two things, against what this camera's pictures
did just before. It changes little; and where the view was moving, the change no longer goes on in the same way: two
differences of a moving view are alike, those of a coding are not. Means over small blocks are compared, in which coding
noise cancels. A view may also stop or turn around at any picture; but where a shift of the whole view explains a part
of the change, the camera has seen something new, for a coding shifts nothing. A scene that comes to rest changes little
as well, but everywhere, by the sensor's noise; that is told after a few pictures. What a codec has smoothed so far that
a live, resting scene repeats exactly cannot be told from a closed shutter: where it stood still before, it is taken for
live, at the latest after 3.6 s, for no shutter is closed for longer. Where the view was moving, and where nothing shows
that there is a codec, it stays a frozen picture: a camera that hangs must never pass for a live one. There the visible
camera may tell that nothing moves (`standstill`).

A camera's pictures are judged once, all of them, where they enter the pipeline: each frame carries the verdict on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import cv2
import numpy as np

from pipeline.frame import Frame

_ROW_STEP = 8  # every eighth row tells pictures apart in less than 0.01 ms

BLOCK_PX = 8  # side of the blocks whose means are compared
LIVE_PICTURES = 25  # whose changes are remembered...
FEWEST_PICTURES = 3  # ...once there are so many, and their lower quartile is what a live picture changes by
SUDDEN = 0.3  # share of it that a repeat stays below...
CODING_LEVELS = 0.4  # ...and the most that coding anew changes the blocks of a picture by
STILL_LEVELS = 0.03  # where live pictures change by less, one without any change says nothing
SKIPPED_SHARE = 0.5  # of the blocks: a first picture that changes in fewer is of a scene that stands still
STEADY = 0.3  # likeness of one difference and those before it, from which on a view is moving...
BROKEN = 0.4  # ...and the share of it that the likeness of a repeat stays below...
BROKEN_LEVELS = 1.6  # ...if it changes by less than so much of what a live picture does
MEMORY = 0.7  # of the differences before, from one picture to the next
SHIFTED = 0.2  # share of a change that a shift of the whole view explains: from here on it is no coding
PANNING, UNSHIFTED = 0.3, 0.05  # where live pictures have the first, one that falls below the second repeats
FEWEST_BLOCKS = 64  # a smaller picture is no camera's
MOVED_PICTURES = 2  # above it in a row: the shutter is open again; one alone is a key picture
RUN_PICTURES = 4  # since the shutter closed that are remembered
REST_PICTURES = 10  # after so many, noise is told from refined detail...
REST_SHARE = 0.7  # ...by the share of the blocks that change: noise is everywhere
LONGEST_NS = 3_600_000_000  # no shutter is closed for longer
USUAL_PERIOD_NS = 40_000_000


class Repeats:
    """Counts how often the newest picture has been seen before in a row, bit by bit."""

    def __init__(self) -> None:
        self._rows: np.ndarray | None = None
        self.count = 0

    def add(self, image: np.ndarray) -> int:
        """Returns 0 for a new picture, n for its n-th repeat."""
        rows = image[::_ROW_STEP]
        if self._rows is not None and rows.dtype == self._rows.dtype and np.array_equal(rows, self._rows):
            self.count += 1
        else:
            self._rows = rows.copy()  # a source may fill the same buffer again
            self.count = 0
        return self.count


@dataclass(frozen=True, slots=True)
class _Change:
    """How two pictures differ in the means of their blocks."""

    levels: float  # grey levels, on average
    share: float  # of the blocks that differ at all
    likeness: float | None  # -1 to 1: whether they differ as the ones before them did; None: there are none
    shift: float  # 0 to 1: share of the squared difference that a shift of the whole view explains


NO_CHANGE = _Change(0.0, 0.0, None, 0.0)


class Shutter:
    """Counts repeats as `Repeats` does, and those of 8-bit pictures behind a lossy codec as well."""

    def __init__(self) -> None:
        self._exact = Repeats()
        self._blocks: np.ndarray | None = None
        self._trend: np.ndarray | None = None  # the differences before, the newest ones most
        self._live: deque[_Change] = deque(maxlen=LIVE_PICTURES)
        self._run: deque[_Change] = deque(maxlen=RUN_PICTURES)  # since the shutter closed
        self._moved = 0  # pictures in a row
        self._lossy = False  # since the shutter closed, a picture has differed as one does that is coded anew
        self._rests = False  # a lossy codec has repeated, and there has been no news since
        self._news = 0  # pictures in a row
        self._at_ns = self._closed_ns = 0  # of the newest picture, and of the one that was the first to repeat
        self.count = 0
        self.still = 0

    def judged(self, frame: Frame) -> Frame:
        """The frame with its repeats told. A visible camera has no shutter."""
        if frame.camera != "infrared":
            return frame
        return replace(frame, repeats=self.add(frame.image, frame.captured_ns), still=self.still)

    def add(self, image: np.ndarray, at_ns: int | None = None) -> int:
        """Returns 0 for a new picture, n for its n-th repeat. Without a time it comes 40 ms after the one before."""
        self._at_ns = self._at_ns + USUAL_PERIOD_NS if at_ns is None else at_ns
        exact = self._exact.add(image)
        if image.dtype != np.uint8:
            self.count = exact
        else:
            change = NO_CHANGE if exact else self._change_of(image)
            self._judge(change)
            self._watch(change)
        return self.count

    def _judge(self, change: _Change | None) -> None:
        if change is None:
            self._open()
            self._live.clear()
        elif change is NO_CHANGE:
            if self.count or self._was_moving:
                self._repeat(change)
            else:
                self._rests = True
                self._open(change)
        elif len(self._live) < FEWEST_PICTURES:
            self._open(change)
            if change.share < SKIPPED_SHARE:  # a codec skips what does not move: this scene stands still
                self._rests = True
                self._live.extend([change] * FEWEST_PICTURES)
        elif change.shift >= SHIFTED:
            self._open(change)
        elif self._goes_on(change):
            self._moved += 1
            if self.count and self._moved < MOVED_PICTURES and (self._lossy or not self._stands_out(change)):
                self.count += 1
            else:
                self._open(change)
        else:
            self._moved = 0
            self._lossy |= change.share <= REST_SHARE
            self._repeat(change)

    def _watch(self, change: _Change | None) -> None:
        """Counts the pictures that show nothing new."""
        news = change is None or change.shift >= SHIFTED or change.levels >= CODING_LEVELS
        self._news = self._news + 1 if news and not self.count else 0
        self._rests = (self._rests and self._news < MOVED_PICTURES) or bool(self.count and self._lossy)
        self.still = self.still + 1 if self._rests else 0

    def _repeat(self, change: _Change) -> None:
        self._run.append(change)
        if not self.count:
            self._closed_ns = self._at_ns
        self.count += 1
        if self._at_rest():
            self._rests = True
            self._live.clear()
            self._live.extend([change] * FEWEST_PICTURES)
            self._open(change)

    @property
    def _was_moving(self) -> bool:
        """Whether live pictures are known to change, or nothing is known of them."""
        return len(self._live) < FEWEST_PICTURES or self._usual(lambda one: one.levels) > STILL_LEVELS

    def _goes_on(self, change: _Change) -> bool:
        """Whether a picture changes as live ones do."""
        levels, likeness = self._usual(lambda one: one.levels), self._usual(lambda one: one.likeness or 0.0)
        if change.levels < min(SUDDEN * levels, CODING_LEVELS):
            return False
        broken = likeness >= STEADY and change.likeness is not None and abs(change.likeness) < BROKEN * likeness
        broken |= change.shift < UNSHIFTED and self._usual(lambda one: one.shift) >= PANNING
        return not broken or change.levels >= BROKEN_LEVELS * levels

    def _stands_out(self, change: _Change) -> bool:
        """Whether a picture changes by more than coding it anew would."""
        return change.levels >= BROKEN_LEVELS * max(self._usual(lambda one: one.levels), CODING_LEVELS)

    def _usual(self, of: Callable[[_Change], float]) -> float:
        return sorted(of(one) for one in self._live)[len(self._live) // 4]

    def _open(self, change: _Change | None = None) -> None:
        if self.count:
            self._trend = None
        self.count = self._moved = 0
        self._lossy = False
        self._run.clear()
        if change is not None:
            self._live.append(change)

    def _at_rest(self) -> bool:
        """Whether what looked like a closed shutter is a scene that stands still."""
        if self.count < REST_PICTURES:
            return False
        if median(change.share for change in self._run) > REST_SHARE:
            return True
        moved = len(self._live) >= FEWEST_PICTURES and self._usual(lambda one: one.levels) > CODING_LEVELS
        return self._at_ns - self._closed_ns >= LONGEST_NS and self._lossy and not moved

    def _change_of(self, image: np.ndarray) -> _Change | None:
        """From the picture before; None: there is none of this size."""
        height, width = image.shape
        size = (width // BLOCK_PX, height // BLOCK_PX)
        if size[0] * size[1] < FEWEST_BLOCKS:
            return None
        before = self._blocks
        self._blocks = cv2.resize(image[::2].astype(np.float32), size, interpolation=cv2.INTER_AREA)
        if before is None or before.shape != self._blocks.shape:
            self._trend = None
            return None
        difference = cv2.subtract(self._blocks, before)
        levels = cv2.norm(difference, cv2.NORM_L1) / difference.size
        share = cv2.countNonZero(difference) / difference.size
        return _Change(levels, share, self._likeness(difference), _shift(difference, self._blocks + before))

    def _likeness(self, difference: np.ndarray) -> float | None:
        """Of a difference and those before it."""
        trend = self._trend
        if trend is None or self._moved:  # all that has moved since the shutter closed is no trend
            self._trend = difference
            return None
        self._trend = cv2.addWeighted(trend, MEMORY, difference, 1 - MEMORY, 0)
        lengths = cv2.norm(difference) * cv2.norm(trend)
        return float(cv2.sumElems(cv2.multiply(difference, trend))[0]) / lengths if lengths else None


def _shift(difference: np.ndarray, view: np.ndarray) -> float:
    """Share of a difference, squared, that the gradients of a view explain by least squares: 0 to 1."""
    x, y = cv2.Sobel(view, cv2.CV_32F, 1, 0), cv2.Sobel(view, cv2.CV_32F, 0, 1)
    xx, yy, xy, x_difference, y_difference, squared = (
        float(one.ravel() @ other.ravel())
        for one, other in ((x, x), (y, y), (x, y), (x, difference), (y, difference), (difference, difference))
    )
    damping = 1e-3 * (xx + yy)  # a view of stripes tells of one direction only
    xx, yy = xx + damping, yy + damping
    determinant = xx * yy - xy * xy
    if not squared or not determinant:
        return 0.0
    explained = x_difference**2 * yy - 2 * x_difference * y_difference * xy + y_difference**2 * xx
    return explained / determinant / squared
