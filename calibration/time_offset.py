"""How far apart two cameras' clocks are, and how fast they drift apart, from the motion that both cameras share.

Both are on one mount: when it turns, both pictures move, at the same true moment. So the offset is the lag at which the
infrared camera's motion is best explained by the visible one's (a 2x2 matrix stands between them: other lenses, a roll,
one of them upside down). A search over all lags finds the neighbourhood, Gauss-Newton the offset and the drift, and
blocks of the recording that are left out in turn tell how certain both are.

    infrared time = visible time + offset + drift * visible time

What this offset contains is the whole difference between the two capture times as they are told: clocks, half an
exposure, the 10 ms that a microbolometer takes to warm up. That is what pairing wants to have taken off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.rig import CalibrationError

MAX_OFFSET_S = 2.0  # searched to either side, by default
SMOOTH_S = 0.06  # of the speed; hand tremor of 3 Hz stays
GAP_S = 0.4  # a hole in a recording that is not bridged...
GAP_PERIODS = 3.5  # ...at this camera's rate
LEAST_SHARED_S = 4.0  # of overlapping motion
LEAST_CORRELATION = 0.6
LEAST_MARGIN = 0.12  # over the second-best lag
LARGEST_SIGMA_MS = 10.0
LEAST_SPEED_PX_S = 0.15  # of the small picture, root mean square: below it the mount stands still
DRIFT_PRIOR_PPM = 80.0  # two crystals; keeps short recordings from inventing a drift
BLOCKS = 10
CLEARLY_WORSE = 2.0  # or a rival that leaves so many times as much motion unexplained, where the best one leaves little
LARGEST_ROLL_DEG = 35.0  # between both cameras' pictures
RIVAL_S = 0.25  # so far from the best lag another one counts as a rival


class NoSharedMotion(CalibrationError):
    """Two recordings from which no time offset can be told; `reason` is one word for reports."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class MotionSignal:
    """The path of one camera's view.

    Args:
        times_s: (N,) capture times by this camera's own clock, rising.
        path_px: (N, 2) cumulative shift of the scene, in any unit.
        broken: (N,) bool: nothing ties this sample to the one before. None: the path is whole.
    """

    times_s: np.ndarray
    path_px: np.ndarray
    broken: np.ndarray | None = None

    def __post_init__(self) -> None:
        times = np.asarray(self.times_s, np.float64)
        path = np.asarray(self.path_px, np.float64)
        broken = np.zeros(len(times), bool) if self.broken is None else np.asarray(self.broken, bool)
        if times.ndim != 1 or path.shape != (len(times), 2) or broken.shape != times.shape:
            shapes = f"{times.shape}, {path.shape}, {broken.shape}"
            raise CalibrationError(f"a motion signal has N times, N x 2 places and N flags, got {shapes}")
        if not (np.isfinite(times).all() and np.isfinite(path).all()):
            raise CalibrationError("a motion signal has values that are not finite: measure it again")
        if len(times) > 1 and np.diff(times).min() <= 0:
            raise CalibrationError("the times of a motion signal rise from sample to sample: sort it first")
        for name, value in (("times_s", times), ("path_px", path), ("broken", broken)):
            object.__setattr__(self, name, value)

    @property
    def period_s(self) -> float:
        return float(np.median(np.diff(self.times_s))) if len(self.times_s) > 1 else 0.0


@dataclass(frozen=True)
class TimeOffset:
    """What the motion of two cameras tells about their clocks. All errors are one sigma."""

    offset_ms: float  # infrared time minus visible time of the same moment, at visible time 0
    offset_sigma_ms: float
    drift_ppm: float  # by which the infrared clock gains on the visible one
    drift_sigma_ppm: float
    middle_s: float  # visible time at which the offset is best known...
    middle_offset_ms: float  # ...and what it is there
    middle_sigma_ms: float
    correlation: float  # of the two motions at the best lag, 0 to 1
    rival_correlation: float  # at the best lag elsewhere
    shared_s: float  # seconds of motion that both have

    @property
    def confidence(self) -> float:
        """0 to 1: how clearly one lag stands out, and how sharply it is known."""
        left, rival_left = 1 - self.correlation**2, 1 - self.rival_correlation**2
        clear = np.clip((rival_left / max(left, 1e-6) - 1) / 2, 0, 1)
        strong = np.clip((self.correlation - 0.4) / 0.5, 0, 1)
        sharp = 1 / (1 + (self.middle_sigma_ms / LARGEST_SIGMA_MS) ** 2)
        return round(float(min(clear, strong) * sharp), 3)

    def at(self, visible_s: float) -> float:
        """The offset in milliseconds at a visible time."""
        return self.middle_offset_ms + self.drift_ppm * 1e-3 * (visible_s - self.middle_s)

    def for_calibration(self) -> dict[str, float]:
        """What a calibration file keeps; a drift that may as well be none is left out, and the offset then is that of
        the middle."""
        certain = abs(self.drift_ppm) >= 2 * self.drift_sigma_ppm
        return {
            "offset_ms": round(self.offset_ms if certain else self.middle_offset_ms, 3),
            "drift_ppm": round(self.drift_ppm, 2) if certain else 0.0,
            "sigma_ms": round(self.offset_sigma_ms if certain else self.middle_sigma_ms, 3),
            "confidence": self.confidence,
        }


def estimate_offset(
    infrared: MotionSignal, visible: MotionSignal, max_offset_s: float = MAX_OFFSET_S, about_ms: float = 0.0
) -> TimeOffset:
    """Finds the offset and the drift between two cameras.

    Args:
        infrared, visible: their motion, each by its own clock.
        max_offset_s: how far from `about_ms` the offset is searched for.
        about_ms: where it is expected.

    Raises:
        NoSharedMotion: too short, no motion, motions that differ, or several offsets that fit about equally well.
    """
    step_s = float(np.clip(min(infrared.period_s, visible.period_s) / 2, 0.004, 0.02))
    thermal, colour = _speed(infrared, step_s, "infrared"), _speed(visible, step_s, "visible")
    about_s = about_ms / 1e3
    _refuse_stillness(thermal, colour, about_s, max_offset_s)
    reach = int(np.ceil(max_offset_s / step_s))
    lags = round(about_s / step_s) + np.arange(-reach, reach + 1)
    least = round(LEAST_SHARED_S / step_s)
    products = np.array([_product(*_shifted(thermal, colour, int(lag)), least) for lag in lags])
    if not products.any():
        raise NoSharedMotion("too_short", _TOO_SHORT)
    scores = _upright(products)
    if scores.max() < LEAST_CORRELATION:  # is one camera mounted upside down?
        scores = _upright(-products)
    best = int(np.argmax(scores))
    lags_s = lags * step_s
    rivals = _peaks(scores, np.abs(lags_s - lags_s[best]) > RIVAL_S)
    rival = float(scores[rivals].max(initial=0.0))
    _refuse_doubt(float(scores[best]), rival, lags_s[best] - about_s, max_offset_s)
    return _refined(thermal, colour, float(lags_s[best]), rival)


_TOO_SHORT = (
    f"the recordings share less than {LEAST_SHARED_S:g} s of unbroken motion: "
    "record 30 s while the rig turns to and fro"
)


@dataclass(frozen=True)
class _Speed:
    """Smoothed speed on an even grid of times; NaN where it is not known."""

    start_s: float
    step_s: float
    values: np.ndarray  # (M, 2)

    @property
    def times_s(self) -> np.ndarray:
        return self.start_s + self.step_s * np.arange(len(self.values))

    @property
    def root_mean_square(self) -> float:
        known = self.values[np.isfinite(self.values[:, 0])]
        return float(np.sqrt(np.mean(known**2))) if len(known) else 0.0

    def at(self, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values, slopes), each (N, 2), by a cubic through four neighbours; NaN where not known."""
        place = (times_s - self.start_s) / self.step_s
        index = np.floor(place).astype(int)
        inside = (index >= 1) & (index < len(self.values) - 2)
        index = np.where(inside, index, 1)
        share = (place - index)[:, None]
        p0, p1, p2, p3 = (self.values[index + k] for k in (-1, 0, 1, 2))
        a, b, c = -p0 + 3 * p1 - 3 * p2 + p3, 2 * p0 - 5 * p1 + 4 * p2 - p3, p2 - p0
        values = p1 + 0.5 * share * (c + share * (b + share * a))
        slopes = 0.5 * (c + share * (2 * b + 3 * share * a)) / self.step_s
        values[~inside] = np.nan
        return values, slopes


def _speed(signal: MotionSignal, step_s: float, name: str) -> _Speed:
    times, path = signal.times_s, signal.path_px
    if len(times) < 8 or times[-1] - times[0] < LEAST_SHARED_S:
        raise NoSharedMotion(
            "too_short",
            f"the {name} recording lasts less than {LEAST_SHARED_S:g} s: record 30 s while the rig turns to and fro",
        )
    first_step = int(np.ceil(times[0] / step_s))  # both cameras' grids are multiples of the step
    count = int(times[-1] / step_s) - first_step + 1
    grid = step_s * (first_step + np.arange(count))
    broken = np.zeros(len(times), bool) if signal.broken is None else signal.broken
    longest_s = max(GAP_S, GAP_PERIODS * signal.period_s)
    cuts = np.flatnonzero(broken[1:] | (np.diff(times) > longest_s)) + 1
    values = np.full((count, 2), np.nan)
    for first, last in zip([0, *cuts], [*cuts, len(times)], strict=True):
        if last - first < 8:
            continue
        piece = slice(*np.searchsorted(grid, (times[first], times[last - 1])))
        if piece.stop - piece.start > 6 * SMOOTH_S / step_s:
            values[piece] = _smooth_slope(_akima(times[first:last], path[first:last], grid[piece]), step_s)
    return _Speed(first_step * step_s, step_s, values)


def _akima(times: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Akima's interpolation: follows the samples without overshooting beside a jump."""
    slope = np.diff(values, axis=0) / np.diff(times)[:, None]
    padded = np.concatenate(
        (3 * slope[:1] - 2 * slope[1:2], 2 * slope[:1] - slope[1:2], slope,
         2 * slope[-1:] - slope[-2:-1], 3 * slope[-1:] - 2 * slope[-2:-1])
    )  # fmt: skip
    change = np.abs(np.diff(padded, axis=0))
    before, after = change[2:], change[:-2]
    total = before + after
    even = 0.5 * (padded[1:-2] + padded[2:-1])
    weighted = before * padded[1:-2] + after * padded[2:-1]
    tangent = np.where(total > 1e-12, weighted / np.where(total > 1e-12, total, 1), even)
    index = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 2)
    width = (times[index + 1] - times[index])[:, None]
    share = (at - times[index])[:, None] / width
    h00, h10 = (1 + 2 * share) * (1 - share) ** 2, share * (1 - share) ** 2
    h01, h11 = share**2 * (3 - 2 * share), share**2 * (share - 1)
    return (
        h00 * values[index] + h10 * width * tangent[index] + h01 * values[index + 1] + h11 * width * tangent[index + 1]
    )


def _smooth_slope(path: np.ndarray, step_s: float) -> np.ndarray:
    """The path's slope, smoothed; NaN at both ends, where the smoothing would reach beyond them."""
    reach = int(np.ceil(3 * SMOOTH_S / step_s))
    offsets = step_s * np.arange(-reach, reach + 1)
    bell = np.exp(-0.5 * (offsets / SMOOTH_S) ** 2)
    kernel = offsets * bell / np.sum(offsets**2 * bell)  # its correlation with a line of slope 1 is 1
    result = np.full(path.shape, np.nan)
    for axis in (0, 1):
        result[reach:-reach, axis] = np.convolve(path[:, axis], kernel[::-1], mode="valid")
    return result


def _shifted(infrared: _Speed, visible: _Speed, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """Both speeds where both are known, the visible one later by a whole number of steps."""
    ahead = round((infrared.start_s - visible.start_s) / infrared.step_s) - lag  # of infrared sample 0, in visible ones
    first, last = max(0, -ahead), min(len(infrared.values), len(visible.values) - ahead)
    if last <= first:
        return np.zeros((0, 2)), np.zeros((0, 2))
    wanted, given = infrared.values[first:last], visible.values[first + ahead : last + ahead]
    known = np.isfinite(wanted[:, 0]) & np.isfinite(given[:, 0])
    return (wanted, given) if known.all() else (wanted[known], given[known])


def _product(wanted: np.ndarray, given: np.ndarray, least: int = 0) -> complex:
    """Correlation of two motions as complex numbers: how alike, and turned by which angle. 0 for few samples."""
    if len(wanted) <= least:
        return 0j
    one, other = (motion[:, 0] + 1j * motion[:, 1] for motion in (wanted, given))
    one, other = one - one.mean(), other - other.mean()
    power = float(np.vdot(one, one).real * np.vdot(other, other).real)
    return complex(np.vdot(other, one)) / power**0.5 if power > 0 else 0j


def _upright(products: np.ndarray) -> np.ndarray:
    """The part of each correlation that cameras turned against each other by LARGEST_ROLL_DEG at most can have.

    Were any angle allowed, half a swing later would fit nearly as well, with the opposite sign.
    """
    beyond = np.maximum(0, np.abs(np.angle(products)) - np.radians(LARGEST_ROLL_DEG))
    return np.asarray(np.maximum(0, np.abs(products) * np.cos(beyond)))


def _peaks(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    inner = np.zeros(len(scores), bool)
    inner[1:-1] = (scores[1:-1] >= scores[:-2]) & (scores[1:-1] >= scores[2:])
    return np.asarray(inner & allowed)


def _refuse_stillness(infrared: _Speed, visible: _Speed, about_s: float, max_offset_s: float) -> None:
    for speed, name in ((infrared, "infrared"), (visible, "visible")):
        if not np.isfinite(speed.values).any():
            raise NoSharedMotion(
                "blind", f"the {name} picture shows too little to follow its motion: point the rig at a textured scene"
            )
        if speed.root_mean_square < LEAST_SPEED_PX_S:
            raise NoSharedMotion(
                "no_motion",
                f"the {name} camera does not move, and the offset shows in shared motion only: "
                "record 30 s while the rig turns to and fro",
            )
    ends = [speed.start_s + speed.step_s * len(speed.values) for speed in (infrared, visible)]
    overlap_s = min(ends[0] - about_s, ends[1]) - max(infrared.start_s - about_s, visible.start_s) + max_offset_s
    if overlap_s < LEAST_SHARED_S:
        raise NoSharedMotion("no_overlap", "the recordings do not overlap in time: give two that ran together")


def _refuse_doubt(best: float, rival: float, lag_s: float, max_offset_s: float) -> None:
    if best < LEAST_CORRELATION:
        raise NoSharedMotion(
            "unrelated",
            f"the two motions differ at every offset within {max_offset_s:g} s (best correlation {best:.2f}, needed "
            f"{LEAST_CORRELATION:g}): do both cameras sit on one mount, and did the recordings run together?",
        )
    clear = best >= 0.8 and 1 - rival**2 >= CLEARLY_WORSE * (1 - best**2)
    if best - rival < LEAST_MARGIN and not clear:
        raise NoSharedMotion(
            "ambiguous",
            f"several offsets fit about as well (correlation {best:.2f} and {rival:.2f}): the motion repeats itself: "
            "turn the rig irregularly, or narrow the search with --max-offset",
        )
    if abs(lag_s) > max_offset_s - RIVAL_S / 4:
        raise NoSharedMotion(
            "out_of_range",
            f"the best offset is at the end of the search range of {max_offset_s:g} s: widen --max-offset",
        )


def _refined(infrared: _Speed, visible: _Speed, lag_s: float, rival: float) -> TimeOffset:
    samples = _Samples(infrared, visible, lag_s)
    offset_s, drift = samples.fit()
    errors = [np.subtract(samples.fit(block, offset_s, drift), (offset_s, drift)) for block in range(BLOCKS)]
    spread = np.sqrt((BLOCKS - 1) / BLOCKS * np.sum(np.square(errors), axis=0))  # jackknife
    # Where the prior decides, all blocks agree for a bad reason: the fit's own variance is the honest one there.
    middle_sigma_ms, drift_sigma_ppm = np.maximum(spread, samples.sigma) * (1e3, 1e6)
    if middle_sigma_ms > LARGEST_SIGMA_MS:
        raise NoSharedMotion(
            "uncertain",
            f"the offset is known to {middle_sigma_ms:.0f} ms only: record longer, with more and quicker turns",
        )
    middle_s = samples.middle_s
    return TimeOffset(
        offset_ms=float(offset_s * 1e3 - drift * middle_s * 1e3),
        offset_sigma_ms=float(np.hypot(middle_sigma_ms, drift_sigma_ppm * 1e-3 * middle_s)),
        drift_ppm=float(drift * 1e6),
        drift_sigma_ppm=float(drift_sigma_ppm),
        middle_s=float(middle_s),
        middle_offset_ms=float(offset_s * 1e3),
        middle_sigma_ms=float(middle_sigma_ms),
        correlation=samples.correlation,
        rival_correlation=rival,
        shared_s=samples.shared_s,
    )


class _Samples:
    """The shared motion, and the Gauss-Newton fit of offset, drift and the matrix between both cameras."""

    def __init__(self, infrared: _Speed, visible: _Speed, lag_s: float) -> None:
        self._visible = visible
        self._lag_s = lag_s
        values, _ = visible.at(infrared.times_s - lag_s)
        known = np.isfinite(values[:, 0]) & np.isfinite(infrared.values[:, 0])
        known[1::2] = False  # smoothed as they are, neighbours say nearly the same
        self.sigma = (np.inf, np.inf)  # of offset and drift, by the last fit of all blocks
        self._times = infrared.times_s[known]
        self._wanted = infrared.values[known]
        self.correlation = abs(_product(self._wanted, values[known]))
        self.shared_s = float(2 * len(self._times) * infrared.step_s)
        # Where there is much motion there is much information: this is where the offset is known best.
        power = np.sum(np.square(np.gradient(self._wanted, axis=0)), axis=1) + 1e-12
        self.middle_s = float(np.sum(power * (self._times - lag_s)) / power.sum())
        edges = np.quantile(self._times, np.linspace(0, 1, BLOCKS + 1))
        self._block = np.clip(np.searchsorted(edges, self._times, side="right") - 1, 0, BLOCKS - 1)

    def fit(
        self, left_out: int | None = None, offset_s: float | None = None, drift: float = 0.0
    ) -> tuple[float, float]:
        """(offset in s at `middle_s`, drift in s per s), without one block; from a first guess."""
        keep = np.ones(len(self._times), bool) if left_out is None else self._block != left_out
        times, wanted = self._times[keep], self._wanted[keep]
        offset_s = self._lag_s if offset_s is None else offset_s
        for _ in range(12):
            # infrared = visible + offset + drift * (visible - middle), solved for visible
            told = (times - offset_s + drift * self.middle_s) / (1 + drift)
            given, slope = self._visible.at(told)
            known = np.isfinite(given[:, 0])
            given, slope, target, since = given[known], slope[known], wanted[known], told[known] - self.middle_s
            design = np.column_stack((given, np.ones(len(given))))
            matrix, *_ = np.linalg.lstsq(design, target, rcond=None)
            residual = target - design @ matrix
            sigma = 1.4826 * np.median(np.abs(residual), axis=0) + 1e-9
            weight = (1 / (1 + np.square(residual / (2.5 * sigma)))) / np.square(sigma)
            towards = -slope @ matrix[:2]  # change of the prediction with the offset
            columns = np.stack((towards, towards * since[:, None]))
            # What the matrix could also explain is no evidence for the offset.
            columns = np.stack([column - design @ np.linalg.lstsq(design, column, rcond=None)[0] for column in columns])
            normal = np.einsum("anc,nc,bnc->ab", columns, weight, columns)
            right = np.einsum("anc,nc,nc->a", columns, weight, residual)
            # Samples of a smoothed signal are not independent: about one in three smoothing widths is.
            share = 2 * self._visible.step_s / (3 * SMOOTH_S)
            normal, right = normal * share, right * share
            normal[1, 1] += (DRIFT_PRIOR_PPM * 1e-6) ** -2
            right[1] -= drift * (DRIFT_PRIOR_PPM * 1e-6) ** -2
            step = np.linalg.lstsq(normal, right, rcond=None)[0]
            offset_s += float(np.clip(step[0], -0.02, 0.02))
            drift += float(np.clip(step[1], -1e-3, 1e-3))
            if abs(step[0]) < 1e-6 and abs(step[1]) < 1e-8:
                break
        if left_out is None:
            self.sigma = tuple(np.sqrt(np.diag(np.linalg.pinv(normal))))
        return offset_s, drift
