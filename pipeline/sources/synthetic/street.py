"""The street itself: what stands where, what moves how, and the light. A pure function of seed, scene and world time.

World coordinates: x right, y down with 0 on the road, z along the street, metres; the rig stands at x = 0, z = 0.
Everything is a flat `Panel` at a true place, so both cameras see true parallax; nothing is drawn in pixels.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from pipeline.sources.synthetic import paint
from pipeline.sources.synthetic.paint import Colour, Texture

Scene = Literal["day", "night", "fog", "rain", "headlights"]

ROAD_X_M = (-7.0, 0.4)
PAVEMENT_X_M = (-10.0, 4.6)  # where the houses begin
ZEBRA_Z_M = (12.0, 15.5)
FAR_M = 165.0
SMALLEST_TEXTURE_PX = 12
PERSON_COUNTS = 8100.0  # people are this plus 600 to 900
STRIDE_M = 1.35  # walked per step cycle


@dataclass(frozen=True)
class Look:
    """The light and the air of one scene."""

    ambient: tuple[float, float, float] = (1.0, 1.0, 1.0)
    sky_top: Colour = (104, 150, 206)
    sky_low: Colour = (206, 220, 232)
    lamp_light: float = 0.0
    glow: float = 0.0  # how much of lit windows and lamps is seen
    glare: float = 0.0  # strength of headlights in the lens
    fog_per_m: float = 0.0
    airlight: Colour = (198, 202, 206)
    rain: float = 0.0
    noise_levels: float = 1.6  # sigma of the visible sensor's noise, grey levels
    shadow: float = 0.45
    ground_counts: float = 8190.0
    sky_counts: float = 7150.0
    infrared_fog_per_m: float = 0.0
    infrared_contrast: float = 1.0

    def clean(self) -> Look:
        """The same light without fog, rain and glare."""
        return replace(self, fog_per_m=0.0, rain=0.0, glare=0.0, infrared_fog_per_m=0.0, infrared_contrast=1.0)


_NIGHT = Look(
    ambient=(0.065, 0.072, 0.105),
    sky_top=(5, 7, 15),
    sky_low=(22, 21, 27),
    lamp_light=0.42,
    glow=1.0,
    glare=1.0,
    noise_levels=7.0,
    shadow=0.0,
    ground_counts=8080.0,
    sky_counts=7050.0,
)
LOOKS: dict[str, Look] = {
    "day": Look(),
    "night": _NIGHT,
    "headlights": replace(_NIGHT, glare=3.0, noise_levels=5.0),
    "fog": Look(
        ambient=(0.86, 0.88, 0.90),
        sky_top=(188, 193, 198),
        sky_low=(198, 202, 206),
        glow=0.25,
        fog_per_m=0.050,
        noise_levels=2.2,
        shadow=0.15,
        ground_counts=8120.0,
        sky_counts=7700.0,
        infrared_fog_per_m=0.006,
    ),
    "rain": Look(
        ambient=(0.50, 0.53, 0.58),
        sky_top=(98, 104, 114),
        sky_low=(140, 146, 154),
        lamp_light=0.12,
        glow=0.55,
        glare=0.35,
        fog_per_m=0.012,
        airlight=(128, 134, 142),
        rain=1.0,
        noise_levels=3.0,
        shadow=0.1,
        ground_counts=8060.0,
        sky_counts=7600.0,
        infrared_fog_per_m=0.004,
        infrared_contrast=0.75,
    ),
}


@dataclass(frozen=True)
class Panel:
    """A texture hung in the world: the metres from its top left corner go along `right` and `down`."""

    pyramid: tuple[Texture, ...]  # each half the size of the one before
    corner: tuple[float, float, float]
    right: tuple[float, float, float] = (1.0, 0.0, 0.0)
    down: tuple[float, float, float] = (0.0, 1.0, 0.0)
    opaque: bool = True  # a shadow is not: it hides nothing and has no heat

    def world_from_texture(self, level: int) -> np.ndarray:
        """(3, 3): homogeneous texture pixel -> world point."""
        step = 1 / self.pyramid[level].pixels_per_m
        right, down = np.array(self.right) * step, np.array(self.down) * step
        return np.stack((right, down, np.array(self.corner) + 0.5 * (right + down)), axis=1)


@dataclass(frozen=True)
class Thing:
    """Something that moves, at one moment."""

    name: str
    kind: Literal["person", "car"]
    panels: tuple[Panel, ...]  # farthest first
    points: np.ndarray  # (N, 3) world points to measure with: for a person head, chest, feet
    distance_m: float
    headlights: np.ndarray | None = None  # (2, 3) world points, when they shine at the rig


def upright(pyramid: tuple[Texture, ...], x: float, z: float) -> Panel:
    """A panel that stands on the ground and faces the rig, its middle at x."""
    return Panel(pyramid, (x - pyramid[0].width_m / 2, -pyramid[0].height_m, z))


def build_pyramid(texture: Texture) -> tuple[Texture, ...]:
    """The texture and its halved copies."""
    levels = [texture]
    while min(levels[-1].alpha.shape) >= 2 * SMALLEST_TEXTURE_PX and len(levels) < 6:
        levels.append(levels[-1].halved())
    return tuple(levels)


@dataclass(frozen=True)
class Walker:
    """One person's way: along the pavement and back, or across the street again and again."""

    name: str
    pictures: tuple[tuple[Texture, ...], ...]  # a pyramid per phase
    mirrored: tuple[tuple[Texture, ...], ...]
    along: bool
    start: tuple[float, float]  # x, z
    span_m: float
    speed_m_s: float
    phase_m: float
    height_m: float

    def place(self, world_s: float) -> tuple[float, float, bool]:
        """(x, z, whether it walks towards negative x)."""
        walked = self.phase_m + abs(self.speed_m_s) * world_s
        x, z = self.start
        if self.along:
            there = walked % (2 * self.span_m)
            return x, z + (there if there < self.span_m else 2 * self.span_m - there), False
        gone = walked % self.span_m
        return (x + gone, z, False) if self.speed_m_s > 0 else (x + self.span_m - gone, z, True)

    def at(self, world_s: float) -> Thing:
        x, z, leftwards = self.place(world_s)
        cycle = (self.phase_m + abs(self.speed_m_s) * world_s) / STRIDE_M
        phase = int(cycle * paint.PERSON_PHASES) % paint.PERSON_PHASES
        picture = (self.mirrored if leftwards else self.pictures)[phase]
        size = self.height_m / 1.76
        points = np.array([[x, -1.64 * size, z], [x, -1.22 * size, z], [x, -0.04, z]])
        return Thing(self.name, "person", (upright(picture, x, z),), points, z)


@dataclass(frozen=True)
class Driver:
    """One car's way along its lane, endlessly."""

    name: str
    end: tuple[Texture, ...]
    side: tuple[Texture, ...]
    shadow: tuple[Texture, ...]
    x_m: float
    near_m: float
    span_m: float
    speed_m_s: float  # negative: towards the rig; 0: stands at near_m
    phase_m: float

    def at(self, world_s: float) -> Thing:
        gone = (self.phase_m + abs(self.speed_m_s) * world_s) % self.span_m
        z = self.near_m + (gone if self.speed_m_s >= 0 else self.span_m - gone)
        if self.speed_m_s == 0:
            z = self.near_m
        side_x = self.x_m + paint.CAR_WIDTH_M / 2
        side = Panel(self.side, (side_x, -self.side[0].height_m, z), right=(0, 0, 1))
        end = upright(self.end, self.x_m, z)
        lamps = np.array([[self.x_m + dx, -0.69, z] for dx in (-0.65, 0.65)])
        points = np.concatenate((lamps, [[self.x_m, -0.46, z]]))
        shadow = Panel(
            self.shadow,
            (self.x_m - self.shadow[0].width_m / 2, 0.0, z + paint.CAR_LENGTH_M + 0.3),
            down=(0, 0, -1),
            opaque=False,
        )
        facing = self.speed_m_s <= 0
        return Thing(self.name, "car", (shadow, side, end), points, z, lamps if facing else None)


@dataclass(frozen=True)
class Street:
    """All that both cameras look at."""

    seed: int
    scene: str
    look: Look
    panels: tuple[Panel, ...]  # what never moves, farthest first
    lamps: np.ndarray  # (N, 3) world points of the street lamps' heads
    movers: tuple[Walker | Driver, ...] = field(default=())

    def things(self, world_s: float) -> list[Thing]:
        """What moves, farthest first."""
        return sorted((mover.at(world_s) for mover in self.movers), key=lambda thing: -thing.distance_m)


_painting = threading.Lock()


def build_street(seed: int, scene: str) -> Street:
    """The street of a seed. Both cameras of one rig share it, so the second one to open waits for the first."""
    with _painting:
        return _paint_street(seed, scene)


@lru_cache(maxsize=8)
def _paint_street(seed: int, scene: str) -> Street:
    panels, lamps = _paint_fixed(seed)
    return Street(seed, scene, LOOKS[scene], panels, lamps, (*_walkers(seed, scene), *_drivers(seed, scene)))


@lru_cache(maxsize=2)
def _paint_fixed(seed: int) -> tuple[tuple[Panel, ...], np.ndarray]:
    """What never moves, farthest first, and the lamps' heads; the same in every scene."""
    lamps: list[tuple[float, float, float]] = []
    static = _houses(seed) + _furniture(seed, lamps)
    static.append((FAR_M, upright(build_pyramid(paint.paint_skyline(seed, 8060)), -2.0, FAR_M)))
    static.sort(key=lambda item: -item[0])
    return tuple(panel for _, panel in static), np.array(lamps)


_WALLS: tuple[tuple[Colour, bool], ...] = (
    ((158, 82, 62), True),
    ((206, 188, 150), False),
    ((172, 160, 148), False),
    ((178, 106, 74), True),
    ((196, 168, 116), False),
    ((148, 152, 160), False),
    ((136, 70, 58), True),
)
_SHOPS = ("CAFE LUNA", "BOOKS", "BAKERY", "HOTEL", "PHARMACY", "CINEMA", "FLOWERS", "RADIO", "TAILOR", "MARKET")


def _houses(seed: int) -> list[tuple[float, Panel]]:
    """Two rows of houses with gaps for side streets; each with its front and its near end wall."""
    random = np.random.default_rng([seed, 1])
    panels: list[tuple[float, Panel]] = []
    for left in (True, False):
        z, index = (9.0 if left else 5.0), int(random.integers(len(_WALLS)))
        shops = list(random.permutation(len(_SHOPS)))
        while z < 120:
            length, height = float(random.uniform(10, 15)), float(random.uniform(10.5, 15.5))
            wall, bricks = _WALLS[index % len(_WALLS)]
            setback = float(random.uniform(0.0, 0.9))
            front_x = PAVEMENT_X_M[0] - setback if left else PAVEMENT_X_M[1] + setback
            shop = _SHOPS[shops[index % len(shops)]]
            house_seed = seed * 1000 + int(left) * 100 + index
            detail = 40.0 if z < 26 else 22.0 if z < 55 else 12.0  # pixels per metre: nobody sees the bricks from afar
            front = build_pyramid(paint.paint_facade(length, height, wall, shop, bricks, house_seed, 8130, detail))
            corner, right = ((front_x, -height, z), (0, 0, 1)) if left else ((front_x, -height, z + length), (0, 0, -1))
            panels.append((z + length, Panel(front, corner, right)))
            end = build_pyramid(paint.paint_wall(9.0, height, wall, house_seed + 50, 8100, detail * 0.6))
            panels.append((z + 0.01, Panel(end, (front_x - 9.0 if left else front_x, -height, z))))
            z += length
            index += 1
            if 38 < z < 52:  # a side street
                z += 9.0
    return panels


def _furniture(seed: int, lamps: list[tuple[float, float, float]]) -> list[tuple[float, Panel]]:
    """Trees, lamps, signs and a parked car. Adds the lamps' heads to `lamps`."""
    panels: list[tuple[float, Panel]] = []
    for number, (x, z) in enumerate(((-8.6, 21.0), (3.7, 29.0), (-8.7, 36.0), (3.8, 47.0), (-8.6, 62.0), (3.8, 70.0))):
        panels.append((z, upright(build_pyramid(paint.paint_tree(seed * 10 + number, 8090)), x, z)))
    for x, z in ((-7.5, 16.5), (1.0, 24.0), (-7.5, 34.0), (1.0, 44.0), (-7.5, 54.0), (1.0, 66.0), (-7.5, 80.0)):
        on_right = x > 0
        texture = paint.paint_lamp(arm_left=on_right, base_counts=8100)
        panels.append((z, upright(build_pyramid(texture), x - 0.8 if on_right else x + 0.8, z)))
        lamps.append((x - 1.35 if on_right else x + 1.35, -5.32, z))
    signs = (("crossing", 1.05, 11.4), ("stop", -7.6, 19.0), ("30", 1.0, 33.0), ("50", -7.5, 41.0))
    for kind, x, z in signs:
        panels.append((z, upright(build_pyramid(paint.paint_sign(kind, 8090)), x, z)))
    return panels


_COATS: tuple[Colour, ...] = ((44, 58, 92), (112, 34, 36), (48, 70, 52), (60, 58, 62), (120, 92, 60), (38, 42, 46))
_TROUSERS: tuple[Colour, ...] = ((34, 38, 56), (52, 50, 52), (70, 62, 50), (28, 30, 34))
_SKINS: tuple[Colour, ...] = ((218, 174, 144), (150, 104, 78), (190, 142, 112))


def _walkers(seed: int, scene: str) -> list[Walker]:
    random = np.random.default_rng([seed, 2])
    # name, along the street?, x, z, span, speed; who crosses appears and vanishes outside both cameras' view
    ways: list[tuple[str, bool, float, float, float, float, float]] = [
        ("near", True, 2.2, 8.6, 8.0, 1.15, 1.0),
        ("pavement", True, 3.2, 13.0, 24.0, 1.35, 9.0),
        ("across", False, -12.5, 13.2, 19.0, 1.40, 7.4),
        ("back", False, -14.0, 14.6, 21.0, -1.25, 9.5),
        ("left", True, -8.2, 19.0, 22.0, 1.20, 5.0),
        ("far", False, -19.0, 26.0, 25.0, 1.50, 10.0),
        ("distant", True, 1.9, 30.0, 25.0, 1.30, 4.0),
    ]
    if scene == "headlights":
        ways.append(("dazzled", False, -14.0, 15.4, 21.0, 0.75, 11.2))
    walkers = []
    for name, along, x, z, span, speed, phase in ways:
        person = paint.Person(
            coat=_COATS[int(random.integers(len(_COATS)))],
            trousers=_TROUSERS[int(random.integers(len(_TROUSERS)))],
            skin=_SKINS[int(random.integers(len(_SKINS)))],
            bag=(126, 84, 40) if random.random() < 0.4 else None,
            height_m=float(random.uniform(1.62, 1.84)),
        )
        pictures, mirrored = _paint_cycle(person, along)
        phase_m = phase + float(random.uniform(-0.8, 0.8))
        walkers.append(Walker(name, pictures, mirrored, along, (x, z), span, speed, phase_m, person.height_m))
    return walkers


Cycle = tuple[tuple[Texture, ...], ...]  # a pyramid per phase


@lru_cache(maxsize=16)
def _paint_cycle(person: paint.Person, along: bool) -> tuple[Cycle, Cycle]:
    """A person's steps, and the same mirrored."""
    textures = [paint.paint_person(person, i, not along, PERSON_COUNTS) for i in range(paint.PERSON_PHASES)]
    pictures = tuple(build_pyramid(texture) for texture in textures)
    return pictures, pictures if along else tuple(build_pyramid(texture.mirrored()) for texture in textures)


def _drivers(seed: int, scene: str) -> list[Driver]:
    random = np.random.default_rng([seed, 3])
    colours: list[Colour] = [(156, 24, 30), (196, 200, 204), (30, 60, 120), (228, 226, 218), (60, 64, 70)]
    shadow = build_pyramid(_shadow_texture())
    # name, x, near end, span, speed, phase
    ways = [
        ("oncoming-1", -4.2, 1.6, 112.0, -9.0, 84.0),
        ("oncoming-2", -4.2, 1.6, 112.0, -9.0, 28.0),
        ("leaving", -1.7, -4.2, 116.0, 8.0, 24.0),
        ("parked", -6.05, 31.0, 1.0, 0.0, 0.0),
    ]
    if scene == "headlights":
        ways[2] = ("dazzling", -1.5, 17.5, 1.0, 0.0, 0.0)
    drivers = []
    for name, x, near, span, speed, phase in ways:
        colour = colours[int(random.integers(len(colours)))]
        towards = speed <= 0
        side = paint.paint_car_side(colour, 8080)
        end = paint.paint_car_end(colour, rear=not towards, base_counts=8080)
        drivers.append(
            Driver(
                name,
                build_pyramid(end),
                build_pyramid(side if towards else side.mirrored()),
                shadow,
                x,
                near,
                span,
                speed,
                phase + float(random.uniform(-3, 3)) * (speed != 0),
            )
        )
    return drivers


def _shadow_texture() -> Texture:
    """A soft dark patch as large as a car."""
    pixels_per_m, margin = 20.0, 0.5
    height = round((paint.CAR_LENGTH_M + 0.6) * pixels_per_m)
    width = round((paint.CAR_WIDTH_M + 2 * margin) * pixels_per_m)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    inside = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y)) / (margin * pixels_per_m)
    alpha = np.clip(inside, 0, 1).astype(np.float32)
    black = np.zeros((height, width, 3), np.uint8)
    return Texture(black, black, np.zeros_like(alpha), alpha, pixels_per_m)
