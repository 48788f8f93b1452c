"""What stills cannot show: does a fused video flicker where nothing moves, and does it follow what does?

Both figures are in grey levels of 255 and take luminance, (H, W) uint8. Judge degraded clips with the CLEAN sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.evaluation.metrics import luminance

Image = NDArray[np.uint8]

STILL_LEVELS = 2  # both clean sources change by less than this where the scene is static
LEAST_STATIC_SHARE = 0.005  # of the picture; frames with less of it say nothing
ROUND_TRIP_PX = 1.0  # flow forth and back ends this near to its start, or the point was covered


class StaticScene:
    """Where a clip's clean sources stand still, frame by frame; judges any video of the same scene.

    Args:
        infrared, visible: the clean frames, in order, uint8 (H, W) or RGB (H, W, 3), of one size.

    Raises:
        ValueError: if there are fewer than two frames, or the two clips differ in length or size.
    """

    def __init__(self, infrared: Sequence[Image], visible: Sequence[Image]) -> None:
        if len(infrared) != len(visible) or len(infrared) < 2:
            raise ValueError(f"need two clips of at least two frames, got {len(infrared)} and {len(visible)}")
        self._infrared = [luminance(frame) for frame in infrared]
        self._visible = [luminance(frame) for frame in visible]
        if len({frame.shape for frame in (*self._infrared, *self._visible)}) != 1:
            raise ValueError("all frames of both clips must have one size")
        self._static = [
            (change(self._infrared, index) < STILL_LEVELS) & (change(self._visible, index) < STILL_LEVELS)
            for index in range(1, len(infrared))
        ]

    @property
    def static_share(self) -> float:
        """How much of the picture stands still, on average."""
        return float(np.mean([mask.mean() for mask in self._static]))

    def flicker(self, frames: Sequence[Image]) -> float:
        """The mean |F(t) - F(t-1)| where the scene is static, averaged over the frames; NaN where nothing is static."""
        frames = self._checked(frames)
        means = [
            float(change(frames, index)[mask].mean())
            for index, mask in enumerate(self._static, 1)
            if mask.mean() >= LEAST_STATIC_SHARE
        ]
        return float(np.mean(means)) if means else float("nan")

    def warped_error(self, frames: Sequence[Image]) -> float:
        """The mean |F(t) - warped F(t-1)|, moved as the clean visible picture moves, where nothing was covered.

        Averaged over the frames; NaN if all of every frame was covered before.
        """
        return self.warped_errors([frames])[0]

    def warped_errors(self, videos: Sequence[Sequence[Image]]) -> list[float]:
        """`warped_error` of several videos; the motion is found once for all of them."""
        checked = [self._checked(frames) for frames in videos]
        errors: list[list[float]] = [[] for _ in checked]
        for index, (flow, seen) in enumerate(self._motion(), 1):
            if not seen.any():
                continue
            for frames, found in zip(checked, errors, strict=True):
                moved = cv2.remap(frames[index - 1], flow[..., 0], flow[..., 1], cv2.INTER_LINEAR)
                found.append(float(cv2.absdiff(frames[index], moved)[seen].mean()))
        return [float(np.mean(found)) if found else float("nan") for found in errors]

    def _checked(self, frames: Sequence[Image]) -> list[Image]:
        if len(frames) != len(self._visible):
            raise ValueError(f"the clip has {len(self._visible)} frames, this one {len(frames)}")
        return [luminance(frame) for frame in frames]

    def _motion(self) -> Iterable[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """For each frame but the first: where each of its pixels was before, and whether it was seen there."""
        finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        height, width = self._visible[0].shape
        grid = np.dstack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32)
        for before, now in zip(self._visible[:-1], self._visible[1:], strict=True):
            back = np.asarray(finder.calc(now, before, None), np.float32)  # type: ignore[call-overload]
            forth = np.asarray(finder.calc(before, now, None), np.float32)  # type: ignore[call-overload]
            origin = grid + back
            returned = back + cv2.remap(forth, origin[..., 0], origin[..., 1], cv2.INTER_LINEAR)
            inside = (origin >= 0).all(-1) & (origin[..., 0] <= width - 1) & (origin[..., 1] <= height - 1)
            yield origin, inside & (np.hypot(returned[..., 0], returned[..., 1]) < ROUND_TRIP_PX)


def change(frames: Sequence[Image], index: int) -> Image:
    """How much each pixel changed since the frame before."""
    return np.asarray(cv2.absdiff(frames[index], frames[index - 1]), dtype=np.uint8)
