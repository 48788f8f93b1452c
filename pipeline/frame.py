"""What travels through the pipeline: small frozen dataclasses that carry time and identity with the pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from calibration.warp import Maps

Camera = Literal["infrared", "visible"]
Mode = Literal["fused", "ir_only", "vis_only", "held"]
FROZEN_REPEATS = 2  # two repeats of a picture, three equal ones in a row, are a closed shutter or a camera that hangs
# Where a capture time comes from, best first. "synthetic" is the simulated rig's own hardware clock.
ClockSource = Literal["ptp", "rtcp_ntp", "driver", "arrival", "file", "synthetic"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One image from one camera."""

    camera: Camera
    image: np.ndarray  # visible: uint8 RGB (H, W, 3); infrared: uint8 (H, W), or uint16 counts (H, W)
    captured_ns: int  # live: time.monotonic_ns() scale; recordings: ns since the first frame
    index: int  # counts up by one per camera; a gap is a frame that the driver lost
    clock: ClockSource = "arrival"
    clock_error_ns: int = 0  # one sigma of captured_ns
    arrived_ns: int = 0  # time.monotonic_ns() when the frame was in our hands
    bits: int = 8  # significant bits of a sample: 8, 14 or 16
    suspect: bool = False  # decoded after a loss, before the next keyframe
    repeats: int = 0  # times in a row that this camera has sent the picture before; above 0 it shows an old moment
    still: int = 0  # behind a lossy codec: pictures in a row that show nothing new, also where they count as live

    def __post_init__(self) -> None:
        shape, kind = self.image.shape, self.image.dtype
        if self.camera == "visible":
            if kind != np.uint8 or self.image.ndim != 3 or shape[2] != 3:
                raise ValueError(f"a visible image is uint8 (H, W, 3), got {kind} {shape}")
        elif self.camera == "infrared":
            if kind not in (np.uint8, np.uint16) or self.image.ndim != 2:
                raise ValueError(f"an infrared image is uint8 or uint16 (H, W), got {kind} {shape}")
        else:
            raise ValueError(f"camera is 'infrared' or 'visible', got {self.camera!r}")
        if 0 in shape:
            raise ValueError(f"an image has at least one pixel, got {shape}")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.shape[1], self.image.shape[0]

    @property
    def frozen(self) -> bool:
        """Whether the camera's shutter is closed, or the camera hangs."""
        return self.repeats >= FROZEN_REPEATS


@dataclass(frozen=True, slots=True)
class FramePair:
    """What synchronisation decided belongs together. In a single mode the other frame is None."""

    infrared: Frame | None
    visible: Frame | None
    mode: Mode  # "held": the infrared frame was used before, or is older than its budget
    released_ns: int = 0  # time.monotonic_ns() when the pair was let go

    def __post_init__(self) -> None:
        if self.infrared is None and self.visible is None:
            raise ValueError("a pair has at least one frame")
        expected = {"ir_only": (True, False), "vis_only": (False, True)}.get(self.mode, (True, True))
        if (self.infrared is not None, self.visible is not None) != expected:
            raise ValueError(f"mode {self.mode!r} does not fit the frames that are present")

    @property
    def captured_ns(self) -> int:
        """The moment that the pair shows: the visible frame's, else the infrared frame's."""
        reference = self.visible or self.infrared
        assert reference is not None
        return reference.captured_ns

    @property
    def skew_ms(self) -> float | None:
        """Infrared minus visible capture time; None for a lone frame."""
        if self.infrared is None or self.visible is None:
            return None
        return (self.infrared.captured_ns - self.visible.captured_ns) / 1e6


@dataclass(frozen=True, slots=True)
class AlignedPair:
    """Both images on the visible camera's pixel grid, ready to be fused."""

    pair: FramePair
    infrared: np.ndarray | None  # uint8 (H, W), after gain control and warp; before the warp where there is a `warp`
    visible: np.ndarray | None  # uint8 RGB (H, W, 3)
    weight: np.ndarray | None  # float32 (H, W) in [0, 1]: 1 where infrared is valid, feathered; None = 1 everywhere
    calibrated: bool = False
    gain: dict[str, Any] = field(default_factory=dict)  # infrared gain control: method, low, high (counts)
    warp: Maps | None = None  # that `infrared` still needs: left to an engine that registers on its device

    def registered(self) -> np.ndarray | None:
        """The infrared picture on the visible pixels, uint8 (H, W); a `warp` is done anew at every call."""
        if self.infrared is None or self.warp is None:
            return self.infrared
        return self.warp.remap(self.infrared)


@dataclass(frozen=True, slots=True)
class FusedFrame:
    """One fused image with all that its consumers need to trust it."""

    image: np.ndarray  # uint8 RGB (H, W, 3)
    aligned: AlignedPair
    mode: Mode
    index: int  # counts up by one per fused frame
    latency_ms: dict[str, float] = field(default_factory=dict)  # by stage
    degradation: dict[str, dict[str, float]] = field(default_factory=dict)  # camera -> kind -> probability
    degradation_strength: dict[str, float] = field(default_factory=dict)  # camera -> 0 (just visible) to 1
    priors_age_frames: int = 0
