"""Fuse: the aligned pair and the priors in, one restored picture out.

The priors describe the scene as a whole and vary slowly. So they are estimated every few frames, smoothed over time
(which also removes flicker), and handed to the network as inputs: the per-frame path never waits for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

import cv2
import numpy as np

from calibration.warp import Maps
from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS, FusionEngine, Priors, RegisteringEngine
from pipeline.background import Workers, give_way
from pipeline.config import PriorsConfig, SteadyConfig
from pipeline.frame import AlignedPair, FusedFrame
from pipeline.handover import Latest
from pipeline.steady import Steady

log = logging.getLogger("dspfusion.fuse")

THUMBNAIL = (16, 12)  # so coarse that what moves in a scene does not make it another one


class PriorKeeper:
    """Holds the current priors and knows when they are due.

    In step (replay) the estimate is made in the call, at fixed frames, so that a run can be repeated bit by bit.
    In the background (live) one thread estimates and the frames go on with the priors there are.
    """

    def __init__(self, engine: FusionEngine, config: PriorsConfig, background: bool) -> None:
        self._engine = engine
        self._config = config
        self._current: Priors | None = None
        self._estimated_at = 0
        self._asked_at = 0
        self._thumbnail: np.ndarray | None = None
        self._presence: tuple[bool, bool] | None = None
        self._scene = self._estimated_scene = 0  # counted up at every change of the scene
        self.updates = 0
        self.failures = 0
        self.first_failure: str | None = None
        self._lock = threading.Lock()
        self._slot: Latest[tuple[np.ndarray, np.ndarray, int, int]] = Latest()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._work, name="priors", daemon=True)
            self._thread.start()

    def priors(
        self,
        infrared: np.ndarray,
        visible: np.ndarray,
        presence: tuple[bool, bool],
        index: int,
        warp: Maps | None = None,
    ) -> Priors:
        """The priors to fuse frame `index` with.

        Args:
            infrared: uint8 (H, W).
            visible: uint8 RGB (H, W, 3).
            presence: which camera (infrared, visible) is live.
            index: of the frame.
            warp: that `infrared` still needs.
        """
        # Means of areas: single pixels of a scene with texture change with every movement of the camera.
        thumbnail = np.dstack([cv2.resize(one, THUMBNAIL, interpolation=cv2.INTER_AREA) for one in (infrared, visible)])
        new_scene = presence != self._presence or self._differs(thumbnail)
        first = self._current is None
        if first or new_scene or index - self._asked_at >= self._config.every_frames:
            self._thumbnail, self._presence, self._asked_at = thumbnail, presence, index
            self._scene += new_scene
            if warp is not None:
                infrared = warp.remap(infrared)
            if first or self._thread is None:
                self._estimate(infrared, visible, self._scene, index)
            else:
                self._slot.put((infrared, visible, self._scene, index))
        with self._lock:
            assert self._current is not None
            return self._current

    def age_frames(self, index: int) -> int:
        """How many frames ago the newest estimate was made."""
        return index - self._estimated_at

    def close(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _differs(self, thumbnail: np.ndarray) -> bool:
        if self._thumbnail is None:
            return True
        return float(cv2.absdiff(thumbnail, self._thumbnail).mean()) > self._config.scene_change

    def _estimate(self, infrared: np.ndarray, visible: np.ndarray, scene: int, index: int) -> None:
        newer = self._engine.estimate_priors(infrared, visible)
        # After a cut the old priors are wrong rather than noisy: they are replaced, not blended. What counts is the
        # scene that they are of: the request that was made at the cut may have been pushed out, or have failed.
        share = self._config.smoothing if scene == self._estimated_scene else 1.0
        with self._lock:
            self._current = newer if self._current is None else self._current.blend(newer, share)
            self._estimated_at, self._estimated_scene = index, scene
            self.updates += 1

    def _work(self) -> None:
        give_way()
        while not self._stopping.is_set():
            try:
                work = self._slot.take(timeout_s=0.2)
            except TimeoutError:
                continue
            try:
                self._estimate(*work)
            except Exception as error:
                self.failures += 1
                if self.first_failure is None:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    self.first_failure = f"priors could not be estimated ({reason}): the frames go on with older ones"
                    log.warning("%s", self.first_failure)


@dataclass
class Begun:
    """A pair on its way through the network."""

    aligned: AlignedPair
    infrared: np.ndarray  # uint8 (H, W): black where the camera is missing
    visible: np.ndarray  # uint8 RGB (H, W, 3)
    warp: Maps | None  # that `infrared` still needs: the engine's part
    priors: Priors
    index: int
    priors_age_frames: int
    started: float
    network: Future[np.ndarray] | None = None  # what the network makes of it; None: computed when it is finished
    image: Future[np.ndarray] | None = None  # the finished picture

    @property
    def presence(self) -> tuple[bool, bool]:
        """Which cameras it shows: infrared, visible."""
        return self.aligned.infrared is not None, self.aligned.visible is not None

    @property
    def computed(self) -> bool:
        """Whether the network has done its part."""
        return self.network is None or self.network.done()

    @property
    def done(self) -> bool:
        return self.image is None or self.image.done()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is done within this time."""
        return self.image is None or bool(wait([self.image], timeout_s).done)


class Fade:
    """Outside the infrared camera's view there is nothing to fuse: the visible picture fades in.

    Where the weight is 1 nothing changes, which is most of the picture, and is left out.
    """

    def __init__(self) -> None:
        self._weight: np.ndarray | None = None
        self._borders: list[tuple[slice, slice, np.ndarray]] = []  # where, and the weight of the visible picture there

    def __call__(self, image: np.ndarray, visible: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The faded picture: uint8 RGB (H, W, 3) both, weight of `image` float32 (H, W) in [0, 1]."""
        if weight is not self._weight:
            self._weight = weight
            self._borders = [(rows, columns, 1 - weight[rows, columns]) for rows, columns in borders_of(weight == 1)]
        if not self._borders:
            return image
        faded = image.copy()
        for rows, columns, share in self._borders:
            at = rows, columns
            faded[at] = cv2.blendLinear(image[at], visible[at], weight[at], share)
        return faded


def borders_of(inside: np.ndarray) -> list[tuple[slice, slice]]:
    """Rectangles that cover whatever is not `inside`, bool (H, W): the four sides around a full one, or all."""
    height, width = inside.shape
    rows = _longest_run(np.all(inside[:, width // 4 : -(width // 4)], axis=1))
    columns = _longest_run(np.all(inside[rows], axis=0))
    if rows.start == rows.stop or columns.start == columns.stop:
        return [(slice(0, height), slice(0, width))]
    sides = [
        (slice(0, rows.start), slice(0, width)),
        (slice(rows.stop, height), slice(0, width)),
        (rows, slice(0, columns.start)),
        (rows, slice(columns.stop, width)),
    ]
    return [(rows, columns) for rows, columns in sides if rows.start < rows.stop and columns.start < columns.stop]


def _longest_run(flags: np.ndarray) -> slice:
    """Where the longest run of true flags lies; empty where there is none."""
    ends = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    runs = [slice(int(start), int(stop)) for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    return max(runs, key=lambda run: run.stop - run.start, default=slice(0, 0))


class Fuse:
    """One aligned pair in, one fused frame out.

    Args:
        engine: runs the network.
        background: the priors are estimated in a thread of their own, and so are the pictures of `begin`: the network
            has as many threads as it takes pictures at once, and one more finishes them in their order.
        on_done: called by such a thread whenever the network, or a picture, is done.
        first_index: the number of the first frame.
    """

    def __init__(
        self,
        engine: FusionEngine,
        config: PriorsConfig,
        background: bool,
        steady: SteadyConfig | None = None,
        on_done: Callable[[], None] = lambda: None,
        first_index: int = 0,
    ) -> None:
        self._engine = engine
        self._registering = engine if isinstance(engine, RegisteringEngine) else None
        self.keeper = PriorKeeper(engine, config, background)
        self._fade = Fade()
        self._steady = Steady(steady or SteadyConfig(enabled=False))
        self._workers = Workers("fuse", engine.description.at_once) if background else None
        self._finisher = Workers("finish", 1) if background else None
        self._on_done = on_done
        self.index = first_index  # of the next frame
        self.psnr_db: float | None = None  # of the engine's picture of the first pair of a size against PyTorch's
        self._proven: set[tuple[int, ...]] = set()
        self._served: set[tuple[object, ...]] = set()

    def __call__(self, aligned: AlignedPair) -> FusedFrame:
        """Fuses one pair. A missing camera is black to the network, which was trained to expect that.

        Raises:
            EngineError: the engine cannot serve, or its first picture is not what PyTorch makes of that pair.
        """
        return self.finish(self._begin(aligned))

    def begin(self, aligned: AlignedPair) -> Begun:
        """Hands a pair to a thread of the network and returns at once; `finish` is called in the same order."""
        begun = self._begin(aligned)
        if self._workers is not None and self._finisher is not None:
            begun.network = self._workers.submit(self._computed, begun)
            begun.image = self._finisher.submit(self._picture, begun)
            for future in (begun.network, begun.image):
                future.add_done_callback(lambda _: self._on_done())
        return begun

    def finish(self, begun: Begun) -> FusedFrame:
        """Waits for the picture and makes the frame of it; raises what the network raised."""
        image, presence = begun.image.result() if begun.image else self._picture(begun), begun.presence
        return FusedFrame(
            image=image,
            aligned=begun.aligned,
            mode=begun.aligned.pair.mode,
            index=begun.index,
            degradation=readout(begun.priors, presence),
            degradation_strength=strengths(begun.priors, presence),
            priors_age_frames=begun.priors_age_frames,
            latency_ms={"fuse": (time.perf_counter() - begun.started) * 1e3},
        )

    def served(self, begun: Begun) -> bool:
        """Whether the engine has made such a picture before: the first one of a size is compiled for, and proven."""
        return _kind(begun) in self._served

    def close(self) -> None:
        self.keeper.close()
        for workers in (self._workers, self._finisher):
            if workers is not None:
                workers.close()

    def _computed(self, begun: Begun) -> np.ndarray:
        """What the network makes of a pair."""
        if begun.warp is None or self._registering is None:
            return self._engine.fuse(begun.infrared, begun.visible, begun.priors)
        return self._registering.fuse_unregistered(begun.infrared, begun.visible, begun.priors, begun.warp)

    def _picture(self, begun: Begun) -> np.ndarray:
        """What is published of a pair; called in the order of the pairs."""
        image = begun.network.result() if begun.network else self._computed(begun)
        if all(begun.presence):
            self._prove(begun, image)
            if begun.aligned.weight is not None:
                image = self._fade(image, begun.visible, begun.aligned.weight)
        self._served.add(_kind(begun))
        return self._steady(image, begun.presence)

    def _prove(self, begun: Begun, image: np.ndarray) -> None:
        """Has the engine compare its first picture of a size with PyTorch's."""
        infrared, visible, size = begun.infrared, begun.visible, begun.visible.shape[:2]
        if size in self._proven:
            return
        if begun.warp is not None:  # devices interpolate finer than OpenCV: that is no fault of the network's
            infrared = begun.warp.remap(infrared)
            image = self._engine.fuse(infrared, visible, begun.priors)
        self.psnr_db = self._engine.prove(infrared, visible, begun.priors, image)
        self._proven.add(size)

    def _begin(self, aligned: AlignedPair) -> Begun:
        started = time.perf_counter()
        warp = aligned.warp if self._registering is not None else None
        infrared, visible = aligned.infrared if warp is not None else aligned.registered(), aligned.visible
        presence = (infrared is not None, visible is not None)
        if infrared is None:
            assert visible is not None
            infrared = np.zeros(visible.shape[:2], np.uint8)
        if visible is None:
            visible = np.zeros((*infrared.shape, 3), np.uint8)
        index = self.index
        priors = self.keeper.priors(infrared, visible, presence, index, warp)
        self.index += 1
        return Begun(aligned, infrared, visible, warp, priors, index, self.keeper.age_frames(index), started)


def _kind(begun: Begun) -> tuple[object, ...]:
    return begun.infrared.shape, begun.visible.shape, begun.presence


def readout(priors: Priors, presence: tuple[bool, bool]) -> dict[str, dict[str, float]]:
    """What the model perceives as degraded: for each camera that is live, the probability of each kind."""
    perceived: dict[str, dict[str, float]] = {}
    if presence[0]:
        perceived["infrared"] = _named(INFRARED_DEGRADATIONS, priors.infrared_probabilities)
    if presence[1]:
        perceived["visible"] = _named(VISIBLE_DEGRADATIONS, priors.visible_probabilities)
    return perceived


def strengths(priors: Priors, presence: tuple[bool, bool]) -> dict[str, float]:
    """How strong the perceived degradation is, 0 to 1, for each camera that is live."""
    found = {"infrared": priors.infrared_strength, "visible": priors.visible_strength}
    return {name: round(float(found[name]), 3) for name, there in zip(found, presence, strict=True) if there}


def _named(kinds: tuple[str, ...], probabilities: np.ndarray) -> dict[str, float]:
    return {kind: round(float(p), 3) for kind, p in zip(kinds, probabilities, strict=True)}
