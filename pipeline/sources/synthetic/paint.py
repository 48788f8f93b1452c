"""The painter's box: every surface of the street as two pictures, its colour and its warmth.

A `Texture` carries both, so that one drawing call gives the visible and the infrared look of the same shape, and the
two cameras cannot disagree about where a thing is. Lengths are metres; heat is in counts of a 14-bit thermal core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

Colour = tuple[int, int, int]

COLDEST_COUNTS = 6900.0  # what heat code 0 stands for
COUNTS_PER_CODE = 10.0  # codes are uint8, so the street spans 6900 to 9450 counts
SUPERSAMPLING = 2
_FRACTION_BITS = 4  # of coordinates given to OpenCV
BLACK: Colour = (0, 0, 0)


@dataclass(frozen=True)
class Texture:
    """One flat thing. Colour, glow and heat are premultiplied by alpha, so that they can be resampled together."""

    colour: np.ndarray  # uint8 RGB (H, W, 3), in full daylight
    glow: np.ndarray  # uint8 RGB (H, W, 3), light that it gives off by itself
    heat: np.ndarray  # float32 (H, W), counts
    alpha: np.ndarray  # float32 (H, W) in [0, 1]
    pixels_per_m: float

    @property
    def width_m(self) -> float:
        return self.alpha.shape[1] / self.pixels_per_m

    @property
    def height_m(self) -> float:
        return self.alpha.shape[0] / self.pixels_per_m

    @cached_property
    def visible(self) -> np.ndarray:
        """Colour and alpha as uint8 (H, W, 4): one resampling gives both."""
        alpha = np.rint(self.alpha * 255).astype(np.uint8)
        return np.ascontiguousarray(np.dstack((self.colour, alpha)))

    @cached_property
    def thermal(self) -> np.ndarray:
        """Heat and alpha as float32 (H, W, 2)."""
        return np.ascontiguousarray(np.dstack((self.heat, self.alpha)))

    @cached_property
    def shines(self) -> bool:
        """Whether any of it gives off light."""
        return bool(self.glow.any())

    def halved(self) -> Texture:
        """The same thing with half the pixels, averaged."""

        def halve(layer: np.ndarray) -> np.ndarray:
            # Odd sizes are padded: squeezing 211 rows into 105 would make a person 0.5 % taller from afar.
            height, width = layer.shape[:2]
            even = cv2.copyMakeBorder(layer, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
            return cv2.resize(even, ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA)

        return self._made_by(halve, self.pixels_per_m / 2)

    def mirrored(self) -> Texture:
        """The same thing seen the other way round."""
        return self._made_by(lambda layer: np.ascontiguousarray(layer[:, ::-1]), self.pixels_per_m)

    def _made_by(self, change: Callable[[np.ndarray], np.ndarray], pixels_per_m: float) -> Texture:
        return Texture(change(self.colour), change(self.glow), change(self.heat), change(self.alpha), pixels_per_m)


def code(counts: float) -> int:
    """The heat code of a temperature in counts."""
    return int(np.clip(round((counts - COLDEST_COUNTS) / COUNTS_PER_CODE), 0, 255))


class Canvas:
    """Draws one Texture. Origin at the bottom left, x right, y up, metres."""

    def __init__(self, width_m: float, height_m: float, pixels_per_m: float) -> None:
        self._scale = pixels_per_m * SUPERSAMPLING
        self._pixels_per_m = pixels_per_m
        self._size = max(1, round(width_m * pixels_per_m)), max(1, round(height_m * pixels_per_m))
        width, height = self._size[0] * SUPERSAMPLING, self._size[1] * SUPERSAMPLING
        self.colour: np.ndarray = np.zeros((height, width, 3), np.uint8)
        self.glow = np.zeros((height, width, 3), np.uint8)
        self.heat: np.ndarray = np.zeros((height, width), np.uint8)
        self.alpha = np.zeros((height, width), np.uint8)

    def rectangle(
        self, x: float, y: float, width: float, height: float, colour: Colour, counts: float, glow: Colour = BLACK
    ) -> None:
        self.polygon([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], colour, counts, glow)

    def polygon(
        self, corners: Sequence[tuple[float, float]], colour: Colour, counts: float, glow: Colour = BLACK
    ) -> None:
        points = [np.array([self._pixel(x, y) for x, y in corners], np.int32)]
        for layer, value in self._values(colour, counts, glow):
            cv2.fillPoly(layer, points, value, lineType=cv2.LINE_8, shift=_FRACTION_BITS)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        width: float,
        colour: Colour,
        counts: float,
        glow: Colour = BLACK,
    ) -> None:
        """A stroke with round ends."""
        pixels = [np.array([self._pixel(x, y) for x, y in points], np.int32)]
        thickness = max(1, round(width * self._scale))
        for layer, value in self._values(colour, counts, glow):
            cv2.polylines(layer, pixels, False, value, thickness, lineType=cv2.LINE_8, shift=_FRACTION_BITS)

    def ellipse(
        self,
        x: float,
        y: float,
        radius_x: float,
        radius_y: float,
        colour: Colour,
        counts: float,
        glow: Colour = BLACK,
    ) -> None:
        axes = self._fraction(max(1, radius_x * self._scale)), self._fraction(max(1, radius_y * self._scale))
        for layer, value in self._values(colour, counts, glow):
            cv2.ellipse(layer, self._pixel(x, y), axes, 0, 0, 360, value, -1, lineType=cv2.LINE_8, shift=_FRACTION_BITS)

    def text(self, x: float, y: float, height: float, words: str, colour: Colour, glow: Colour = BLACK) -> None:
        """Paint has the temperature of what it is painted on: text changes the colour only."""
        size = height * self._scale / 22  # the font's capitals are 22 pixels high at scale 1
        thickness = max(1, round(size * 2.4))
        corner = round(x * self._scale), round(self.alpha.shape[0] - y * self._scale)
        for layer, value in ((self.colour, colour), (self.glow, glow)):
            if layer is self.colour or any(glow):
                cv2.putText(layer, words, corner, cv2.FONT_HERSHEY_SIMPLEX, size, value, thickness, cv2.LINE_AA)

    def grain(self, seed: int, colour_sigma: float, heat_sigma_counts: float, cell_m: float = 0.05) -> None:
        """Roughens what has been painted so far: fine grain and soft blotches."""
        random = np.random.default_rng(seed)
        height, width = self.alpha.shape
        fine = _blotches(random, height, width, max(1.0, cell_m * self._scale))
        soft = _blotches(random, height, width, max(1.0, 1.2 * self._scale))
        bare = self.alpha == 0
        change = (fine * 0.7 + soft * 0.5) * colour_sigma
        change[bare] = 0
        self.colour = _added(self.colour, cv2.merge([change] * 3))
        warmth = (soft + 0.3 * fine) * (heat_sigma_counts / COUNTS_PER_CODE)
        warmth[bare] = 0
        self.heat = _added(self.heat, warmth)

    def shade(self, top: float, bottom: float) -> None:
        """Multiplies the colour from top to bottom, as light from the sky does."""
        ramp = np.linspace(top, bottom, self.colour.shape[0], dtype=np.float32)[:, None]
        ramp = np.ascontiguousarray(np.broadcast_to(ramp, self.alpha.shape))
        self.colour = cv2.multiply(self.colour, cv2.merge([ramp] * 3), dtype=cv2.CV_8U)

    def texture(self, heat_blur_m: float = 0.02) -> Texture:
        """What has been painted. Heat spreads in the material, so it is softer than colour."""
        alpha = self.alpha.astype(np.float32) / 255
        heat = (COLDEST_COUNTS + COUNTS_PER_CODE * self.heat.astype(np.float32)) * alpha
        sigma = heat_blur_m * self._scale
        if sigma > 0.3:
            spread = cv2.GaussianBlur(alpha, (0, 0), sigma)
            heat = cv2.GaussianBlur(heat, (0, 0), sigma) / np.maximum(spread, 1e-3) * alpha

        def small(layer: np.ndarray) -> np.ndarray:
            return cv2.resize(layer, self._size, interpolation=cv2.INTER_AREA)

        return Texture(small(self.colour), small(self.glow), small(heat), small(alpha), self._pixels_per_m)

    def _pixel(self, x: float, y: float) -> tuple[int, int]:
        """A place for OpenCV, whose pixel centres are whole numbers and whose fractions are integers."""
        return self._fraction(x * self._scale - 0.5), self._fraction(self.alpha.shape[0] - y * self._scale - 0.5)

    @staticmethod
    def _fraction(pixels: float) -> int:
        return round(pixels * (1 << _FRACTION_BITS))

    def _values(self, colour: Colour, counts: float, glow: Colour) -> tuple[tuple[np.ndarray, tuple[int, ...]], ...]:
        return (self.colour, colour), (self.glow, glow), (self.heat, (code(counts),)), (self.alpha, (255,))


def _added(layer: np.ndarray, change: np.ndarray) -> np.ndarray:
    """A uint8 layer plus float32 changes, saturating."""
    return cv2.add(layer, change, dtype=cv2.CV_8U)


def _blotches(random: np.random.Generator, height: int, width: int, cell_px: float) -> np.ndarray:
    """Smooth noise of unit spread with cells of about `cell_px`, float32 (height, width)."""
    shape = max(2, int(height / cell_px) + 2), max(2, int(width / cell_px) + 2)
    small = random.standard_normal(shape, dtype=np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class Person:
    """How one passer-by looks."""

    coat: Colour
    trousers: Colour
    skin: Colour = (214, 170, 140)
    hair: Colour = (52, 38, 30)
    bag: Colour | None = None
    height_m: float = 1.76


PERSON_PHASES = 8  # pictures of one step cycle
PERSON_CANVAS_M = (1.16, 1.92)


def paint_person(person: Person, phase: int, sideways: bool, base_counts: float) -> Texture:
    """One picture of the step cycle. Skin is warmest, clothes hide some of it, shoes are nearly as cool as the road."""
    canvas = Canvas(*PERSON_CANVAS_M, pixels_per_m=110)
    size = person.height_m / 1.76
    middle = PERSON_CANVAS_M[0] / 2
    swing = np.sin(2 * np.pi * phase / PERSON_PHASES)
    lift = 0.02 * abs(np.cos(2 * np.pi * phase / PERSON_PHASES))
    reach = 0.30 if sideways else 0.05
    spread = 0.03 if sideways else 0.11
    hip, shoulder, neck = (0.92 * size + lift, 1.42 * size + lift, 1.50 * size + lift)
    dark_coat = _darker(person.coat, 0.78)

    def leg(side: int, step: float, colour: Colour) -> None:
        foot = middle + side * spread + reach * step
        knee = middle + side * spread + reach * 0.55 * step + (0.07 * max(0.0, step) if sideways else 0.0)
        raised = 0.07 * max(0.0, -step) if sideways else 0.05 * max(0.0, step)
        canvas.line([(middle + side * spread * 0.7, hip), (knee, 0.5 * size)], 0.155, colour, base_counts + 620)
        canvas.line([(knee, 0.5 * size), (foot, 0.10 + raised)], 0.115, colour, base_counts + 560)
        toe = 0.10 if sideways else 0.0
        canvas.line([(foot, 0.045 + raised), (foot + toe, 0.04 + raised)], 0.085, (35, 30, 28), base_counts + 280)

    def arm(side: int, step: float, colour: Colour) -> None:
        top = (middle + side * (0.04 if sideways else 0.21), shoulder - 0.05)
        elbow = (top[0] + reach * 0.5 * step + (0 if sideways else side * 0.04), 1.13 * size + lift)
        hand = (elbow[0] + reach * 0.35 * step + (0.04 if sideways else 0.0), 0.88 * size + lift)
        canvas.line([top, elbow, hand], 0.095, colour, base_counts + 600)
        canvas.ellipse(*hand, 0.048, 0.055, person.skin, base_counts + 850)

    leg(-1, -swing, _darker(person.trousers, 0.75))
    arm(-1, swing, dark_coat)
    if not sideways:
        arm(1, -swing, dark_coat)
    leg(1, swing, person.trousers)
    half = 0.15 if sideways else 0.215
    torso = [
        (middle - half * 0.85, hip - 0.10),
        (middle + half * 0.85, hip - 0.10),
        (middle + half, shoulder - 0.10),
        (middle + half * 0.6, shoulder + 0.03),
        (middle - half * 0.6, shoulder + 0.03),
        (middle - half, shoulder - 0.10),
    ]
    canvas.polygon(torso, person.coat, base_counts + 660)
    canvas.ellipse(middle, 1.22 * size + lift, half * 0.55, 0.16, person.coat, base_counts + 730)
    canvas.line([(middle, hip - 0.08), (middle, shoulder - 0.03)], 0.018, dark_coat, base_counts + 700)
    if person.bag:
        canvas.rectangle(middle - half - 0.10, hip - 0.02, 0.17, 0.42, person.bag, base_counts + 150)
    if sideways:
        arm(1, -swing, dark_coat)
    canvas.line([(middle, shoulder), (middle, neck + 0.06)], 0.11, person.skin, base_counts + 880)
    head_y = 1.64 * size + lift
    canvas.ellipse(middle, head_y, 0.098, 0.125, person.hair, base_counts + 700)
    canvas.ellipse(middle + (0.028 if sideways else 0), head_y - 0.022, 0.078, 0.100, person.skin, base_counts + 900)
    canvas.shade(1.05, 0.88)
    return canvas.texture()


def paint_car_end(paint: Colour, rear: bool, base_counts: float) -> Texture:
    """A car from the front (headlights, warm bonnet and radiator) or the rear (tail lights, warm exhaust)."""
    canvas = Canvas(1.9, 1.55, pixels_per_m=110)
    dark = _darker(paint, 0.6)
    for x in (0.08, 1.60):
        canvas.rectangle(x, 0.0, 0.22, 0.40, (22, 22, 24), base_counts + 430)
    canvas.polygon([(0.04, 0.22), (1.86, 0.22), (1.88, 0.86), (1.74, 0.98), (0.16, 0.98), (0.02, 0.86)], paint,
                   base_counts - 60 if rear else base_counts + 240)  # fmt: skip
    canvas.polygon([(0.18, 0.95), (1.72, 0.95), (1.48, 1.46), (0.42, 1.46)], dark, base_counts - 90)
    canvas.polygon([(0.27, 0.98), (1.63, 0.98), (1.42, 1.40), (0.48, 1.40)], (52, 66, 80), base_counts - 190)
    canvas.polygon([(0.40, 1.05), (0.78, 1.05), (0.72, 1.38), (0.52, 1.38)], (112, 130, 146), base_counts - 190)
    canvas.rectangle(0.05, 0.20, 1.80, 0.15, dark, base_counts - 40)
    canvas.rectangle(0.66, 0.40, 0.58, 0.13, (236, 236, 224), base_counts - 70)
    canvas.text(0.70, 0.425, 0.085, "DF 2026", (25, 25, 60))
    if rear:
        for x in (0.09, 1.49):
            canvas.rectangle(x, 0.66, 0.32, 0.17, (170, 20, 22), base_counts + 60, glow=(200, 18, 14))
        canvas.ellipse(1.42, 0.20, 0.05, 0.04, (60, 60, 60), base_counts + 1250)
        canvas.line([(0.3, 0.90), (1.6, 0.90)], 0.02, dark, base_counts - 60)
    else:
        canvas.rectangle(0.52, 0.56, 0.86, 0.20, (28, 28, 30), base_counts + 620)
        for x in (0.12, 1.42):
            canvas.rectangle(x, 0.60, 0.36, 0.18, (232, 236, 240), base_counts + 260, glow=(255, 250, 232))
    return canvas.texture()


CAR_LENGTH_M = 4.3
CAR_WIDTH_M = 1.9


def paint_car_side(paint: Colour, base_counts: float) -> Texture:
    """A car from the side, its front to the left."""
    canvas = Canvas(CAR_LENGTH_M, 1.55, pixels_per_m=100)
    dark = _darker(paint, 0.55)
    body = [(0.03, 0.25), (4.27, 0.25), (4.28, 0.80), (4.10, 0.98), (1.35, 0.98), (0.20, 0.84), (0.02, 0.62)]
    canvas.polygon(body, paint, base_counts - 60)
    canvas.polygon([(0.10, 0.40), (1.25, 0.45), (1.25, 0.93), (0.22, 0.80)], paint, base_counts + 300)
    canvas.polygon([(1.20, 0.95), (1.85, 1.46), (3.35, 1.46), (4.05, 0.95)], dark, base_counts - 90)
    canvas.polygon([(1.42, 0.98), (1.92, 1.39), (2.50, 1.39), (2.50, 0.98)], (58, 74, 88), base_counts - 180)
    canvas.polygon([(2.60, 0.98), (2.60, 1.39), (3.28, 1.39), (3.82, 0.98)], (58, 74, 88), base_counts - 180)
    canvas.line([(0.25, 0.72), (4.20, 0.76)], 0.02, dark, base_counts - 60)
    canvas.line([(2.55, 0.30), (2.55, 0.98)], 0.02, dark, base_counts - 60)
    canvas.rectangle(2.72, 0.80, 0.20, 0.04, dark, base_counts - 60)
    for x in (0.85, 3.42):
        canvas.ellipse(x, 0.33, 0.34, 0.33, (20, 20, 22), base_counts + 460)
        canvas.ellipse(x, 0.33, 0.19, 0.19, (150, 152, 156), base_counts + 640)
    canvas.rectangle(0.04, 0.62, 0.22, 0.14, (232, 236, 240), base_counts + 150, glow=(220, 214, 190))
    canvas.rectangle(4.10, 0.66, 0.17, 0.14, (170, 20, 22), base_counts, glow=(170, 16, 12))
    return canvas.texture()


def paint_facade(
    width_m: float, height_m: float, wall: Colour, shop: str, bricks: bool, seed: int, base_counts: float, detail: float
) -> Texture:
    """A house front: shop below, rows of windows above; some rooms are lit and heated."""
    random = np.random.default_rng(seed)
    canvas = Canvas(width_m, height_m, pixels_per_m=detail)
    warmth = base_counts + float(random.uniform(-60, 60))
    canvas.rectangle(0, 0, width_m, height_m, wall, warmth)
    if bricks:
        _paint_bricks(canvas, width_m, height_m, wall, warmth)
    canvas.grain(seed, 9, 14)
    trim = _mix(wall, (232, 226, 214), 0.55)
    canvas.rectangle(0, height_m - 0.45, width_m, 0.45, trim, warmth - 40)
    canvas.rectangle(0, height_m - 0.55, width_m, 0.10, _darker(wall, 0.5), warmth - 20)
    canvas.rectangle(0, 3.55, width_m, 0.25, trim, warmth + 20)
    _paint_windows(canvas, random, width_m, height_m, trim, warmth)
    _paint_shop(canvas, random, width_m, wall, shop, warmth)
    canvas.shade(1.06, 0.86)
    return canvas.texture(heat_blur_m=0.04)


def _paint_bricks(canvas: Canvas, width_m: float, height_m: float, wall: Colour, warmth: float) -> None:
    mortar = _mix(wall, (196, 184, 170), 0.35)
    for row, y in enumerate(np.arange(0.0, height_m, 0.30)):
        canvas.line([(0, y), (width_m, y)], 0.025, mortar, warmth)
        for x in np.arange(0.35 * (row % 2), width_m, 0.70):
            canvas.line([(x, y), (x, y + 0.30)], 0.025, mortar, warmth)


def _paint_windows(
    canvas: Canvas, random: np.random.Generator, width_m: float, height_m: float, trim: Colour, warmth: float
) -> None:
    count = max(1, int((width_m - 0.8) / 2.3))
    start = (width_m - count * 2.3) / 2 + 0.55
    for floor_y in np.arange(4.6, height_m - 2.2, 3.1):
        for column in range(count):
            x = start + column * 2.3
            lit, curtain = random.random() < 0.30, random.random() < 0.35
            canvas.rectangle(x - 0.13, floor_y - 0.16, 1.46, 1.98, trim, warmth + 45)
            glass = (74, 90, 108)
            glow: Colour = (214, 164, 92) if lit else BLACK
            canvas.rectangle(x, floor_y, 1.2, 1.7, glass, warmth - (60 if lit else 170), glow=glow)
            if not lit:
                canvas.polygon(
                    [(x + 0.1, floor_y + 0.7), (x + 0.9, floor_y + 1.65), (x + 0.4, floor_y + 1.65)],
                    (128, 150, 168), warmth - 175,
                )  # fmt: skip
            if curtain:
                tone: Colour = (150, 108, 60) if lit else BLACK
                canvas.rectangle(x, floor_y, 0.36, 1.7, (196, 188, 172), warmth - 120, glow=tone)
            canvas.line([(x + 0.6, floor_y), (x + 0.6, floor_y + 1.7)], 0.07, trim, warmth - 20)
            canvas.line([(x, floor_y + 1.05), (x + 1.2, floor_y + 1.05)], 0.06, trim, warmth - 20)
            canvas.rectangle(x - 0.2, floor_y - 0.24, 1.6, 0.12, trim, warmth + 70)


def _paint_shop(
    canvas: Canvas, random: np.random.Generator, width_m: float, wall: Colour, shop: str, warmth: float
) -> None:
    lit = random.random() < 0.55
    board: Colour = tuple(int(v) for v in random.choice([(28, 62, 44), (120, 24, 30), (24, 40, 92), (60, 46, 36)]))  # type: ignore[assignment]
    canvas.rectangle(0.5, 0.0, width_m - 1.0, 3.4, _mix(board, (30, 30, 30), 0.3), warmth - 30)
    letters = (236, 206, 120) if lit else BLACK
    canvas.rectangle(0.5, 2.75, width_m - 1.0, 0.65, board, warmth - 10)
    canvas.text(width_m / 2 - 0.19 * len(shop), 2.90, 0.36, shop, (244, 232, 196), glow=letters)
    pane = (width_m - 2.8) / 2
    for x in (0.8, width_m - 0.8 - pane):
        glow: Colour = (150, 116, 72) if lit else BLACK
        canvas.rectangle(x, 0.55, pane, 2.05, (88, 100, 108), warmth - (40 if lit else 130), glow=glow)
        for thing in np.arange(x + 0.2, x + pane - 0.3, 0.55):
            tall = float(random.uniform(0.4, 1.2))
            tone = tuple(int(v) for v in random.integers(70, 220, 3))
            shine: Colour = tuple(int(v * 0.5) for v in tone) if lit else BLACK  # type: ignore[assignment]
            canvas.rectangle(thing, 0.55, 0.34, tall, tone, warmth - 60, glow=shine)  # type: ignore[arg-type]
    canvas.rectangle(width_m / 2 - 0.5, 0.1, 1.0, 2.4, _darker(wall, 0.45), warmth + 60)


def paint_wall(width_m: float, height_m: float, wall: Colour, seed: int, base_counts: float, detail: float) -> Texture:
    """The blind side of a house."""
    canvas = Canvas(width_m, height_m, pixels_per_m=detail)
    canvas.rectangle(0, 0, width_m, height_m, _darker(wall, 0.82), base_counts)
    canvas.grain(seed, 8, 16)
    canvas.rectangle(0, height_m - 0.35, width_m, 0.35, _darker(wall, 0.5), base_counts - 40)
    return canvas.texture()


def paint_tree(seed: int, base_counts: float) -> Texture:
    """A round street tree, 5.5 m wide and 7 m high."""
    random = np.random.default_rng(seed)
    canvas = Canvas(5.6, 7.0, pixels_per_m=44)
    trunk: Colour = (78, 60, 46)
    canvas.line([(2.8, 0.0), (2.75, 3.0)], 0.30, trunk, base_counts + 25)
    for end in ((1.5, 4.6), (2.4, 5.2), (3.6, 4.9), (4.2, 4.3)):
        canvas.line([(2.76, 2.6), end], 0.13, trunk, base_counts + 15)
    for index in range(420):
        angle, distance = random.uniform(0, 2 * np.pi), np.sqrt(random.uniform(0, 1))
        x, y = 2.8 + 2.35 * distance * np.cos(angle), 4.7 + 1.9 * distance * np.sin(angle)
        light = 0.55 + 0.35 * (y - 2.8) / 3.8 + 0.15 * index / 420 + random.uniform(-0.08, 0.08)
        leaf = tuple(int(v * light) for v in (104, 138, 62))
        size = float(random.uniform(0.14, 0.34))
        canvas.ellipse(x, y, size, size * 0.8, leaf, base_counts - 70 + 60 * light)  # type: ignore[arg-type]
    return canvas.texture()


def paint_lamp(arm_left: bool, base_counts: float) -> Texture:
    """A street lamp, 5.6 m high, its head over the road."""
    canvas = Canvas(2.0, 5.8, pixels_per_m=60)
    steel: Colour = (74, 78, 80)
    pole, head = (1.8, 0.45) if arm_left else (0.2, 1.55)
    canvas.line([(pole, 0.0), (pole, 5.2)], 0.12, steel, base_counts - 50)
    canvas.rectangle(pole - 0.11, 0.0, 0.22, 0.9, steel, base_counts - 30)
    canvas.line([(pole, 5.2), ((pole + head) / 2, 5.55), (head, 5.5)], 0.08, steel, base_counts - 60)
    canvas.rectangle(head - 0.32, 5.38, 0.64, 0.16, steel, base_counts + 180)
    canvas.rectangle(head - 0.26, 5.32, 0.52, 0.09, (236, 230, 210), base_counts + 520, glow=(255, 226, 168))
    return canvas.texture(heat_blur_m=0.0)


def paint_sign(kind: str, base_counts: float) -> Texture:
    """A traffic or shop sign on its pole. Its message is paint: thermal cameras cannot read it."""
    canvas = Canvas(1.3, 3.0, pixels_per_m=90)
    steel: Colour = (120, 124, 126)
    canvas.line([(0.65, 0.0), (0.65, 2.7)], 0.07, steel, base_counts - 70)
    plate = base_counts - 140
    if kind == "stop":
        corners = [(0.65 + 0.42 * np.cos(a), 2.5 + 0.42 * np.sin(a)) for a in np.pi / 8 + np.arange(8) * np.pi / 4]
        canvas.polygon(corners, (238, 238, 234), plate)
        inner = [(0.65 + 0.385 * np.cos(a), 2.5 + 0.385 * np.sin(a)) for a in np.pi / 8 + np.arange(8) * np.pi / 4]
        canvas.polygon(inner, (186, 20, 28), plate)
        canvas.text(0.34, 2.41, 0.19, "STOP", (246, 246, 244))
    elif kind == "crossing":
        canvas.rectangle(0.28, 2.12, 0.74, 0.74, (24, 74, 160), plate)
        canvas.polygon([(0.65, 2.80), (0.98, 2.20), (0.32, 2.20)], (244, 244, 244), plate)
        canvas.line([(0.65, 2.56), (0.65, 2.42)], 0.07, (20, 20, 24), plate)
        canvas.line([(0.58, 2.26), (0.65, 2.42), (0.73, 2.26)], 0.05, (20, 20, 24), plate)
        canvas.ellipse(0.65, 2.63, 0.045, 0.045, (20, 20, 24), plate)
    else:
        canvas.ellipse(0.65, 2.5, 0.40, 0.40, (196, 24, 30), plate)
        canvas.ellipse(0.65, 2.5, 0.31, 0.31, (242, 242, 240), plate)
        canvas.text(0.44, 2.39, 0.23, kind, (20, 20, 24))
    return canvas.texture()


def paint_skyline(seed: int, base_counts: float) -> Texture:
    """The houses at the far end of the street, 120 m wide."""
    random = np.random.default_rng(seed)
    canvas = Canvas(120, 26, pixels_per_m=6)
    x = 0.0
    while x < 120:
        width, height = float(random.uniform(7, 14)), float(random.uniform(9, 20))
        tone = int(random.integers(105, 160))
        canvas.rectangle(x, 0, width, height, (tone, tone - 4, tone - 14), base_counts + float(random.uniform(-40, 40)))
        for row in np.arange(2.0, height - 2.0, 3.0):
            for column in np.arange(x + 0.8, x + width - 1.5, 2.2):
                lit = random.random() < 0.25
                canvas.rectangle(column, row, 1.0, 1.5, (74, 84, 96), base_counts - 100,
                                 glow=(190, 146, 84) if lit else BLACK)  # fmt: skip
        x += width
    return canvas.texture(heat_blur_m=0.0)


def _darker(colour: Colour, share: float) -> Colour:
    return _mix((0, 0, 0), colour, share)


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """Share 0 is the first colour, 1 the second."""
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
