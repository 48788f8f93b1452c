"""Puts the infrared picture onto the visible camera's pixel grid, with one remap that is computed once.

Lens, pose and reference plane of the calibration are in one map, so each frame is interpolated once (0.6 ms at
640x480). Without a calibration file the infrared picture is only resized, and every pair says `calibrated = False`.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from calibration.rig import Rig, infrared_map
from calibration.rig_file import load_rig
from pipeline.config import RegistrationConfig
from pipeline.errors import ConfigError
from pipeline.frame import AlignedPair, Frame, FramePair
from pipeline.gain import InfraredGain

Size = tuple[int, int]  # (width, height)


class Register:
    """Gain control and warp of one rig.

    Args:
        config: names the calibration file, if there is one.
        gain: of this rig's infrared camera.
        rig: instead of the file.

    Raises:
        CalibrationError: the calibration file cannot be used.
    """

    def __init__(self, config: RegistrationConfig, gain: InfraredGain, rig: Rig | None = None) -> None:
        self._gain = gain
        self.rig = rig if rig is not None or config.calibration is None else load_rig(config.calibration)
        self._visible_size: Size | None = None  # the last one seen: keeps the output's size while that camera is away
        self._map_x: np.ndarray | None = None
        self._map_y: np.ndarray | None = None
        self._weight: np.ndarray | None = None
        if self.rig is not None:
            self._map_x, self._map_y, self._weight = infrared_map(self.rig, config.feather_px)
            self._weight.flags.writeable = False

    @property
    def calibrated(self) -> bool:
        return self.rig is not None

    @property
    def overlap(self) -> float:
        """Share of the visible picture that infrared sees; 1 when uncalibrated."""
        return 1.0 if self._weight is None else float((self._weight > 0).mean())

    def __call__(self, pair: FramePair) -> AlignedPair:
        """Aligns one pair. The input's pixels stay as they are.

        Returns:
            Pictures of the visible camera's size. Outside of what infrared sees its border is repeated, under a
            weight of 0; an infrared frame on its own is black there, to be shown as it is.

        Raises:
            ConfigError: a camera sends pictures of another size than it was calibrated for.
        """
        self._check_sizes(pair)
        if pair.visible is not None:
            self._visible_size = pair.visible.size
        infrared, gain = self._infrared(pair)
        return AlignedPair(
            pair=pair,
            infrared=infrared,
            visible=None if pair.visible is None else pair.visible.image,
            weight=None if infrared is None else self._weight,
            calibrated=self.calibrated,
            gain=gain,
        )

    def _infrared(self, pair: FramePair) -> tuple[np.ndarray | None, dict[str, Any]]:
        if pair.infrared is None:
            return None, {}
        picture, gain = self._gain(pair.infrared)  # 8 bits first: the warp of 16 bits costs twice as much
        if self._map_x is not None and self._map_y is not None:
            border = cv2.BORDER_CONSTANT if pair.visible is None else cv2.BORDER_REPLICATE
            return cv2.remap(picture, self._map_x, self._map_y, cv2.INTER_LINEAR, borderMode=border), gain
        size = self._visible_size or pair.infrared.size
        if size == pair.infrared.size:
            return picture, gain
        shrinks = size[0] < pair.infrared.size[0]
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), gain

    def _check_sizes(self, pair: FramePair) -> None:
        if self.rig is None:
            return
        for frame, model in ((pair.visible, self.rig.visible), (pair.infrared, self.rig.infrared)):
            if frame is not None and frame.size != model.size:
                raise ConfigError(self._wrong_size(frame, model.size))

    def _wrong_size(self, frame: Frame, expected: Size) -> str:
        assert self.rig is not None
        sizes = f"{_text(expected)}, but the {frame.camera} camera sends {_text(frame.size)}"
        other = self.rig.infrared if frame.camera == "visible" else self.rig.visible
        if frame.size == other.size:
            return f"the calibration is for {sizes}, the other camera's size: are infrared and visible swapped?"
        return (
            f"the calibration is for {sizes}: set that camera to {_text(expected)}, or calibrate at {_text(frame.size)}"
        )


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
