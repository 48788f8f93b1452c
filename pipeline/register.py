"""Puts the infrared picture onto the visible camera's pixel grid, with one remap.

Lens, pose and reference plane of the calibration and the online correction are in one map, so each frame is
interpolated once (0.55 ms at 640x480). Without a calibration file the infrared picture is only resized, and every pair
says `calibrated = False`; a correction is followed all the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from calibration.residual import comparable
from calibration.rig import Rig
from calibration.rig_file import load_rig
from calibration.warp import Maps, Warp
from pipeline.config import RegistrationConfig
from pipeline.errors import ConfigError
from pipeline.frame import AlignedPair, Camera, Frame, FramePair
from pipeline.gain import InfraredGain
from pipeline.refinement import Refinement

Size = tuple[int, int]  # (width, height)


class Register:
    """Gain control and warp of one rig.

    Args:
        config: names the calibration file, if there is one, and how the correction may follow.
        gain: of this rig's infrared camera.
        rig: instead of the file.
        background: refine in a thread of its own (live) instead of in step (replay).

    Raises:
        CalibrationError: the calibration file cannot be used.
    """

    def __init__(
        self, config: RegistrationConfig, gain: InfraredGain, rig: Rig | None = None, background: bool = False
    ) -> None:
        self._config = config
        self._gain = gain
        self._background = background
        self.rig = rig if rig is not None or config.calibration is None else load_rig(config.calibration)
        self.calibration_sha256 = "" if config.calibration is None or rig is not None else _sha256(config.calibration)
        self._visible_size: Size | None = None  # the last one seen: keeps the output's size while that camera is away
        self.leaves_warp = False  # to an engine that registers; may be changed from pair to pair
        self._warp = None if self.rig is None else Warp(self.rig, config.feather_px)
        self._refinement: Refinement | None = None
        if self.rig is not None and config.refine and comparable(self.rig.visible.size):
            self._refine(self.rig.visible.size)

    @property
    def calibrated(self) -> bool:
        return self.rig is not None

    @property
    def overlap(self) -> float:
        """Share of the visible picture that infrared sees; 1 when uncalibrated."""
        maps = self._maps
        return 1.0 if maps is None else float((maps.weight > 0).mean())

    def __call__(self, pair: FramePair) -> AlignedPair:
        """Aligns one pair. The input's pixels stay as they are.

        Returns:
            Pictures of the visible camera's size. Outside of what infrared sees its border is repeated, under a
            weight of 0; an infrared frame on its own is black there, to be shown as it is.

        Raises:
            ConfigError: a camera sends pictures of another size than it was calibrated for.
        """
        for misfit in self.misfits(pair).values():
            raise ConfigError(misfit)
        if pair.visible is not None:
            self._follow_size(pair.visible.size)
        maps = self._maps  # read once: the refinement may swap it at any time
        # A lone infrared frame is black where the map leaves it, which an engine does not know.
        left = maps if self.leaves_warp and pair.visible is not None and pair.infrared is not None else None
        infrared, gain = self._infrared(pair, maps if left is None else None)
        aligned = AlignedPair(
            pair=pair,
            infrared=infrared,
            visible=None if pair.visible is None else pair.visible.image,
            weight=None if infrared is None or maps is None else maps.weight,
            calibrated=self.calibrated,
            gain=gain,
            warp=left,
        )
        if self._refinement is not None:
            self._refinement.offer(aligned, maps or self._refinement.maps)
        return aligned

    @property
    def correction(self) -> tuple[float, ...] | None:
        """The online correction of the moment, 3x3 row by row in visible pixels; None without a refinement."""
        if self._refinement is None:
            return None
        return tuple(float(value) for value in self._refinement.matrix.ravel())

    def misfits(self, pair: FramePair) -> dict[Camera, str]:
        """The cameras of a pair whose frames are not of the size that was calibrated, each with what to do."""
        if self.rig is None:
            return {}
        sizes = ((pair.visible, self.rig.visible.size), (pair.infrared, self.rig.infrared.size))
        return {
            frame.camera: self._wrong_size(frame, size)
            for frame, size in sizes
            if frame is not None and frame.size != size
        }

    def report(self) -> dict[str, Any]:
        """The report's account of the registration: its state, and what the refinement did."""
        state = {"state": "calibrated" if self.calibrated else "uncalibrated"}
        refinement = self._refinement  # read once: the flow may begin a new one at any time
        refined = {} if refinement is None else refinement.report()
        return {**state, "refine": self._config.refine, "overlap": round(self.overlap, 3), **refined}

    def close(self) -> None:
        """Ends the refinement."""
        if self._refinement is not None:
            self._refinement.close()

    @property
    def _maps(self) -> Maps | None:
        """The maps of the moment; None: the picture is only resized."""
        refinement, warp = self._refinement, self._warp
        if refinement is None:
            return None if warp is None else warp.offline
        maps = refinement.maps
        return maps if self.calibrated or maps.parameters.any() else None

    def _follow_size(self, size: Size) -> None:
        """An uncalibrated camera may send any size, and another one later: the correction then starts anew."""
        changed = size != self._visible_size
        self._visible_size = size
        if changed and self.rig is None and self._config.refine:
            self.close()
            self._refinement, self._warp = None, None
            if comparable(size):
                self._warp = Warp.of_aligned(size, self._config.feather_px)
                self._refine(size)

    def _refine(self, size: Size) -> None:
        assert self._warp is not None
        self._refinement = Refinement(self._warp, size, self._config, self.calibrated, self._background)

    def _infrared(self, pair: FramePair, maps: Maps | None) -> tuple[np.ndarray | None, dict[str, Any]]:
        if pair.infrared is None:
            return None, {}
        picture, gain = self._gain(pair.infrared)  # 8 bits first: the warp of 16 bits costs twice as much
        if self.rig is None:
            picture = self._resized(picture)
        if maps is None:
            return picture, gain
        warped = maps.remap(picture)
        if pair.visible is None:
            warped[maps.weight == 0] = 0
        return warped, gain

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        present = (picture.shape[1], picture.shape[0])
        size = self._visible_size or present
        if size == present:
            return picture
        how = cv2.INTER_AREA if size[0] < present[0] else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(picture, size, interpolation=how))

    def _wrong_size(self, frame: Frame, expected: Size) -> str:
        assert self.rig is not None
        sizes = f"{_text(expected)}, but the {frame.camera} camera sends {_text(frame.size)}"
        other = self.rig.infrared if frame.camera == "visible" else self.rig.visible
        if frame.size == other.size:
            return (
                f"the calibration is for {sizes}, the other camera's size: are infrared and visible swapped? "
                f"If not, set that camera to {_text(expected)}, or calibrate again"
            )
        return (
            f"the calibration is for {sizes}: set that camera to {_text(expected)}, or calibrate at {_text(frame.size)}"
        )


def _sha256(path: str) -> str:
    """Of a file, or of all files of a folder."""
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
