"""Draws the street as one camera sees it, fast enough for live use: 2 to 4 ms of CPU time a 640x480 picture.

What never moves is painted once onto a pinhole plane a little wider than the picture, with its depth. A picture is
then one `remap` of that plane (lens and sway in one map) plus the moving panels, each only in its own region of
interest, through the lens exactly: pixel -> ray -> point on the panel. Nothing is resampled twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from calibration.rig import CameraModel
from pipeline.frame import Camera
from pipeline.sources.synthetic import geometry
from pipeline.sources.synthetic.paint import Texture
from pipeline.sources.synthetic.street import (
    PAVEMENT_X_M,
    ROAD_X_M,
    ZEBRA_Z_M,
    Look,
    Panel,
    Street,
    Thing,
    build_street,
)

NEAREST_M = 0.5  # nothing nearer is drawn
SKY_M = 1e4
SWAY_MARGIN = 0.012  # of a ray, beyond the lens's own field
PLANE_DETAIL = {"visible": 1.12, "infrared": 1.0}  # pixels of the plane per pixel of the picture
LAMP_COLOUR = np.array([1.0, 0.82, 0.55], np.float32)
INFRARED_BLUR_PX = 0.8  # of the thermal lens, at 640 pixels wide
AIR_COUNTS = 7950.0  # what fog looks like in the far infrared
SLIVER_PX = 0.7  # a panel seen more edge-on than this is not drawn
OCCLUSION_M = 0.35  # a thing this much behind the background's depth is hidden


@dataclass(frozen=True)
class Backdrop:
    """The street without anything that moves, on a pinhole plane."""

    image: (
        np.ndarray
    )  # visible: uint8 RGBA (H, W, 4), as OpenCV resamples four channels faster; infrared: float32 counts
    depth: np.ndarray  # float32 (H, W), metres along the camera's axis
    matrix: np.ndarray  # (3, 3): ray -> plane pixel


@dataclass(frozen=True)
class _Seen:
    """One moving panel in one picture."""

    thing: Thing
    panel: Panel
    texture: Texture
    region: tuple[slice, slice]
    camera_from_texture: np.ndarray  # (3, 3)


class Renderer:
    """Draws one camera's picture at any moment. Holds no state that a picture depends on."""

    def __init__(self, camera: Camera, model: CameraModel, street: Street, look: Look) -> None:
        self.camera = camera
        self.model = model
        self.street = street
        self.look = look
        self._rays = geometry.pixel_rays(model)
        self._from_visible = np.eye(4) if camera == "visible" else geometry.infrared_from_visible()
        self._backdrop = _paint_backdrop(self)
        self._glares = _paint_glares(model.width) if camera == "visible" and look.glare > 0 else []
        self._rain = _paint_rain(street.seed, model) if camera == "visible" and look.rain > 0 else None

    def from_world(self, world_s: float | None) -> np.ndarray:
        """(4, 4): world -> this camera's coordinates; None: without sway."""
        visible = geometry.still_visible_from_world() if world_s is None else geometry.visible_from_world(world_s)
        return self._from_visible @ visible

    def draw(self, world_s: float, hide: Collection[str] = (), rain_seed: int | None = None) -> np.ndarray:
        """The picture at one moment, before the sensor: uint8 RGB (H, W, 3), or float32 counts (H, W).

        Args:
            hide: names of things to leave out.
            rain_seed: where the rain is; None: no streaks.
        """
        plane = self._plane_map(world_s)
        picture = _remap(self._backdrop.image, plane, cv2.BORDER_REPLICATE)
        if self.camera == "visible":
            picture = cv2.cvtColor(picture, cv2.COLOR_RGBA2RGB)
        for seen in self._seen(world_s, hide):
            self._draw_panel(picture, plane, seen)
        if self.camera == "infrared":
            sigma = INFRARED_BLUR_PX * self.model.width / 640
            return cv2.GaussianBlur(picture, (5, 5), sigma) if sigma > 0.25 else picture
        # Glare arises in the lens, so it lies over all that is in the scene.
        for thing in self.street.things(world_s) if self._glares else ():
            if thing.headlights is not None and thing.name not in hide:
                self._draw_glare(picture, thing, self.from_world(world_s))
        if self._rain is not None and rain_seed is not None:
            _add_rain(picture, self._rain, rain_seed, self.look.rain)
        return picture

    def coverage(self, name: str, world_s: float, occluded: bool = True) -> np.ndarray:
        """How much of each pixel one thing covers: float32 (H, W) in [0, 1].

        Args:
            occluded: take off what other things and the street hide of it.
        """
        plane = self._plane_map(world_s)
        covered = np.zeros(self._rays.shape[:2], np.float32)
        for seen in self._seen(world_s, ()):
            itself = seen.thing.name == name
            if not seen.panel.opaque or not (occluded or itself):
                continue
            where, unhidden = self._look_at(seen, plane)
            alpha = _remap(seen.texture.alpha, where)
            if occluded:
                alpha *= unhidden
            covered[seen.region] *= 1 - alpha
            if itself:
                covered[seen.region] += alpha
        return covered

    def _plane_map(self, world_s: float) -> np.ndarray:
        """Where each pixel looks on the backdrop's plane, float32 (H, W, 2)."""
        # The backdrop was painted without sway. The pole turns about the visible lens; the infrared lens moves by
        # 0.3 mm at most with it, which no pixel can show.
        turned = self._from_visible[:3, :3] @ geometry.sway_rotation(world_s) @ self._from_visible[:3, :3].T
        return cv2.perspectiveTransform(self._rays, self._backdrop.matrix @ turned.T)

    def _seen(self, world_s: float, hide: Collection[str]) -> Iterator[_Seen]:
        """The moving panels that reach into the picture, farthest first."""
        from_world = self.from_world(world_s)
        shadows = self.camera == "visible" and self.look.shadow > 0
        parts = [
            (thing, panel)
            for thing in self.street.things(world_s)
            if thing.name not in hide
            for panel in thing.panels
            if panel.opaque or shadows
        ]
        placements = _placements([panel for _, panel in parts], from_world, self.model)
        for (thing, panel), placement in zip(parts, placements, strict=True):
            if placement is not None:
                region, level = placement
                yield _Seen(thing, panel, panel.pyramid[level], region, _camera_from_texture(panel, level, from_world))

    def _look_at(self, seen: _Seen, plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each pixel of the region looks on the texture, and whether nothing static hides it: 0 or 1."""
        rays = np.ascontiguousarray(self._rays[seen.region])
        where = cv2.perspectiveTransform(rays, np.linalg.inv(seen.camera_from_texture))
        depth = _remap(self._backdrop.depth, plane[seen.region], cv2.BORDER_REPLICATE, cv2.INTER_NEAREST)
        return where, (depth > seen.thing.distance_m - OCCLUSION_M).astype(np.float32)

    def _draw_panel(self, picture: np.ndarray, plane: np.ndarray, seen: _Seen) -> None:
        where, unhidden = self._look_at(seen, plane)
        thing, panel, texture, region = seen.thing, seen.panel, seen.texture, seen.region
        if self.camera == "infrared":
            heat, alpha = cv2.split(_remap(texture.thermal, where))
            heat = _through_air_counts(heat, alpha, thing.distance_m, self.look)
            picture[region] += unhidden * (heat - alpha * picture[region])
            return
        layers = _remap(texture.visible, where)
        alpha = layers[..., 3] * (unhidden * np.float32(1 / 255))
        mixed = picture[region].astype(np.float32)
        if not panel.opaque:
            mixed *= (1 - alpha * self.look.shadow)[..., None]
            picture[region] = mixed.astype(np.uint8)
            return
        colour = layers[..., :3] * _light_at(self.street, self.look, thing.points.mean(axis=0))
        if self.look.glow > 0 and texture.shines:
            colour += _remap(texture.glow, where) * np.float32(self.look.glow)
        through = np.exp(-self.look.fog_per_m * thing.distance_m)
        if through < 1:
            colour *= np.float32(through)
            colour += layers[..., 3:] * (np.array(self.look.airlight, np.float32) * np.float32((1 - through) / 255))
        colour *= unhidden[..., None]
        mixed *= (1 - alpha)[..., None]
        mixed += colour
        np.minimum(mixed, 255, out=mixed)
        picture[region] = mixed.astype(np.uint8)

    def _draw_glare(self, picture: np.ndarray, thing: Thing, from_world: np.ndarray) -> None:
        """Light scattered in the lens: as wide on the sensor whatever the distance, weaker from afar."""
        assert thing.headlights is not None
        lamps = geometry.transform_points(from_world, thing.headlights)
        lamps = lamps[lamps[:, 2] > 3.0]
        if len(lamps) == 0:
            return
        strength = self.look.glare * min(1.0, 16.0 / thing.distance_m)
        glare = self._glares[min(len(self._glares) - 1, round(strength * 4))]
        for x, y in geometry.project_camera(self.model, lamps):
            _add_stamp(picture, glare, round(x), round(y))


@lru_cache(maxsize=8)
def build_renderer(camera: Camera, width: int, height: int, seed: int, scene: str, clean: bool = False) -> Renderer:
    """The renderer of one camera; kept, because painting a backdrop takes some hundred milliseconds."""
    street = build_street(seed, scene)
    look = street.look.clean() if clean else street.look
    return Renderer(camera, geometry.camera_model(camera, width, height), street, look)


def _remap(
    layer: np.ndarray, where: np.ndarray, border: int = cv2.BORDER_CONSTANT, method: int = cv2.INTER_LINEAR
) -> np.ndarray:
    # OpenCV's stubs know no absent second map; an empty array instead of None gives wrong pictures in OpenCV 5.0.
    return cv2.remap(layer, where, None, method, borderMode=border)  # type: ignore[call-overload,no-any-return]


def _camera_from_texture(panel: Panel, level: int, from_world: np.ndarray) -> np.ndarray:
    """(3, 3): homogeneous texture pixel -> point in camera coordinates, which is a ray up to scale."""
    matrix = from_world[:3, :3] @ panel.world_from_texture(level)
    matrix[:, 2] += from_world[:3, 3]
    return matrix


# Shares of a panel's width and height around its rim; with the middles, because a lens bends long edges.
_RIM = np.array([(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.5, 1), (0, 1), (0, 0.5)])

Region = tuple[slice, slice]


def _placements(panels: Sequence[Panel], from_world: np.ndarray, model: CameraModel) -> list[tuple[Region, int] | None]:
    """For each panel the region of the picture that it may cover, and the level of detail for its size there.

    None: outside the picture, behind the camera or seen edge-on. All panels in one go, because NumPy's price is per
    call: one by one, this was a quarter of a picture's time.
    """
    if not panels:
        return []
    size_m = np.array([(panel.pyramid[0].width_m, panel.pyramid[0].height_m) for panel in panels])
    sides = np.array([(panel.right, panel.down) for panel in panels]) * size_m[..., None] @ from_world[:3, :3].T
    corners = geometry.transform_points(from_world, np.array([panel.corner for panel in panels]))
    points = corners[:, None] + _RIM @ sides  # (P, 8, 3)
    too_near = points[..., 2] < NEAREST_M
    for index in np.flatnonzero(too_near.any(axis=1)):
        # Slide what is too near along the panel's steeper side until it is just in front of the camera.
        edge = max(sides[index], key=lambda side: abs(side[2]))
        moved = points[index, too_near[index]]
        points[index, too_near[index]] = moved + ((NEAREST_M - moved[:, 2:]) / edge[2]) * edge
    pixels = geometry.project_camera(model, points.reshape(-1, 3)).reshape(len(panels), -1, 2)
    low, high = pixels.min(axis=1), pixels.max(axis=1)
    hidden = too_near.all(axis=1) | ((high - low).min(axis=1) < SLIVER_PX)
    px_per_m = np.hypot(*(high - low).T) / np.hypot(*size_m.T)
    starts = np.maximum(np.floor(low) - 2, 0).astype(int)
    stops = np.minimum(np.ceil(high) + 3, (model.width, model.height)).astype(int)
    hidden |= (stops <= starts).any(axis=1)
    return [
        None if gone else ((slice(top, bottom), slice(left, right)), _level(panel.pyramid, detail))
        for panel, gone, (left, top), (right, bottom), detail in zip(
            panels, hidden.tolist(), starts.tolist(), stops.tolist(), px_per_m.tolist(), strict=True
        )
    ]


def _level(pyramid: tuple[Texture, ...], picture_px_per_m: float) -> int:
    """The coarsest texture that is still as fine as the picture."""
    level = 0
    while level + 1 < len(pyramid) and pyramid[level + 1].pixels_per_m >= 0.9 * picture_px_per_m:
        level += 1
    return level


def _light_at(street: Street, look: Look, point: np.ndarray) -> np.ndarray:
    """Daylight plus the street lamps' light at a world point, as factors of RGB, float32 (3,)."""
    light = np.array(look.ambient, np.float32)
    if look.lamp_light > 0:
        square = ((street.lamps - point) ** 2).sum(axis=1)
        light = light + LAMP_COLOUR * np.float32(look.lamp_light * (1 / (1 + square / 14.0)).sum() * 0.75)
    return light.astype(np.float32)


def _through_air_counts(heat: np.ndarray, alpha: np.ndarray | float, distance_m: float, look: Look) -> np.ndarray:
    """What is left of premultiplied counts after fog and rain."""
    through = look.infrared_contrast * float(np.exp(-look.infrared_fog_per_m * distance_m))
    return heat if through >= 1 else heat * through + alpha * (AIR_COUNTS * (1 - through))


# --- the backdrop ---


def _paint_backdrop(view: Renderer) -> Backdrop:
    """Sky, ground, houses and street furniture with their depth, painted at twice the size and averaged."""
    detail = PLANE_DETAIL[view.camera]
    focal = view.model.matrix[0, 0] * detail
    low = view._rays.reshape(-1, 2).min(axis=0) - SWAY_MARGIN
    high = view._rays.reshape(-1, 2).max(axis=0) + SWAY_MARGIN
    width, height = (np.ceil((high - low) * focal).astype(int) + 1).tolist()
    matrix = np.array([[focal, 0, -low[0] * focal], [0, focal, -low[1] * focal], [0, 0, 1]])
    # Pixel centres: plane pixel p is covered by the large pixels 2p and 2p + 1.
    large = np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]]) @ matrix
    layers = _paint_layers(view, large, 2 * width, 2 * height)
    depth = np.ascontiguousarray(layers["depth"][::2, ::2])
    small = {name: _averaged(layer) for name, layer in layers.items() if name != "depth"}
    if view.camera == "infrared":
        through = view.look.infrared_contrast * np.exp(-view.look.infrared_fog_per_m * np.minimum(depth, 400.0))
        image = small["heat"] * through + AIR_COUNTS * (1 - through)
        return Backdrop(image.astype(np.float32), depth, matrix)
    lit = _lit(view, small["colour"], small["glow"], depth, matrix)
    return Backdrop(cv2.cvtColor(lit, cv2.COLOR_RGB2RGBA), depth, matrix)


def _averaged(layer: np.ndarray) -> np.ndarray:
    return cv2.resize(layer, (layer.shape[1] // 2, layer.shape[0] // 2), interpolation=cv2.INTER_AREA)


def _paint_layers(view: Renderer, matrix: np.ndarray, width: int, height: int) -> dict[str, np.ndarray]:
    from_world = view.from_world(None)
    layers = _paint_sky_and_ground(view, matrix, width, height, from_world)
    plane = CameraModel(width, height, matrix)
    for panel, placement in zip(view.street.panels, _placements(view.street.panels, from_world, plane), strict=True):
        if placement is None:
            continue
        region, level = placement
        origin = np.array([[1, 0, region[1].start], [0, 1, region[0].start], [0, 0, 1]], np.float64)
        to_camera = _camera_from_texture(panel, level, from_world)
        to_texture = np.linalg.inv(to_camera) @ np.linalg.inv(matrix) @ origin
        size = region[1].stop - region[1].start, region[0].stop - region[0].start
        warp = _warper(to_texture, size)
        texture = panel.pyramid[level]
        alpha = warp(texture.alpha)
        if view.camera == "infrared":
            layers["heat"][region] = layers["heat"][region] * (1 - alpha) + warp(texture.heat)
        else:
            for name, layer in (("colour", texture.colour), ("glow", texture.glow)):
                layers[name][region] = layers[name][region] * (1 - alpha)[..., None] + warp(layer)
        solid = alpha > 0.5
        layers["depth"][region][solid] = _plane_depth(to_camera, matrix, region)[solid]
    return layers


def _warper(to_texture: np.ndarray, size: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    def warp(layer: np.ndarray) -> np.ndarray:
        return cv2.warpPerspective(layer, to_texture, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)

    return warp


def _plane_depth(to_camera: np.ndarray, matrix: np.ndarray, region: tuple[slice, slice]) -> np.ndarray:
    """Depth of a panel at the plane pixels of a region, float32."""
    normal = np.cross(to_camera[:, 0], to_camera[:, 1])
    offset = float(normal @ to_camera[:, 2])
    columns = (np.arange(region[1].start, region[1].stop) - matrix[0, 2]) / matrix[0, 0]
    rows = (np.arange(region[0].start, region[0].stop) - matrix[1, 2]) / matrix[1, 1]
    facing = normal[0] * columns[None, :] + normal[1] * rows[:, None] + normal[2]
    facing = np.where(np.abs(facing) < 1e-9, 1e-9, facing)
    return np.clip(offset / facing, NEAREST_M, SKY_M).astype(np.float32)


def _paint_sky_and_ground(
    view: Renderer, matrix: np.ndarray, width: int, height: int, from_world: np.ndarray
) -> dict[str, np.ndarray]:
    to_world = np.linalg.inv(from_world)
    columns = (np.arange(width, dtype=np.float32) - np.float32(matrix[0, 2])) / np.float32(matrix[0, 0])
    rows = (np.arange(height, dtype=np.float32) - np.float32(matrix[1, 2])) / np.float32(matrix[1, 1])
    turn, eye = to_world[:3, :3].astype(np.float32), to_world[:3, 3].astype(np.float32)
    # World direction of each pixel at camera depth 1.
    direction = [turn[i, 0] * columns[None, :] + turn[i, 1] * rows[:, None] + turn[i, 2] for i in range(3)]
    falls = direction[1] > 1e-4
    depth = np.where(falls, -eye[1] / np.where(falls, direction[1], 1), SKY_M).astype(np.float32)
    depth = np.minimum(depth, SKY_M)
    ground = falls & (depth < 600)
    x = eye[0] + depth * direction[0]
    z = eye[2] + depth * direction[2]
    random = np.random.default_rng([view.street.seed, 4])
    elevation = np.clip(-direction[1] / np.maximum(direction[2], 1e-3) / 0.5, 0, 1)
    cloud = _clouds(random, direction, elevation)
    # Half of the picture has no ground: only the rows below the horizon are worked out.
    first = int(np.argmax(ground.any(axis=1))) if ground.any() else height
    below = x[first:], z[first:], depth[first:]
    if view.camera == "infrared":
        low = view.look.sky_counts + 550
        heat = low + (view.look.sky_counts - low) * np.sqrt(elevation) + 160 * cloud
        heat[first:] = np.where(ground[first:], _ground_heat(random, *below, view.look), heat[first:])
        return {"heat": heat.astype(np.float32), "depth": depth}
    top, horizon = np.array(view.look.sky_top, np.float32), np.array(view.look.sky_low, np.float32)
    white = np.float32(0.75 if view.look.lamp_light == 0 and view.look.fog_per_m == 0 else 0.12)
    # The sky is a light: kept apart from what the ambient light falls on.
    glow = horizon + (top - horizon) * np.sqrt(elevation)[..., None]
    glow += (np.minimum(horizon * np.float32(1.12), 255) - glow) * (cloud * white)[..., None]
    glow[ground] = 0
    colour = np.zeros((height, width, 3), np.float32)
    colour[first:] = np.where(ground[first:, :, None], _ground_colour(random, *below), 0)
    return {"colour": colour, "glow": glow.astype(np.float32), "depth": depth}


def _clouds(random: np.random.Generator, direction: list[np.ndarray], elevation: np.ndarray) -> np.ndarray:
    noise = sum(
        cv2.resize(random.standard_normal((64 * k, 64 * k), dtype=np.float32), (512, 512)) / k for k in (1, 2, 4)
    )
    share = 0.35 + np.maximum(elevation, 0)
    where = [(direction[0] / share * 60 + 256), (direction[2] / share * 25)]
    cloud = cv2.remap(np.asarray(noise, np.float32), where[0].astype(np.float32), where[1].astype(np.float32),
                      cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)  # fmt: skip
    return np.clip(cloud * 0.45 + 0.35, 0, 1)


def _tile(random: np.random.Generator, x: np.ndarray, z: np.ndarray, depth: np.ndarray, cell_m: float) -> np.ndarray:
    """Unit noise fixed to the ground, faded out where its cells become smaller than a pixel."""
    noise = random.standard_normal((512, 512), dtype=np.float32)
    sampled = cv2.remap(noise, (x / cell_m).astype(np.float32) % 511, (z / cell_m).astype(np.float32) % 511,
                        cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)  # fmt: skip
    return sampled * np.clip(cell_m * 900 / depth, 0, 1)


def _band(value: np.ndarray, low: float, high: float, soft: np.ndarray) -> np.ndarray:
    """1 between low and high with edges as wide as a pixel's footprint."""
    return np.clip((value - low) / soft + 0.5, 0, 1) * np.clip((high - value) / soft + 0.5, 0, 1)


def _markings(x: np.ndarray, z: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Share of white road paint."""
    soft_x = np.maximum(depth * 0.0012, 0.01)
    soft_z = np.maximum(depth * depth * 0.0006, 0.03)
    centre = (ROAD_X_M[0] + ROAD_X_M[1]) / 2
    dash = _band(z % 6.0, 1.0, 4.0, soft_z) * _band(x, centre - 0.08, centre + 0.08, soft_x)
    dash *= 1 - _band(z, ZEBRA_Z_M[0] - 2.0, ZEBRA_Z_M[1] + 1.5, soft_z)
    on_road = _band(x, ROAD_X_M[0] + 0.3, ROAD_X_M[1] - 0.3, soft_x)
    zebra = on_road * _band(z, *ZEBRA_Z_M, soft_z) * _band(x % 1.0, 0.25, 0.75, soft_x)
    stop = _band(x, centre + 0.1, ROAD_X_M[1] - 0.25, soft_x) * _band(z, 10.4, 10.8, soft_z)
    edge = sum(_band(x, at - 0.06, at + 0.06, soft_x) for at in (ROAD_X_M[0] + 0.25, ROAD_X_M[1] - 0.25))
    return np.clip(dash + zebra + stop + 0.8 * edge, 0, 1)


def _ground_colour(random: np.random.Generator, x: np.ndarray, z: np.ndarray, depth: np.ndarray) -> np.ndarray:
    fine, rough, broad = (_tile(random, x, z, depth, cell) for cell in (0.035, 0.16, 1.7))
    soft = np.maximum(depth * 0.0012, 0.01)
    road = _band(x, *ROAD_X_M, soft)
    asphalt = 88 + 6 * fine + 4 * rough + 6 * broad
    # Tyres polish the lanes.
    for lane in (-4.95, -3.45, -2.35, -0.85):
        asphalt = asphalt - 8 * np.exp(-(((x - lane) / 0.28) ** 2))
    manhole = _manhole(x, z)
    asphalt = asphalt * (1 - 0.45 * manhole)
    paint = _markings(x, z, depth) * np.clip(0.88 + 0.10 * rough, 0.5, 1)
    road_colour = asphalt[..., None] * np.array([1.0, 1.0, 1.02], np.float32)
    road_colour = road_colour + (np.array([224, 222, 214], np.float32) - road_colour) * paint[..., None]
    slabs = _slab_joints(x, z, depth)
    pavement = (148 + 5 * fine + 5 * rough + 7 * broad) * (1 - 0.22 * slabs)
    pavement_colour = pavement[..., None] * np.array([1.0, 0.97, 0.92], np.float32)
    colour = pavement_colour + (road_colour - pavement_colour) * road[..., None]
    curb = sum(_band(x, at - 0.09, at + 0.09, soft) for at in ROAD_X_M)
    colour = colour + (np.array([178, 176, 170], np.float32) - colour) * np.clip(curb, 0, 1)[..., None]
    return np.clip(colour, 0, 255)


def _slab_joints(x: np.ndarray, z: np.ndarray, depth: np.ndarray) -> np.ndarray:
    soft_x, soft_z = np.maximum(depth * 0.0012, 0.01), np.maximum(depth * depth * 0.0006, 0.02)
    lines = _band(x % 0.9, 0.0, 0.03, soft_x) + _band(z % 0.9, 0.0, 0.03, soft_z)
    return np.clip(lines, 0, 1) * np.clip(14 / depth, 0, 1)


def _manhole(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    total = np.zeros_like(x)
    for at_x, at_z in ((-2.4, 9.0), (-4.4, 21.0)):
        total += np.clip((0.36 - np.hypot(x - at_x, z - at_z)) / 0.03, 0, 1)
    return total


def _ground_heat(
    random: np.random.Generator, x: np.ndarray, z: np.ndarray, depth: np.ndarray, look: Look
) -> np.ndarray:
    rough, broad = (_tile(random, x, z, depth, cell) for cell in (0.25, 2.1))
    soft = np.maximum(depth * 0.0012, 0.01)
    road = _band(x, *ROAD_X_M, soft)
    heat = look.ground_counts - 50 + 85 * road + 7 * rough + 16 * broad
    for lane in (-4.95, -3.45, -2.35, -0.85):
        heat = heat + 42 * np.exp(-(((x - lane) / 0.30) ** 2)) * road
    heat = heat + 230 * _manhole(x, z) - 40 * _markings(x, z, depth)
    curb = sum(_band(x, at - 0.09, at + 0.09, soft) for at in ROAD_X_M)
    walls = sum(np.exp(-np.abs(x - at) / 0.5) for at in PAVEMENT_X_M)
    return heat - 60 * np.clip(curb, 0, 1) + 45 * np.clip(walls, 0, 1)


def _lit(view: Renderer, colour: np.ndarray, glow: np.ndarray, depth: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Light, lamp glow and fog on the painted street: uint8 RGB."""
    look, street = view.look, view.street
    columns = (np.arange(depth.shape[1], dtype=np.float32) - np.float32(matrix[0, 2])) / np.float32(matrix[0, 0])
    rows = (np.arange(depth.shape[0], dtype=np.float32) - np.float32(matrix[1, 2])) / np.float32(matrix[1, 1])
    to_world = np.linalg.inv(view.from_world(None)).astype(np.float32)
    light = np.broadcast_to(np.array(look.ambient, np.float32), colour.shape).copy()
    if look.lamp_light > 0:
        world = [
            depth * (to_world[i, 0] * columns[None, :] + to_world[i, 1] * rows[:, None] + to_world[i, 2])
            + to_world[i, 3]
            for i in range(3)
        ]
        for lamp in street.lamps:
            square = sum((world[i] - np.float32(lamp[i])) ** 2 for i in range(3))
            light += (look.lamp_light / (1 + square / 14.0))[..., None] * LAMP_COLOUR
    sky = depth > 5000
    shine = glow * np.where(sky, 1.0, look.glow)[..., None]
    lit = colour * light + shine
    if look.lamp_light > 0 or look.rain > 0:
        lit += _bloom(np.where(sky[..., None], 0, glow) * look.glow, colour.shape[1])
        if look.rain > 0 or look.lamp_light > 0.3:
            wet = 0.5 if look.rain > 0 else 0.12
            lit += wet * _reflections(lit, depth, to_world, columns, rows)
    if look.fog_per_m > 0:
        through = np.exp(-look.fog_per_m * np.minimum(depth, 2000))[..., None]
        lit = lit * through + np.array(look.airlight, np.float32) * (1 - through)
    return np.clip(lit, 0, 255).astype(np.uint8)


def _bloom(glow: np.ndarray, width: int) -> np.ndarray:
    """Light that the lens and the damp air spread around what shines."""
    quarter = cv2.resize(glow, (max(1, glow.shape[1] // 4), max(1, glow.shape[0] // 4)), interpolation=cv2.INTER_AREA)
    near = cv2.GaussianBlur(quarter, (0, 0), width / 640 * 1.5)
    wide = cv2.GaussianBlur(quarter, (0, 0), width / 640 * 7.0)
    return cv2.resize(0.45 * near + 0.5 * wide, (glow.shape[1], glow.shape[0]), interpolation=cv2.INTER_LINEAR)


def _reflections(
    lit: np.ndarray, depth: np.ndarray, to_world: np.ndarray, columns: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """What a wet or polished road mirrors: the picture upside down about the horizon, smeared downwards."""
    rises = to_world[1, 0] * columns[None, :] + to_world[1, 1] * rows[:, None] + to_world[1, 2]
    ground_depth = -to_world[1, 3] / np.maximum(rises, 1e-4)
    ground = (rises > 1e-3) & (np.abs(ground_depth - depth) < 0.05 * depth)
    focal = 1 / (rows[1] - rows[0])
    horizon_row = (-to_world[1, 2] / to_world[1, 1] - rows[0]) * focal
    mirrored_rows = np.broadcast_to((2 * horizon_row - np.arange(len(rows)))[:, None], depth.shape)
    mirror_columns = np.broadcast_to(np.arange(len(columns)), depth.shape)
    mirrored = cv2.remap(lit.astype(np.float32), np.ascontiguousarray(mirror_columns, np.float32),
                         np.ascontiguousarray(mirrored_rows, np.float32), cv2.INTER_LINEAR)  # fmt: skip
    smeared = cv2.blur(mirrored, (3, max(3, len(rows) // 14)))
    return smeared * ground[..., None]


# --- what lies in front of the scene: glare and rain ---


def _paint_glares(width: int) -> list[np.ndarray]:
    """Headlight glare from none to blinding, uint8 RGB stamps."""
    stamps = []
    for step in range(13):
        strength = step / 4
        radius = max(4, round(width / 640 * (26 + 40 * strength)))
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32) / radius
        distance = np.hypot(x, y)
        edge = np.clip(1 - distance, 0, 1)
        core = np.exp(-((distance * radius / (width / 640 * (3.0 + 4.5 * strength))) ** 2))
        halo = 0.30 * np.exp(-distance * 3.2) * edge
        streak = 0.35 * np.exp(-np.abs(y) * 26) * edge**2 + 0.18 * np.exp(-np.abs(x) * 30) * edge**2
        level = np.clip((core + (halo + streak) * min(1.0, 0.4 + 0.4 * strength)) * min(1.0, strength * 1.6), 0, 1)
        stamps.append((level[..., None] * np.array([255, 248, 226], np.float32)).astype(np.uint8))
    return stamps


def _add_stamp(picture: np.ndarray, stamp: np.ndarray, x: int, y: int) -> None:
    """Adds a stamp centred at a pixel, with saturation."""
    radius = stamp.shape[0] // 2
    height, width = picture.shape[:2]
    left, top = max(0, x - radius), max(0, y - radius)
    right, bottom = min(width, x + radius + 1), min(height, y + radius + 1)
    if right <= left or bottom <= top:
        return
    part = stamp[top - y + radius : bottom - y + radius, left - x + radius : right - x + radius]
    picture[top:bottom, left:right] = cv2.add(picture[top:bottom, left:right], part)


RAIN_MARGIN_PX = 192


def _paint_rain(seed: int, model: CameraModel) -> np.ndarray:
    """A sheet of streaks larger than the picture, uint8 RGB, to be laid over it at a random place."""
    random = np.random.default_rng([seed, 5])
    height, width = model.height + RAIN_MARGIN_PX, model.width + RAIN_MARGIN_PX
    sheet = np.zeros((height, width), np.uint8)
    scale = model.width / 640
    for _ in range(int(620 * width * height / (scale * scale) / 500_000)):
        x, y = float(random.uniform(0, width)), float(random.uniform(-40, height))
        length = float(random.uniform(10, 34)) * scale
        level = int(random.uniform(18, 62))
        cv2.line(sheet, (round(x), round(y)), (round(x - 0.16 * length), round(y + length)), level, 1, cv2.LINE_AA)
    return cv2.cvtColor(cv2.GaussianBlur(sheet, (3, 3), 0.6), cv2.COLOR_GRAY2RGB)


def _add_rain(picture: np.ndarray, sheet: np.ndarray, seed: int, strength: float) -> None:
    random = np.random.default_rng([seed, 6])
    height, width = picture.shape[:2]
    for _ in range(max(1, round(2 * strength))):
        x, y = random.integers(0, RAIN_MARGIN_PX, 2)
        cv2.add(picture, sheet[y : y + height, x : x + width], dst=picture)
