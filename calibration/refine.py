"""Follows the residual transform of a rig over time: a mount that creeps or is knocked does not blur the fusion.

One scene is a poor witness: it is off by about a pixel, some scenes by five. So a Kalman filter averages over scenes,
refuses what does not fit (the gate), and starts again when four scenes agree on something else (a knock). Scenes
without information leave everything as it is. What comes out is bounded, and is nothing at all as long as the offline
calibration is as good an explanation as the correction.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from calibration.residual import (
    NATURAL_WIDTH_PX,
    NEW_SCENE_LEVELS,
    State,
    Survey,
    displacement_px,
    grid_sigma_px,
    judge,
    moved_probability,
    parameters_of,
    scene_covariance,
    scene_difference,
    similarity,
)

Outcome = Literal["collected", "used", "gated", "jumped", "out_of_bounds", "no_information"]

START_SIGMA = (2.0, 2.0, 0.003, 0.001)  # pixels, pixels, radians, logarithm of the scale, 640 pixels wide
STEP_SIGMA = (0.12, 0.12, 0.0004, 0.0001)  # that a mount creeps from one keyframe to the next
HURRY = 5.0  # times the creep, while the last innovations all point one way
GATE = 13.3  # squared distance in standard deviations: 99 % of what a filter of four parameters expects
JUMP_GATE = 20.0
AGREEMENT = 9.5  # of each of the scenes with their middle: 95 %
FEWEST_SCENES = 5  # whose middle the filter starts from
# That agree before the filter starts again where they are. Three do so by chance now and then: of 100 keyframes of
# aligned cameras at night, in one run of four.
JUMP_SCENES = 4
BIAS_SCENES = 5
BIAS_GATE = 13.0
ADAPT = 0.1  # share of the newest scene in how large innovations are against what was expected
QUIETEST = 0.35  # a rig whose scenes agree better than most is believed more readily, down to this variance
SAME_SCENE = 6.0  # times the variance: another look at the same scene tells little that is new
HEALTH_SCENES = 5
COLD_FACTOR = 4.0  # rigs that nobody calibrated may be corrected by so much more
MAX_ROLL = float(np.radians(1.0))
MAX_LOG_SCALE = 0.01


@dataclass(frozen=True)
class Bounds:
    """How far a correction may go; the shift for a picture 640 pixels wide."""

    shift_px: float = 12.0
    roll: float = MAX_ROLL
    log_scale: float = MAX_LOG_SCALE

    def widened(self) -> Bounds:
        """For a rig without a calibration."""
        return Bounds(self.shift_px * COLD_FACTOR, self.roll * COLD_FACTOR, self.log_scale * COLD_FACTOR)

    def hold(self, parameters: np.ndarray, size: tuple[int, int]) -> bool:
        shift_px = float(np.hypot(*parameters[:2])) * NATURAL_WIDTH_PX / size[0]
        return shift_px <= self.shift_px and abs(parameters[2]) <= self.roll and abs(parameters[3]) <= self.log_scale


@dataclass(frozen=True, eq=False)
class _Witness:
    parameters: np.ndarray  # (4,) of the whole residual transform, correction included
    covariance: np.ndarray
    innovation: np.ndarray


@dataclass(eq=False)
class Refiner:
    """The filter of one rig. It owns no thread and no clock: give it surveys, read `correction`.

    Args:
        size: (width, height) of the visible picture.
        bounds: of the correction.
    """

    size: tuple[int, int]
    bounds: Bounds = field(default_factory=Bounds)

    def __post_init__(self) -> None:
        self.parameters = np.zeros(4)
        self.covariance = np.diag(self._natural(START_SIGMA) ** 2)
        self.counts: Counter[Outcome] = Counter()
        self._witnesses: deque[_Witness] = deque(maxlen=max(FEWEST_SCENES, BIAS_SCENES, HEALTH_SCENES))
        self._thumbnail: np.ndarray | None = None
        self._started = False
        self._loudness = 1.0  # of the innovations' variance, against what was expected
        self._last_information = 0  # keyframes ago
        self._strays = 0  # out of bounds, in a row

    @property
    def keyframes(self) -> int:
        return sum(self.counts.values())

    @property
    def sigma_px(self) -> float:
        """Expected error of the filtered transform, over the picture."""
        return grid_sigma_px(self.covariance, self.size)

    @property
    def correction(self) -> np.ndarray:
        """(4,) parameters to correct by: what the filter found, as far as it is more than its own error."""
        return self.parameters * moved_probability(self.parameters, self.sigma_px, self.size)

    def verdict(self, shown: np.ndarray) -> tuple[State, float]:
        """State and health of pictures that are corrected by the parameters `shown`."""
        if self._strays >= JUMP_SCENES:
            return "lost", 0.0
        witnesses = list(self._witnesses)  # a copy in one step: another thread may add the next keyframe meanwhile
        if not witnesses or self._last_information >= HEALTH_SCENES:
            return "no_information", 0.0
        recent = [one.parameters for one in witnesses[-HEALTH_SCENES:]]
        seen = similarity(np.median(recent, axis=0), self.size)
        left = seen @ np.linalg.inv(similarity(shown, self.size))
        distance_px = displacement_px(left, self.size)
        # Few scenes are off by themselves: what they cannot know is not held against the rig.
        sigma_px = grid_sigma_px(scene_covariance(self.size), self.size) / np.sqrt(len(recent))
        return judge(distance_px * moved_probability(parameters_of(left, self.size), sigma_px, self.size), self.size)

    def add(self, survey: Survey, shown: np.ndarray) -> Outcome:
        """Takes one keyframe, whose infrared picture was corrected by the parameters `shown`."""
        outcome = self._add(survey, shown)
        self.counts[outcome] += 1
        return outcome

    def _add(self, survey: Survey, shown: np.ndarray) -> Outcome:
        step = np.diag(self._natural(STEP_SIGMA) ** 2)
        if not survey.residual.informative:
            self._last_information += 1
            self.covariance = self.covariance + step
            return "no_information"
        self._last_information = 0
        found = parameters_of(survey.residual.matrix @ similarity(shown, self.size), self.size)
        if not self.bounds.hold(found, self.size):
            self._strays += 1
            return "out_of_bounds"
        self._strays = 0
        new_scene = self._is_new(survey.thumbnail)
        noise = self._loudness * scene_covariance(self.size) + 2.0 * survey.residual.covariance
        self._witnesses.append(_Witness(found, noise, found - self.parameters))
        if not self._started:
            return self._collect()
        if self._knocked():
            self._start_again()
            return "jumped"
        self.covariance = self.covariance + step * (HURRY**2 if self._biased() else 1.0)
        distance = _squared(found - self.parameters, self.covariance + noise)
        if new_scene:
            # Bounded, so that one stray scene does not count for many.
            expected = min(distance, GATE) / 4
            self._loudness = float(np.clip(self._loudness * (1 + ADAPT * (expected - 1)), QUIETEST, 1.0))
        if distance > GATE:
            return "gated"
        self._update(found, noise if new_scene else noise * SAME_SCENE)
        return "used"

    def _collect(self) -> Outcome:
        """The first scenes: one of them may be far off, so their middle is what the filter starts from."""
        if len(self._witnesses) < FEWEST_SCENES:
            return "collected"
        self._started = True
        self._update(np.median([one.parameters for one in self._witnesses], axis=0), self._witnesses[-1].covariance)
        return "used"

    def _update(self, found: np.ndarray, noise: np.ndarray) -> None:
        innovation = found - self.parameters
        total = self.covariance + noise
        gain = np.linalg.solve(total, self.covariance).T
        self.parameters = self.parameters + gain @ innovation
        rest = np.eye(4) - gain
        # Joseph's form: stays symmetric and positive whatever the rounding.
        self.covariance = rest @ self.covariance @ rest.T + gain @ noise @ gain.T

    def _knocked(self) -> bool:
        """Whether the last scenes agree with one another, and not with the filter."""
        last = list(self._witnesses)[-JUMP_SCENES:]
        if len(last) < JUMP_SCENES:
            return False
        centre = np.median([one.parameters for one in last], axis=0)
        if any(_squared(one.parameters - centre, one.covariance) > AGREEMENT for one in last):
            return False
        noise = last[0].covariance / JUMP_SCENES
        return _squared(centre - self.parameters, self.covariance + noise) > JUMP_GATE

    def _start_again(self) -> None:
        last = list(self._witnesses)[-JUMP_SCENES:]
        self.parameters = np.mean([one.parameters for one in last], axis=0)
        self.covariance = last[-1].covariance / JUMP_SCENES
        self._witnesses.clear()
        self._witnesses.extend(last)

    def _biased(self) -> bool:
        """Whether the last innovations point one way: the mount creeps faster than expected."""
        last = list(self._witnesses)[-BIAS_SCENES:]
        if len(last) < BIAS_SCENES:
            return False
        mean = np.mean([one.innovation for one in last], axis=0)
        return _squared(mean, self.covariance + last[-1].covariance / BIAS_SCENES) > BIAS_GATE

    def _is_new(self, thumbnail: np.ndarray) -> bool:
        new = self._thumbnail is None or scene_difference(thumbnail, self._thumbnail) > NEW_SCENE_LEVELS
        if new:
            self._thumbnail = thumbnail
        return new

    def _natural(self, sigma: tuple[float, float, float, float]) -> np.ndarray:
        wide = self.size[0] / NATURAL_WIDTH_PX
        return np.array(sigma) * (wide, wide, 1, 1)


def _squared(difference: np.ndarray, covariance: np.ndarray) -> float:
    """Squared distance in standard deviations (Mahalanobis)."""
    return float(difference @ np.linalg.solve(covariance, difference))
