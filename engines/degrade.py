"""What spoils a picture, drawn with a seed: for training, and for showing that the network undoes it.

Kinds are named as in `engines.base`. Pictures are float32 in [0, 1], visible (H, W, 3) RGB and infrared (H, W); the
input is left as it was, and equal seeds give equal pixels. `strength` in [0, 1] goes through the range of a kind, 0
being just visible.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS

Picture = NDArray[np.float32]
Kind = Callable[[Picture, float, np.random.Generator], Picture]

VERY_DARK = 0.18  # mean; by day no place is as dark as that


def degrade_visible(picture: Picture, kind: str, seed: int | np.random.Generator, strength: float = 0.5) -> Picture:
    """A visible picture with the degradation `kind` of VISIBLE_DEGRADATIONS.

    Raises:
        ValueError: the kind is unknown, or the strength is outside [0, 1].
    """
    return _apply(_VISIBLE, picture, kind, seed, strength)


def degrade_infrared(picture: Picture, kind: str, seed: int | np.random.Generator, strength: float = 0.5) -> Picture:
    """An infrared picture with the degradation `kind` of INFRARED_DEGRADATIONS.

    Raises:
        ValueError: the kind is unknown, or the strength is outside [0, 1].
    """
    return _apply(_INFRARED, picture, kind, seed, strength)


def _apply(
    kinds: dict[str, Kind], picture: Picture, kind: str, seed: int | np.random.Generator, strength: float
) -> Picture:
    if kind not in kinds:
        raise ValueError(f"there is no degradation '{kind}': choose one of {', '.join(kinds)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of a degradation lies in [0, 1], not {strength}")
    spoiled = kinds[kind](picture, strength, np.random.default_rng(seed))
    return np.clip(spoiled, 0, 1).astype(np.float32)


def _within(strength: float, least: float, most: float) -> float:
    return least + strength * (most - least)


def _normal(shape: tuple[int, ...], random: np.random.Generator) -> Picture:
    return random.standard_normal(shape, dtype=np.float32)


def _smooth_field(shape: tuple[int, ...], random: np.random.Generator) -> Picture:
    """A smooth random field in [0, 1] of height and width as `shape`."""
    coarse = random.random((4, 4), dtype=np.float32)
    return np.clip(cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_CUBIC), 0, 1).astype(np.float32)


def _none(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    return picture.copy()


def _low_light(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Gamma 1.5 to 3, shot noise of the few photons left, and read noise; half of the cameras smooth some away.

    Never all of it, unless very little light is left: without any noise nothing tells a darkened picture from a dark
    place, which has to stay as it is.
    """
    dark = picture ** _within(strength, 1.5, 3.0)
    photons = _within(strength, 2000, 300)
    read = random.uniform(0.4, 1.0) * _within(strength, 0.02, 0.07)
    left = float(np.clip(random.uniform(-0.5 if dark.mean() < VERY_DARK else 0.3, 2), 0, 1))
    return dark + left * np.sqrt(dark / photons + read**2) * _normal(dark.shape, random)


def _over_exposure(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Bright parts clip: gain with a flattened shoulder, or a little gain and a veil of light, thicker in places."""
    if random.random() < 0.3:
        veil = (_within(strength, 0.1, 0.4) * (0.5 + _smooth_field(picture.shape, random)))[..., None]
        return np.asarray(1.15 * (picture * (1 - veil) + veil), np.float32)
    return (picture * _within(strength, 1.3, 2.4)) ** _within(strength, 0.95, 0.75)


def _blur(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Softness (Gaussian), defocus (a disc of the same spread), or motion along a line."""
    what, sigma_px = random.random(), _within(strength, 0.8, 2.8)
    if what < 0.5:
        return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma_px), dtype=np.float32)
    kernel = _disc(2 * sigma_px) if what < 0.7 else _line(int(_within(strength, 4, 13)), random.uniform(0, 180))
    return np.asarray(cv2.filter2D(picture, -1, kernel), np.float32)


def _disc(radius_px: float) -> Picture:
    """The blur circle of a lens out of focus, summing to one; its spread along x or y is half of its radius."""
    reach = int(np.ceil(radius_px))
    fine = 8  # samples of a pixel along x and y
    away = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = (np.hypot(away[:, None], away) <= radius_px).astype(np.float32)
    kernel = inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).sum((1, 3))
    return np.asarray(kernel / kernel.sum(), np.float32)


def _line(length: int, angle_deg: float) -> Picture:
    """A line through the middle of a square kernel, summing to one."""
    size = length | 1
    kernel = np.zeros((size, size), np.float32)
    reach = size // 2 * np.array([np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))])
    start, end = np.rint([size // 2 - reach, size // 2 + reach]).astype(int)
    cv2.line(kernel, start.tolist(), end.tolist(), 1.0)
    return np.asarray(kernel / kernel.sum(), dtype=np.float32)


def _noise(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    return picture + _within(strength, 0.015, 0.1) * _normal(picture.shape, random)


def _rain(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Bright streaks in one direction: single drops through a thin veil, or dense fine rain under a darker sky.

    On bright ground they are as bright as elsewhere, or fade, or anything between: that is up to the light behind them.
    """
    angle_deg = 90 + random.uniform(-45, 45)
    if random.random() < 0.5:
        layer = _drops(picture.shape[:2], strength, angle_deg, random)
        veil = _within(strength, 0.0, 0.1)
        picture = picture * (1 - veil) + 0.8 * veil
    else:
        layer = _drizzle(picture.shape[:2], strength, angle_deg, random)
        picture = picture * (1 - random.uniform(0, 0.12))
    faded = 1 - random.uniform(0, 1) * picture
    return np.asarray(picture + layer[..., None] * faded * 0.9, np.float32)


def _drops(shape: tuple[int, int], strength: float, angle_deg: float, random: np.random.Generator) -> Picture:
    """Streaks of single drops that are near."""
    drops = (random.random(shape, dtype=np.float32) < _within(strength, 0.001, 0.004)).astype(np.float32)
    length = int(random.integers(11, 30))
    streaks = cv2.filter2D(drops, -1, _line(length, angle_deg) * length)
    streaks = cv2.GaussianBlur(streaks, (0, 0), random.uniform(0.4, 1.0))
    return np.minimum(streaks * _within(strength, 0.25, 0.7), 1).astype(np.float32)


def _drizzle(shape: tuple[int, int], strength: float, angle_deg: float, random: np.random.Generator) -> Picture:
    """Many fine streaks of drops far away: noise drawn out along a line, of which the brighter part shows."""
    noise = cv2.GaussianBlur(_normal(shape, random), (0, 0), random.uniform(0.3, 1.3))
    drawn_out = cv2.filter2D(noise, -1, _line(int(random.integers(9, 45)), angle_deg))
    streaks = drawn_out / max(1e-6, float(drawn_out.std())) - random.uniform(-0.5, 1.2)
    # Most rain is faint: equal steps of strength are equal ratios of brightness.
    return np.clip(streaks * 0.015 * (0.2 / 0.015) ** strength, 0, 0.8).astype(np.float32)


def _haze(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Air light that thickens across the picture, mostly upwards, where the road is farther: no stretch undoes it."""
    air = random.uniform(0.7, 0.95)
    upwards = np.linspace(1, 0, picture.shape[0], dtype=np.float32)[:, None]
    rise = random.uniform(0, 1)
    depth = 0.6 + 0.8 * (rise * upwards + (1 - rise) * _smooth_field(picture.shape, random))
    kept = np.exp(-_within(strength, 0.25, 1.1) * depth)[..., None]
    return np.asarray(picture * kept + air * (1 - kept), dtype=np.float32)


def _compression(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Blocks and lost colour detail of JPEG at quality 40 down to 8."""
    return _jpeg(picture, round(_within(strength, 40, 8)))


def _jpeg(picture: Picture, quality: int) -> Picture:
    pixels = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    blue_first = np.ascontiguousarray(np.flip(pixels, 2)) if picture.ndim == 3 else pixels  # as OpenCV has it
    coded = cv2.imencode(".jpg", blue_first, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = np.asarray(cv2.imdecode(coded, cv2.IMREAD_UNCHANGED), np.float32) / np.float32(255)
    return np.flip(decoded, 2) if picture.ndim == 3 else decoded


def _dead_pixels(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Single detectors, and a few pairs, that are stuck cold or hot."""
    dead = random.random(picture.shape, dtype=np.float32) < _within(strength, 0.0005, 0.01)
    dead[:, 1:] |= dead[:, :-1] & (random.random((picture.shape[0], picture.shape[1] - 1)) < 0.2)
    stuck = (random.random(picture.shape) < 0.5).astype(np.float32)
    return np.asarray(np.where(dead, stuck, picture), np.float32)


def _banding(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Too few grey levels, as of a narrow temperature range that was stored in 8 bits: 32 levels down to 8."""
    levels = _within(strength, 32, 8)
    phase = random.random()
    return np.asarray((np.floor(picture * levels + phase) + 0.5 - phase) / levels, np.float32)


def _low_contrast(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Squeezed about its mean, more in some places than in others; or washed out by a curve that lifts the cold parts.

    The curve is what a camera's own gain does with one very cold thing in view: all the rest ends up bright and flat.
    """
    if random.random() < 0.4:
        kept = _within(strength, 0.6, 0.25) * (0.85 + 0.3 * _smooth_field(picture.shape, random))
        mean = float(picture.mean())
        return np.asarray((picture - mean) * kept + mean + random.uniform(-0.05, 0.25), np.float32)
    curve = _within(strength, 0.6, 0.2) * (0.9 + 0.2 * _smooth_field(picture.shape, random))
    foot = random.uniform(0.005, 0.05)  # without it, the curve would show the steps of 8-bit black
    lifted = ((np.clip(picture, 0, 1) + foot) / (1 + foot)) ** curve
    return np.asarray(random.uniform(0.6, 1.0) * lifted, np.float32)


def _stripes(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """Offsets of columns (seldom rows), as of an uncalibrated microbolometer, with some noise."""
    sigma = _within(strength, 0.015, 0.07)
    across_rows = random.random() < 0.15
    offsets = sigma * _normal((picture.shape[0] if across_rows else picture.shape[1],), random)
    noise = random.uniform(0, 0.8) * sigma * _normal(picture.shape, random)
    return picture + (offsets[:, None] if across_rows else offsets[None]) + noise


def _camera(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """What every camera adds: a little sharpening, a little noise."""
    soft = cv2.GaussianBlur(picture, (0, 0), random.uniform(0.6, 1.5))
    picture = picture + random.uniform(0, 0.6) * strength * (picture - soft)
    return picture + random.uniform(0, 0.015) * strength * _normal(picture.shape, random)


def _coded(picture: Picture, strength: float, random: np.random.Generator) -> Picture:
    """What the way from camera to computer takes: JPEG at quality 97 down to 75, colour at half the resolution."""
    return _jpeg(picture, round(_within(strength, 97, 75)))


# No degradations to be named: what is there in most pictures, and not wanted in a fused one.
CAMERA, CODED = "camera", "coded"
_VISIBLE: dict[str, Kind] = dict(
    zip(
        (*VISIBLE_DEGRADATIONS, CAMERA, CODED),
        (_none, _low_light, _over_exposure, _blur, _noise, _rain, _haze, _compression, _camera, _coded),
        strict=True,
    )
)
_INFRARED: dict[str, Kind] = dict(
    zip(
        (*INFRARED_DEGRADATIONS, CAMERA, CODED),
        (_none, _low_contrast, _noise, _stripes, _blur, _dead_pixels, _banding, _camera, _coded),
        strict=True,
    )
)
