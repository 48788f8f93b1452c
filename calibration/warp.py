"""The one map that brings infrared onto the visible pixels, with and without an online correction.

Lens, pose and reference plane are worked out once, on a grid somewhat larger than the picture. A correction only moves
that grid by a few pixels, so a corrected map is one interpolation away: about 5 ms instead of 100.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np

from calibration.residual import similarity
from calibration.rig import CalibrationError, CameraModel, Rig, feathered, infrared_map

MARGIN_SHARE = 0.06  # of the width: more than the widest correction moves a corner


@dataclass(frozen=True, eq=False)
class Maps:
    """Ready for `cv2.remap`. Never changed once made: a correction comes as new maps, taken over as a whole."""

    map_x: np.ndarray  # float32 (H, W), clamped to the infrared picture: outside it, its border is repeated
    map_y: np.ndarray
    weight: np.ndarray  # float32 (H, W) in [0, 1]: 0 where infrared sees nothing, feathered
    parameters: np.ndarray  # (4,) of the correction, see calibration.residual; 0 is the offline calibration

    def remap(self, infrared: np.ndarray) -> np.ndarray:
        """The infrared picture on the visible pixels."""
        # With clamped coordinates the border's colour is never used, and a constant one is by far the fastest:
        # 0.55 ms at 640x480, against 0.65 for a repeated border, 2.3 times as much for larger pictures, and 0.75 to
        # 0.9 for fixed-point maps.
        return cv2.remap(infrared, self.map_x, self.map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


class Warp:
    """Makes the maps of one rig.

    Args:
        rig: the calibration.
        feather_px: width of the fall-off at the edge of what infrared sees.

    Raises:
        CalibrationError: the two pictures have nothing in common.
    """

    def __init__(self, rig: Rig, feather_px: float) -> None:
        self._rig = rig
        self._feather_px = feather_px
        self._margin = round(MARGIN_SHARE * rig.visible.width)
        map_x, map_y, weight = infrared_map(rig, feather_px)
        if not weight.any():
            raise CalibrationError(
                "with this calibration infrared sees nothing of the visible picture: it is damaged, or of another rig: "
                "calibrate the rig again"
            )
        self.offline = self._finished(map_x, map_y, weight, np.zeros(4))

    @classmethod
    def of_aligned(cls, size: tuple[int, int], feather_px: float) -> Warp:
        """For infrared pictures that are taken to lie on the visible pixels already."""
        matrix = np.array([[size[0], 0, size[0] / 2], [0, size[0], size[1] / 2], [0, 0, 1]], dtype=np.float64)
        camera = CameraModel(*size, matrix)
        return cls(Rig(camera, camera, np.eye(4), homography=np.eye(3)), feather_px)

    def corrected(self, parameters: np.ndarray) -> Maps:
        """The maps with a correction: (x, y, roll, log scale) that take the offline picture to the visible one."""
        if not np.any(parameters):
            return self.offline
        width, height = self._rig.visible.size
        map_x, map_y, inside = self._base
        back = np.linalg.inv(similarity(parameters, (width, height)))
        back[:2, 2] += self._margin

        def moved(plane: np.ndarray, how: int) -> np.ndarray:
            flags = how | cv2.WARP_INVERSE_MAP
            return cv2.warpAffine(plane, back[:2], (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)

        map_x, map_y = moved(map_x, cv2.INTER_LINEAR), moved(map_y, cv2.INTER_LINEAR)
        columns, rows = self._rig.infrared.size
        valid = moved(inside, cv2.INTER_NEAREST).astype(bool)
        valid &= (map_x >= 0) & (map_x <= columns - 1) & (map_y >= 0) & (map_y <= rows - 1)
        return self._finished(map_x, map_y, feathered(valid, self._feather_px), parameters)

    def _finished(self, map_x: np.ndarray, map_y: np.ndarray, weight: np.ndarray, parameters: np.ndarray) -> Maps:
        columns, rows = self._rig.infrared.size
        maps = Maps(np.clip(map_x, 0, columns - 1), np.clip(map_y, 0, rows - 1), weight, np.array(parameters, float))
        for part in (maps.map_x, maps.map_y, maps.weight, maps.parameters):
            part.flags.writeable = False
        return maps

    @cached_property
    def _base(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The offline map on a grid that is larger by the margin on each side, and where the lens models hold."""
        visible, margin = self._rig.visible, self._margin
        matrix = visible.matrix.copy()
        matrix[:2, 2] += margin
        larger = replace(visible, width=visible.width + 2 * margin, height=visible.height + 2 * margin, matrix=matrix)
        homography = self._rig.homography
        if homography is not None:
            homography = np.array([[1, 0, margin], [0, 1, margin], [0, 0, 1]]) @ homography
        map_x, map_y, weight = infrared_map(replace(self._rig, visible=larger, homography=homography), feather_px=0)
        # Beyond the picture's edge the map goes on, and moves with the correction: that is no end of the lens model.
        columns, rows = self._rig.infrared.size
        beyond = (map_x < 0) | (map_x > columns - 1) | (map_y < 0) | (map_y > rows - 1)
        return map_x, map_y, ((weight > 0) | beyond).astype(np.uint8)
