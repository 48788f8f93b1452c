"""One simulated camera: exposes the street on its own clock, and has the faults that its settings ask for.

Three times belong to a frame. The true middle of its exposure (`true_capture_ns`), what the camera's clock says it was
(`Frame.captured_ns`: off by offset, drift and jitter), and when it reached us (`Frame.arrived_ns`).
"""

from __future__ import annotations

import threading
import time

import cv2
import numpy as np

from pipeline.config import SyntheticSource
from pipeline.errors import SourceEnded, SourceError
from pipeline.frame import Camera, ClockSource, Frame
from pipeline.sources.synthetic import geometry
from pipeline.sources.synthetic.render import Renderer, build_renderer
from pipeline.sources.synthetic.street import LOOKS

LATENCY_NS = {"visible": 9_000_000, "infrared": 14_000_000}  # exposure's middle -> frame in our hands
DRIVER_BUFFERS = 4  # a reader who is later than this many frames loses the oldest
NETD_COUNTS = 4.0  # sigma of the thermal sensor's noise
SHUTTER_JUMP_COUNTS = (15.0, 60.0)  # size of the offset change after a shutter event, either sign
MAX_COUNTS = (1 << 14) - 1
NOISE_MARGIN_PX = 96

_epochs: dict[int, int] = {}
_epochs_lock = threading.Lock()


def _epoch_ns(seed: int) -> int:
    """When the world of this seed began, on the time.monotonic_ns() scale: at the first opening in this process."""
    with _epochs_lock:
        return _epochs.setdefault(seed, time.monotonic_ns())


class SyntheticCamera:
    """One camera of the simulated rig. Cameras of one seed and scene look at the same street at the same moment."""

    def __init__(self, config: SyntheticSource, camera: Camera) -> None:
        self.config = config
        self.camera: Camera = camera
        self.live = config.realtime
        self.period_ns = round(1e9 / config.rate_hz)
        self.clock: ClockSource = "synthetic"
        self._renderer: Renderer | None = None
        self._faults = _Faults(config, camera)
        self._epoch_ns = 0  # of the world
        self._start_ns = 0  # true time of exposure 0
        self._next_index = 0
        self._delivered = 0
        self._last: tuple[int, np.ndarray] | None = None  # (exposure, picture): what a closed shutter repeats

    def open(self) -> None:
        """Starts the exposures. Opening again starts a new run at index 0."""
        self._renderer = self._build()
        self._faults.prepare()
        if self.live:
            self._epoch_ns = _epoch_ns(self.config.seed)
            self._start_ns = time.monotonic_ns()
        self._next_index = self._delivered = 0
        self._last = None

    def grab(self) -> Frame:
        """The next frame; waits for its exposure if the camera is live.

        Raises:
            SourceEnded: after `config.frames` frames.
            SourceError: if the camera is not open.
        """
        if self._renderer is None:
            raise SourceError(f"the synthetic {self.camera} camera is not open: call open() first")
        if self.config.frames is not None and self._delivered >= self.config.frames:
            raise SourceEnded(f"the synthetic {self.camera} camera has given its {self.config.frames} frames")
        index = self._next_kept(self._skip_lost(self._next_index))
        self._next_index = index + 1
        captured_ns = self.reported_capture_ns(index)
        image = self._expose(index)
        if self.live:
            late_ns = max(0, self._faults.jitter_ns(index))
            self._sleep_until(self.true_capture_ns(index) + LATENCY_NS[self.camera] + late_ns)
        self._delivered += 1
        return Frame(
            camera=self.camera,
            image=image,
            captured_ns=captured_ns,
            index=index,
            clock=self.clock,
            clock_error_ns=round(self.config.jitter_ms * 1e6),
            arrived_ns=time.monotonic_ns(),
            bits=14 if self.camera == "infrared" else 8,
        )

    def close(self) -> None:
        """Stops the camera; it can be opened again."""
        self._renderer = None
        self._last = None

    # --- ground truth ---

    def true_capture_ns(self, index: int) -> int:
        """The true middle of an exposure, on the scale of `Frame.captured_ns` without the camera's clock error."""
        # The camera counts its own periods: a clock that runs fast exposes more often.
        return self._start_ns + round(index * self.period_ns / (1 + self.config.drift_ppm * 1e-6))

    def reported_capture_ns(self, index: int) -> int:
        """What the camera's own clock says about an exposure: Frame.captured_ns."""
        since_start_ns = index * self.period_ns  # by the camera's clock, so the drift is in it
        offset_ns = round(self.config.time_offset_ms * 1e6)
        return self._start_ns + since_start_ns + offset_ns + self._faults.jitter_ns(index)

    def world_s(self, true_ns: int) -> float:
        """Seconds since the world began."""
        return (true_ns - self._epoch_ns) / 1e9

    def clean_image(self, true_ns: int, hide: tuple[str, ...] = ()) -> np.ndarray:
        """What an ideal camera would have seen: no noise, stripes, dead pixels, fog, rain or glare; the light stays.

        Args:
            true_ns: a true time, as from `true_capture_ns`.
            hide: names of moving things to leave out.

        Returns:
            Visible uint8 RGB (H, W, 3), or infrared uint16 counts (H, W).
        """
        picture = self._build(clean=True).draw(self.world_s(true_ns), hide)
        return picture if self.camera == "visible" else _to_counts(picture)

    def coverage(self, name: str, true_ns: int, occluded: bool = True) -> np.ndarray:
        """How much of each pixel a moving thing covers at a true time: float32 (H, W) in [0, 1].

        Args:
            occluded: take off what other things and the street hide of it.
        """
        return (self._renderer or self._build()).coverage(name, self.world_s(true_ns), occluded)

    def known_points(self, true_ns: int) -> dict[str, np.ndarray]:
        """Points of all moving things at a true time, by name: (N, 3) metres, in visible coordinates.

        People: head, chest, feet. Cars: the two lamps and the number plate. Not all need be in a picture.
        """
        renderer = self._renderer or self._build()
        world_s = self.world_s(true_ns)
        from_world = geometry.visible_from_world(world_s)
        return {
            thing.name: geometry.transform_points(from_world, thing.points) for thing in renderer.street.things(world_s)
        }

    def frozen_from(self, index: int) -> int | None:
        """The exposure that a closed shutter repeats at `index`; None: the shutter is open."""
        return self._faults.frozen_from(index, self.period_ns)

    # --- the inside ---

    def _build(self, clean: bool = False) -> Renderer:
        config = self.config
        return build_renderer(self.camera, config.width, config.height, config.seed, config.scene, clean)

    def _skip_lost(self, index: int) -> int:
        """The oldest exposure that the driver still holds for a reader who came late."""
        if not self.live:
            return index
        since_ns = time.monotonic_ns() - LATENCY_NS[self.camera] - self.true_capture_ns(index)
        behind = since_ns // self.period_ns
        return index if behind <= DRIVER_BUFFERS else index + int(behind)

    def _next_kept(self, index: int) -> int:
        while self._faults.is_dropped(index):
            index += 1
        return index

    def _expose(self, index: int) -> np.ndarray:
        frozen = self.frozen_from(index)
        exposure = index if frozen is None else frozen
        if self._last is None or self._last[0] != exposure:
            self._last = exposure, self._render(exposure)
        return self._last[1].copy()

    def _render(self, exposure: int) -> np.ndarray:
        assert self._renderer is not None
        world_s = self.world_s(self.true_capture_ns(exposure))
        picture = self._renderer.draw(world_s, rain_seed=self.config.seed * 1_000_003 + exposure)
        return self._faults.sense(picture, exposure, self.period_ns, self._renderer.look.noise_levels)

    def _sleep_until(self, when_ns: int) -> None:
        wait_ns = when_ns - time.monotonic_ns()
        if wait_ns > 0:
            time.sleep(wait_ns / 1e9)


class _Faults:
    """Noise, stripes, dead pixels, shutter, drops and jitter of one camera, each from seed and frame index alone."""

    def __init__(self, config: SyntheticSource, camera: Camera) -> None:
        self._config = config
        self._infrared = camera == "infrared"
        self._key = [config.seed & 0xFFFFFFFF, 100 if self._infrared else 200]
        self._noise: list[np.ndarray] = []
        self._stripes: np.ndarray | None = None
        self._dead: tuple[np.ndarray, np.ndarray] | None = None

    def prepare(self) -> None:
        """Makes the noise sheets and the fixed pattern, once."""
        if self._noise:
            return
        config = self._config
        random = self._random(0)
        shape = config.height + NOISE_MARGIN_PX, config.width + NOISE_MARGIN_PX
        if not self._infrared:
            self._noise = _signed_sheets(random, (*shape, 3), config.scene)
            return
        self._noise = [random.standard_normal(shape, dtype=np.float32) * np.float32(NETD_COUNTS)]
        if config.stripe_counts > 0:
            self._stripes = (random.standard_normal(config.width) * config.stripe_counts).astype(np.float32)[None, :]
        if config.dead_pixels > 0:
            count = min(config.dead_pixels, config.width * config.height)
            where = random.choice(config.width * config.height, count, replace=False)
            values = random.choice(np.array([0, MAX_COUNTS], np.uint16), count)
            self._dead = where, values

    def sense(self, picture: np.ndarray, exposure: int, period_ns: int, noise_levels: float) -> np.ndarray:
        """The sensor's reading of a picture: uint8 RGB, or uint16 counts."""
        random = self._random(1, exposure)
        y, x = random.integers(0, NOISE_MARGIN_PX, 2)
        height, width = picture.shape[:2]
        sheets = [sheet[y : y + height, x : x + width] for sheet in self._noise]
        if not self._infrared:
            brighter, darker = sheets
            cv2.add(picture, brighter, dst=picture)
            cv2.subtract(picture, darker, dst=picture)
            return picture
        picture += sheets[0]
        if self._stripes is not None:
            picture += self._stripes
        picture += np.float32(self.shutter_offset_counts(exposure, period_ns))
        counts = _to_counts(picture)
        if self._dead is not None:
            counts.reshape(-1)[self._dead[0]] = self._dead[1]
        return counts

    def is_dropped(self, index: int) -> bool:
        return self._config.drop_share > 0 and index > 0 and self._random(2, index).random() < self._config.drop_share

    def jitter_ns(self, index: int) -> int:
        """Gaussian error of the time stamp, within three sigma."""
        if self._config.jitter_ms == 0:
            return 0
        sigmas = float(np.clip(self._random(3, index).standard_normal(), -3, 3))
        return round(sigmas * self._config.jitter_ms * 1e6)

    def frozen_from(self, index: int, period_ns: int) -> int | None:
        event = self._event(index, period_ns)
        if event == 0:
            return None
        assert self._config.shutter_every_s is not None
        closed_s = event * self._config.shutter_every_s
        if index * period_ns / 1e9 >= closed_s + self._config.shutter_s:
            return None
        last_open = int(np.ceil(closed_s * 1e9 / period_ns - 1e-6)) - 1
        earlier = self.frozen_from(last_open, period_ns) if last_open > 0 else None
        return earlier if earlier is not None else max(0, last_open)

    def shutter_offset_counts(self, index: int, period_ns: int) -> float:
        """What the last shutter event left behind: a small step of all counts."""
        event = self._event(index, period_ns)
        if event == 0:
            return 0.0
        random = self._random(4, event)
        return float(random.choice([-1.0, 1.0]) * random.uniform(*SHUTTER_JUMP_COUNTS))

    def _event(self, index: int, period_ns: int) -> int:
        """How often the shutter has closed until this exposure."""
        every_s = self._config.shutter_every_s
        if every_s is None or not self._infrared:
            return 0
        return int(index * period_ns / 1e9 / every_s + 1e-9)

    def _random(self, what: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng([*self._key, what, index])


def _signed_sheets(random: np.random.Generator, shape: tuple[int, int, int], scene: str) -> list[np.ndarray]:
    """Noise as two uint8 sheets, what it adds and what it takes: 8-bit sums are ten times as fast as float."""
    noise = np.rint(random.standard_normal(shape, dtype=np.float32) * LOOKS[scene].noise_levels)
    return [np.clip(noise, 0, 255).astype(np.uint8), np.clip(-noise, 0, 255).astype(np.uint8)]


def _to_counts(picture: np.ndarray) -> np.ndarray:
    """Float counts -> uint16, 14 bits."""
    return np.clip(picture + np.float32(0.5), 0, MAX_COUNTS).astype(np.uint16)
