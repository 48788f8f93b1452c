"""The six seeded degradations that every method is judged on; fixed, because scores are compared across years.

Training draws its own, wider degradations elsewhere. Exactly one picture of a pair is degraded. The functions work on
pictures in [0, 1], infrared (H, W) or visible RGB (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Unit = NDArray[np.float64]  # 0..1


def degrade(name: str, infrared: Image, visible: Image, seed: int) -> tuple[Image, Image]:
    """The pair with the degradation `name` of `DEGRADATIONS`; "clean" gives it back. Equal seeds, equal pixels.

    Raises:
        KeyError: if there is no degradation of that name.
    """
    if name == "clean":
        return infrared, visible
    modality, apply = DEGRADATIONS[name]
    random = np.random.default_rng(seed)
    if modality == "infrared":
        return _to_bytes(apply(infrared / 255.0, random)), visible
    return infrared, _to_bytes(apply(visible / 255.0, random))


def low_light(image: Unit, random: np.random.Generator) -> Unit:
    """Gamma 2.5, then sensor noise of sigma 15/255."""
    return image**2.5 + random.normal(0, 15 / 255, image.shape)


def blur(image: Unit, random: np.random.Generator) -> Unit:
    """Gaussian of sigma 2 pixels."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 2), dtype=np.float64)


def haze(image: Unit, random: np.random.Generator) -> Unit:
    """Uniform: transmission 0.5, air light 0.9."""
    return 0.5 * image + 0.5 * 0.9


def rain(image: Unit, random: np.random.Generator) -> Unit:
    """Bright streaks, 21 pixels long and 15 degrees off the vertical, from 0.25 % of the pixels.

    Their brightness is set so that the per-pixel maximum scores as in the published comparison.
    """
    length, lean = 21, np.deg2rad(15)
    streak = np.zeros((length, length))
    middle = length // 2
    reach = middle * np.array([np.sin(lean), np.cos(lean)])
    start, end = np.rint([middle - reach, middle + reach]).astype(int)
    cv2.line(streak, start.tolist(), end.tolist(), 1.0)
    seeds = (random.random(image.shape[:2]) < 0.0025).astype(np.float64)
    streaks = np.clip(cv2.filter2D(seeds, cv2.CV_64F, streak, borderType=cv2.BORDER_CONSTANT), 0, 1)
    return image + 0.28 * cv2.GaussianBlur(streaks, (0, 0), 0.7)[..., None]


def low_contrast(image: Unit, random: np.random.Generator) -> Unit:
    """Contrast times 0.3 about the mean."""
    return image.mean() + 0.3 * (image - image.mean())


def stripes(image: Unit, random: np.random.Generator) -> Unit:
    """A fixed offset for each column, sigma 12/255, and noise of sigma 10/255."""
    return image + random.normal(0, 12 / 255, (1, image.shape[1])) + random.normal(0, 10 / 255, image.shape)


DEGRADATIONS: dict[str, tuple[str, Callable[[Unit, np.random.Generator], Unit]]] = {
    "vis_lowlight": ("visible", low_light),
    "vis_blur": ("visible", blur),
    "ir_lowcon": ("infrared", low_contrast),
    "ir_stripe": ("infrared", stripes),
    "vis_haze": ("visible", haze),
    "vis_rain": ("visible", rain),
}


def _to_bytes(image: Unit) -> Image:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
