"""A stand-in for the network where a test is about the pipeline: the per-pixel maximum, at a chosen speed."""

from __future__ import annotations

import threading
import time

import cv2
import numpy as np

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS, EngineDescription, PixelMap, Priors


class MaximumEngine:
    """Brighter of infrared and visible, per pixel. Its semantic prior is the mean of the visible picture."""

    def __init__(self, fuse_s: float = 0.0, fails_at: int | None = None, at_once: int = 1) -> None:
        self.description = EngineDescription(
            "openvino", "fp32", "nano", "a stand-in for a test", "0" * 64, at_once=at_once
        )
        self._fuse_s, self._fails_at = fuse_s, fails_at
        self.calls = 0
        self.estimates = 0
        self.closed = False

    def estimate_priors(self, infrared: np.ndarray, visible: np.ndarray) -> Priors:
        self.estimates += 1
        token = np.full((16, 8), visible.mean() / 255, np.float32)
        strength = np.float32(0)
        kinds = one_hot(INFRARED_DEGRADATIONS), one_hot(VISIBLE_DEGRADATIONS)
        return Priors(token, token, token, *kinds, strength, strength)

    def fuse(self, infrared: np.ndarray, visible: np.ndarray, priors: Priors) -> np.ndarray:
        self.calls += 1
        if self.calls == self._fails_at:
            raise RuntimeError("the runtime gave up")
        time.sleep(self._fuse_s)
        return np.maximum(infrared[..., None], visible)

    def prove(self, infrared: np.ndarray, visible: np.ndarray, priors: Priors, fused: np.ndarray) -> float | None:
        return None

    def close(self) -> None:
        self.closed = True


class CountingEngine(MaximumEngine):
    """One that knows how many frames it had at the same time, at `most`."""

    def __init__(self, fuse_s: float = 0.0, at_once: int = 1) -> None:
        super().__init__(fuse_s, at_once=at_once)
        self._lock = threading.Lock()
        self._now = self.most = 0

    def fuse(self, infrared: np.ndarray, visible: np.ndarray, priors: Priors) -> np.ndarray:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return super().fuse(infrared, visible, priors)
        finally:
            with self._lock:
                self._now -= 1


class RegisteringMaximumEngine(MaximumEngine):
    """One that also registers, as the GPU engines do."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(fails_at=fails_at)
        self.registered = 0

    def fuse_unregistered(
        self, infrared: np.ndarray, visible: np.ndarray, priors: Priors, pixel_map: PixelMap
    ) -> np.ndarray:
        self.registered += 1
        warped = cv2.remap(infrared, pixel_map.map_x, pixel_map.map_y, cv2.INTER_LINEAR)
        return self.fuse(warped, visible, priors)


def one_hot(kinds: tuple[str, ...]) -> np.ndarray:
    probabilities = np.zeros(len(kinds), np.float32)
    probabilities[0] = 1
    return probabilities
