"""Decides which infrared and visible frame show the same moment.

The visible camera sets the pace: each of its frames leaves once, with the infrared frame nearest in capture time. A
visible frame is let go as soon as that infrared frame is known: a newer one has come, or the predicted next one would
be farther away than the best that is here. It never waits longer than `max_wait_ms`, or, where that is not set, than
the nearest infrared frame can take to come: half a period, and what this camera's frames usually take to arrive.

    fused      nearest, within max_skew_ms, not used before, and not older than 1.5 infrared periods
    held       the same infrared frame again, or a farther one, within hold_ms
    vis_only   no infrared frame within hold_ms
    ir_only    the visible camera is silent: the infrared camera sets the pace

Modes are honest frame by frame and need no hysteresis. What could flap is who sets the pace, when a half-dead camera
delivers now and then. So a camera that was declared absent counts as present again only after SETTLE_FRAMES regular
frames.

A camera is absent when it is silent while the other one delivers. Silence is measured in watched time: a pause of
this very process (swapped out, stopped) is not held against the cameras.

While a thermal shutter is closed the same picture comes again and again. A repeat shows the old moment, so it is
dropped as `repeat`; the first of the run may be held, and ages like any other frame. Where the visible camera tells
that an infrared picture repeats because nothing moves, it counts as new (`standstill`).

Nothing here reads a clock or sleeps: time comes in with each call.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from statistics import median

from pipeline.config import SyncConfig
from pipeline.frame import Camera, Frame, FramePair, Mode
from pipeline.standstill import Standstill

FRESH_PERIODS = 1.5  # an infrared frame older than this many infrared periods is never "fused"
SETTLE_FRAMES = 5  # regular frames after an absence before a camera counts again...
SETTLE_NS = 250_000_000  # ...or as many as come in this time, for slow cameras
LONE_FRAMES = 4  # after so many frames that each came alone, the camera's rate is measured anew
NEW_TIMELINE_FRAMES = 3  # so many frames in a row that run backwards are a clock that was set, not stragglers
REUSE_PENALTY_PERIODS = 0.05  # prefer a fresh frame to a used one that is nearer by less than this
MAX_PENDING = 32  # frames of one camera
POLL_NS = 40_000_000  # while anything waits, look at the clock at least this often
_HISTORY = 16  # intervals for the period
LATENCIES = 32  # frames, for how long a camera's frames usually take to arrive
WAIT_UNKNOWN_NS = 60_000_000  # while nothing is known about the infrared camera
WAIT_LONGEST_NS = 250_000_000  # by itself; a configuration may ask for more
WAIT_MARGIN_NS = 5_000_000
PREDICTION_JITTERS = 1.5  # this much of an interval's jitter earlier the next frame may come
_BOTH_WAYS: tuple[tuple[Camera, Camera], ...] = (("infrared", "visible"), ("visible", "infrared"))


@dataclass
class Account:
    """What became of every frame. After `flush`: captured = used + dropped, for each camera, exactly."""

    captured: Counter[Camera] = field(default_factory=Counter)
    used: Counter[Camera] = field(default_factory=Counter)  # each frame once, however often it was held
    dropped: dict[Camera, Counter[str]] = field(default_factory=lambda: {"infrared": Counter(), "visible": Counter()})
    modes: Counter[Mode] = field(default_factory=Counter)
    resting: int = 0  # infrared frames that repeat, and count as new because nothing moves

    def drop(self, camera: Camera, reason: str) -> None:
        self.dropped[camera][reason] += 1

    def balanced(self) -> bool:
        return all(self.captured[camera] == self.used[camera] + self.dropped[camera].total() for camera in self.dropped)


@dataclass(eq=False)
class _Candidate:
    """A frame that waits, with its capture time on the common clock."""

    frame: Frame
    came_ns: int
    used: bool = False

    @property
    def captured_ns(self) -> int:
        return self.frame.captured_ns


def _frame(candidate: _Candidate | None) -> Frame | None:
    return None if candidate is None else candidate.frame


class _Rhythm:
    """Period and jitter of one camera, from the median of its last intervals: lost frames do not disturb it."""

    def __init__(self) -> None:
        self._intervals: deque[int] = deque(maxlen=_HISTORY)
        self._latencies: deque[int] = deque(maxlen=LATENCIES)
        self.newest_ns: int | None = None
        self.period_ns: int | None = None
        self.jitter_ns = 0

    def arrived(self, latency_ns: int) -> None:
        """Notes how long after its capture time a frame has come."""
        self._latencies.append(latency_ns)

    @property
    def usual_latency_ns(self) -> int | None:
        """Nearly all frames have come by then after their capture."""
        if not self._latencies:
            return None
        middle = median(self._latencies)
        return round(middle + 6 * median(abs(latency - middle) for latency in self._latencies))

    def forget(self) -> None:
        self._intervals.clear()
        self.period_ns = None

    def add(self, captured_ns: int, regular: bool = True) -> None:
        """Notes a capture; an interval that is not `regular` counts only when none is known."""
        if self.newest_ns is not None and (regular or self.period_ns is None):
            self._intervals.append(captured_ns - self.newest_ns)
            self.period_ns = round(median(self._intervals))
            deviation = median(abs(interval - self.period_ns) for interval in self._intervals)
            self.jitter_ns = round(1.4826 * deviation)
        self.newest_ns = captured_ns


def _reuse_penalty_ns(rhythm: dict[Camera, _Rhythm]) -> float:
    """Half a period apart, jitter would take one infrared frame twice and skip the next; a small bias prevents it.

    At unequal rates frames have to be used twice or left out anyway, and the bias would only cost accuracy.
    """
    infrared_ns, visible_ns = rhythm["infrared"].period_ns, rhythm["visible"].period_ns
    if not infrared_ns or not visible_ns or abs(infrared_ns - visible_ns) > 0.1 * visible_ns:
        return 0.0
    return REUSE_PENALTY_PERIODS * infrared_ns


class _Presence:
    """Whether a camera takes part. See the top of this file."""

    def __init__(self) -> None:
        self.absent = False
        self.last_came_ns: int | None = None  # watched time
        self.began_anew = False  # the last frame came after a silence: its interval is no period
        self._settling_since_ns = 0
        self._regular = 0
        self._lone = 0

    @property
    def slower_than_thought(self) -> bool:
        """Each of the last frames came alone: this is no broken camera, but one that has changed its rate."""
        return self._lone >= LONE_FRAMES

    def came(self, now_ns: int, period_ns: int | None, other_paces: bool) -> bool:
        """Notes an arrival; returns whether the frame may be used, False while the camera settles."""
        silent_ns = now_ns - (self.last_came_ns if self.last_came_ns is not None else now_ns)
        self.last_came_ns = now_ns
        self.began_anew = False
        if not self.absent:
            return True
        if not other_paces:  # there is nothing else to show
            self.absent = False
            return True
        if self._regular == 0 or silent_ns > max(SETTLE_NS, 2 * (period_ns or 0)):
            self.began_anew = True
            self._lone = self._lone + 1 if self._regular <= 1 else 0
            self._regular, self._settling_since_ns = 0, now_ns
        self._regular += 1
        long_enough = self._regular >= 2 and now_ns - self._settling_since_ns >= SETTLE_NS
        if self._regular > SETTLE_FRAMES or long_enough:
            self.absent, self._lone = False, 0
        return not self.absent

    def leave(self) -> None:
        self.absent, self._regular = True, 0


class Sync:
    """Pairs two live cameras; a pure stage without thread or clock.

    Feed it with `add`, ask it with `poll`, at the latest at `next_deadline_ns`; `flush` at the end. All `now_ns` are
    of one clock that never goes back, `time.monotonic_ns()` or a simulated one. The capture times of the frames in
    the pairs have the configured offsets taken off. Pairs leave in the order of their capture time.
    """

    def __init__(self, config: SyncConfig | None = None) -> None:
        self.config = config or SyncConfig()
        self.account = Account()
        self._offset_ns: dict[Camera, int] = {
            "infrared": round(self.config.infrared_offset_ms * 1e6),
            "visible": round(self.config.visible_offset_ms * 1e6),
        }
        self._max_skew_ns = round(self.config.max_skew_ms * 1e6)
        self._max_wait_ns = None if self.config.max_wait_ms is None else round(self.config.max_wait_ms * 1e6)
        self._hold_ns = round(self.config.hold_ms * 1e6)
        self._pending: dict[Camera, deque[_Candidate]] = {"infrared": deque(), "visible": deque()}
        self._rhythm: dict[Camera, _Rhythm] = {"infrared": _Rhythm(), "visible": _Rhythm()}
        self._presence: dict[Camera, _Presence] = {"infrared": _Presence(), "visible": _Presence()}
        self._backwards: dict[Camera, list[int]] = {"infrared": [], "visible": []}
        self._standstill = Standstill()
        self.infrared_frozen = False  # as far as both cameras tell: its shutter is closed, or it hangs
        self._released_until_ns: int | None = None  # capture time of the newest pair
        self._now_ns: int | None = None
        self._watched_ns = 0

    @property
    def infrared_hangs(self) -> bool:
        """Whether infrared is known to repeat its picture for another reason than its shutter or a view at rest."""
        return self._standstill.hangs

    @property
    def infrared_offset_ms(self) -> float:
        """What is taken off the infrared capture times."""
        return self._offset_ns["infrared"] / 1e6

    @property
    def offset_ns(self) -> dict[str, int]:
        """What is taken off the capture times of each camera at this moment."""
        return {camera: offset_ns for camera, offset_ns in self._offset_ns.items()}

    def shift_infrared(self, by_ms: float) -> None:
        """Changes what is taken off the infrared capture times from now on; in small steps, time stays in order."""
        self._offset_ns["infrared"] += round(by_ms * 1e6)

    @property
    def dropped(self) -> dict[Camera, Counter[str]]:
        return self.account.dropped

    def absent(self, camera: Camera) -> bool:
        return self._presence[camera].absent

    def period_ns(self, camera: Camera) -> int | None:
        """Measured time between two captures; None before the second frame."""
        return self._rhythm[camera].period_ns

    def add(self, frame: Frame, now_ns: int) -> None:
        """Takes a frame over. It will be in a pair, or counted in `dropped` with its reason."""
        self._watch(now_ns)
        camera = frame.camera
        other: Camera = "visible" if camera == "infrared" else "infrared"
        self.account.captured[camera] += 1
        if self._offset_ns[camera]:
            frame = replace(frame, captured_ns=frame.captured_ns - self._offset_ns[camera])
        other_paces = not self._presence[other].absent and self._presence[other].last_came_ns is not None
        settled = self._presence[camera].came(self._watched_ns, self._rhythm[camera].period_ns, other_paces)
        if not self._in_order(frame):
            self.account.drop(camera, "out_of_order")
            return
        self._learn_rhythm(camera, frame.captured_ns)
        self._rhythm[camera].arrived(now_ns - frame.captured_ns)
        frame = self._standstill.judged(frame)
        if camera == "infrared":
            self.infrared_frozen = frame.frozen
            self.account.resting += self._standstill.resting
        if frame.repeats:
            self.account.drop(camera, "repeat")
        elif not settled:
            self.account.drop(camera, "settling")
        elif camera == "visible" and self._already_shown(frame.captured_ns):
            self.account.drop(camera, "too_late")
        else:
            self._keep(_Candidate(frame, now_ns))

    def poll(self, now_ns: int) -> list[FramePair]:
        """The pairs that are decided by now, in the order of their capture time."""
        self._watch(now_ns)
        self._judge_presence()
        pairs: list[FramePair] = []
        visible = self._pending["visible"]
        while visible and self._decided(visible[0], now_ns):
            candidate = visible.popleft()
            # After a pause of ours the whole queue is overdue: only the newest is worth showing.
            longest_ns = WAIT_UNKNOWN_NS if self._max_wait_ns is None else self._max_wait_ns
            if visible and now_ns - candidate.came_ns > 2 * max(longest_ns, self._wait_ns(candidate)) + POLL_NS:
                self.account.drop("visible", "too_late")
                continue
            pairs.append(self._pair(candidate, now_ns))
        if self._presence["visible"].absent and not visible:
            pairs.extend(self._infrared_alone(now_ns))
        return pairs

    @property
    def next_deadline_ns(self) -> int | None:
        """When to poll next if no frame comes before; None: nothing waits."""
        if self._now_ns is None:
            return None
        visible = self._pending["visible"]
        deadlines = [visible[0].came_ns + self._wait_ns(visible[0])] if visible else []
        if deadlines or any(not candidate.used for candidate in self._pending["infrared"]):
            deadlines.append(self._now_ns + POLL_NS)
        return min(deadlines, default=None)

    def flush(self, now_ns: int | None = None) -> list[FramePair]:
        """Lets go of everything at the end: what can be paired is paired, the rest is counted as `unpaired`."""
        now_ns = now_ns if now_ns is not None else self._now_ns or 0
        visible = self._pending["visible"]
        pairs = [self._pair(visible.popleft(), now_ns) for _ in range(len(visible))]
        if self._presence["visible"].absent:
            pairs.extend(self._infrared_alone(now_ns))
        self._forget_infrared(len(self._pending["infrared"]), "unpaired")
        return pairs

    def _learn_rhythm(self, camera: Camera, captured_ns: int) -> None:
        rhythm, presence = self._rhythm[camera], self._presence[camera]
        if presence.slower_than_thought:
            rhythm.forget()
        rhythm.add(captured_ns, regular=not presence.began_anew)

    def _watch(self, now_ns: int) -> None:
        if self._now_ns is None:
            self._now_ns = now_ns
            for presence in self._presence.values():
                presence.last_came_ns = None
        # Calls come at least every POLL_NS while anything waits; a longer gap was a pause of ours.
        self._watched_ns += min(max(0, now_ns - self._now_ns), POLL_NS + 10_000_000)
        self._now_ns = max(now_ns, self._now_ns)

    def _in_order(self, frame: Frame) -> bool:
        """Whether capture time goes forward; after a few frames that agree with each other, a new timeline begins."""
        newest_ns, backwards = self._rhythm[frame.camera].newest_ns, self._backwards[frame.camera]
        if newest_ns is None or frame.captured_ns > newest_ns:
            backwards.clear()
            return True
        if backwards and frame.captured_ns <= backwards[-1]:
            backwards.clear()
        backwards.append(frame.captured_ns)
        if len(backwards) < NEW_TIMELINE_FRAMES:
            return False
        backwards.clear()
        self._begin_timeline(frame.camera)
        return True

    def _already_shown(self, captured_ns: int) -> bool:
        return self._released_until_ns is not None and captured_ns <= self._released_until_ns

    def _begin_timeline(self, camera: Camera) -> None:
        self._rhythm[camera] = _Rhythm()
        if camera == "infrared":
            self._forget_infrared(len(self._pending["infrared"]), "old_timeline")
            if self._presence["visible"].absent:
                self._released_until_ns = None
        else:
            for _ in range(len(self._pending["visible"])):
                self._pending["visible"].popleft()
                self.account.drop("visible", "old_timeline")
            self._released_until_ns = None

    def _keep(self, candidate: _Candidate) -> None:
        camera = candidate.frame.camera
        pending = self._pending[camera]
        pending.append(candidate)
        if len(pending) > MAX_PENDING and not pending.popleft().used:
            self.account.drop(camera, "overflow")

    def _judge_presence(self) -> None:
        for camera, other in _BOTH_WAYS:
            presence = self._presence[camera]
            silent_since_ns = presence.last_came_ns or 0
            other_came_ns = self._presence[other].last_came_ns
            if presence.absent or other_came_ns is None or other_came_ns <= silent_since_ns:
                continue
            if self._watched_ns - silent_since_ns > self._patience_ns(camera):
                presence.leave()

    def _patience_ns(self, camera: Camera) -> int:
        """How long a camera may be silent.

        Without the visible one nothing is shown, so it gets little: two lost frames at usual rates. Without infrared
        the visible frames go on, held and then alone, so a slow thermal camera may lose frames without having to
        settle again.
        """
        period_ns = self._rhythm[camera].period_ns
        if camera == "visible":
            if period_ns is None:
                return 220_000_000
            patience_ns = min(max(round(2.5 * period_ns), 120_000_000), 220_000_000)
            return max(patience_ns, round(1.5 * period_ns))
        return max(round(3.5 * (period_ns or 0)), 250_000_000)

    def _cost(self, candidate: _Candidate, captured_ns: int) -> float:
        """Distance in time; at equal rates a used frame counts as a little farther."""
        distance = abs(candidate.captured_ns - captured_ns)
        return distance + candidate.used * _reuse_penalty_ns(self._rhythm)

    def _wait_ns(self, visible: _Candidate) -> int:
        """How long a visible frame may wait."""
        if self._max_wait_ns is not None:
            return self._max_wait_ns
        rhythm = self._rhythm["infrared"]
        latency_ns, period_ns = rhythm.usual_latency_ns, rhythm.period_ns
        if latency_ns is None or period_ns is None:
            return WAIT_UNKNOWN_NS
        comes_ns = visible.captured_ns + period_ns // 2 + 2 * rhythm.jitter_ns + latency_ns
        return min(max(comes_ns + WAIT_MARGIN_NS - visible.came_ns, 0), WAIT_LONGEST_NS)

    def _decided(self, visible: _Candidate, now_ns: int) -> bool:
        if self._presence["infrared"].absent or now_ns >= visible.came_ns + self._wait_ns(visible):
            return True
        rhythm = self._rhythm["infrared"]
        if rhythm.newest_ns is None:
            return False
        if rhythm.newest_ns >= visible.captured_ns:
            return True
        if rhythm.period_ns is None or not self._pending["infrared"]:
            return False
        best = min(self._cost(candidate, visible.captured_ns) for candidate in self._pending["infrared"])
        # With an irregular camera it is worth waiting for the fact.
        next_ns = rhythm.newest_ns + rhythm.period_ns - PREDICTION_JITTERS * rhythm.jitter_ns
        return next_ns - visible.captured_ns > best

    def _pair(self, visible: _Candidate, now_ns: int) -> FramePair:
        pending = self._pending["infrared"]
        position = min(
            range(len(pending)), key=lambda number: self._cost(pending[number], visible.captured_ns), default=None
        )
        infrared: _Candidate | None = None
        mode: Mode = "vis_only"
        if position is not None:
            nearest = pending[position]
            mode = self._mode(nearest, visible.captured_ns)
            infrared = None if mode == "vis_only" else nearest
            # Time goes forward: an infrared frame before this one is nobody's nearest any more.
            self._forget_infrared(position, "superseded")
        return self._release(infrared, visible, mode, now_ns)

    def _mode(self, infrared: _Candidate, visible_ns: int) -> Mode:
        age_ns = visible_ns - infrared.captured_ns
        fresh_ns = FRESH_PERIODS * (self._rhythm["infrared"].period_ns or self._max_skew_ns)
        if not infrared.used and abs(age_ns) <= self._max_skew_ns and age_ns <= fresh_ns:
            return "fused"
        return "held" if abs(age_ns) <= self._hold_ns else "vis_only"

    def _infrared_alone(self, now_ns: int) -> list[FramePair]:
        """The newest infrared frame, unless it has been shown."""
        pending = self._pending["infrared"]
        if not pending or pending[-1].used:
            return []
        self._forget_infrared(len(pending) - 1, "superseded")
        newest = pending[0]
        if self._already_shown(newest.captured_ns):
            self._forget_infrared(1, "too_late")
            return []
        return [self._release(newest, None, "ir_only", now_ns)]

    def _release(self, infrared: _Candidate | None, visible: _Candidate | None, mode: Mode, now_ns: int) -> FramePair:
        if infrared is not None and not infrared.used:
            infrared.used = True
            self.account.used["infrared"] += 1
        if visible is not None:
            self.account.used["visible"] += 1
        self.account.modes[mode] += 1
        pair = FramePair(_frame(infrared), _frame(visible), mode, now_ns)
        self._released_until_ns = pair.captured_ns
        return pair

    def _forget_infrared(self, count: int, reason: str) -> None:
        for _ in range(count):
            if not self._pending["infrared"].popleft().used:
                self.account.drop("infrared", reason)


def pair_recordings(
    infrared: Iterable[Frame],
    visible: Iterable[Frame],
    config: SyncConfig | None = None,
    account: Account | None = None,
) -> Generator[FramePair]:
    """Pairs two recordings by media time: the same rules without a clock, so the result is the same in every run.

    Each visible frame gives exactly one pair, with the infrared frame nearest in time. Where one recording starts
    earlier, ends later or has a gap, the other goes on alone. Frames are read only as far as they are needed.

    Closing the generator early counts the frames that it had read ahead as dropped, "stopping".

    Differences to live: a picture that repeats is `held` however long it lasts (a recording may well contain still
    pictures), and nothing is ever too late.

    Args:
        infrared, visible: frames in the order of their capture time, with time 0 in common.
        config: offsets, drift, skew and hold; the wait does not apply.
        account: counts what became of every frame, if given.
    """
    return _Recordings(infrared, visible, config or SyncConfig(), account or Account()).pairs()


class _Recordings:
    def __init__(
        self, infrared: Iterable[Frame], visible: Iterable[Frame], config: SyncConfig, account: Account
    ) -> None:
        self._account = account
        self._max_skew_ns = round(config.max_skew_ms * 1e6)
        self._hold_ns = round(config.hold_ms * 1e6)
        self._ahead: dict[Camera, _Candidate | None] = {}  # read, and not yet held or paired
        self._rhythm: dict[Camera, _Rhythm] = {"infrared": _Rhythm(), "visible": _Rhythm()}
        self._standstill = Standstill()
        rate = 1 + config.infrared_drift_ppm * 1e-6
        self._infrared = self._ordered("infrared", infrared, round(config.infrared_offset_ms * 1e6), rate)
        self._visible = self._ordered("visible", visible, round(config.visible_offset_ms * 1e6))

    def pairs(self) -> Generator[FramePair]:
        before: list[_Candidate] = []  # infrared, up to and including the first one after the present visible frame
        try:
            yield from self._pairs(before)
        except GeneratorExit:
            self._forget(before, len(before), "stopping")
            for camera, candidate in self._ahead.items():
                if candidate is not None:
                    self._account.drop(camera, "stopping")
            raise

    def _pairs(self, before: list[_Candidate]) -> Iterator[FramePair]:
        previous_ns: int | None = None
        following = self._read_infrared()
        for visible in self._visible:
            self._ahead["visible"] = visible
            while following is not None and (not before or before[-1].captured_ns < visible.captured_ns):
                self._hold(before, following)
                yield from self._alone_in_gap(before, previous_ns, visible.captured_ns)
                following = self._read_infrared()
            self._ahead["visible"] = None
            yield self._pair(before, visible)
            previous_ns = visible.captured_ns
        while following is not None:
            self._hold(before, following)
            following = self._read_infrared()
            yield from self._alone_in_gap(before, previous_ns, None)
            self._forget(before, len(before) - 1, "superseded")
        self._forget(before, len(before), "superseded")

    def _read_infrared(self) -> _Candidate | None:
        self._ahead["infrared"] = next(self._infrared, None)
        return self._ahead["infrared"]

    def _hold(self, before: list[_Candidate], candidate: _Candidate) -> None:
        before.append(candidate)
        self._ahead["infrared"] = None

    def _ordered(
        self, camera: Camera, frames: Iterable[Frame], offset_ns: int, rate: float = 1.0
    ) -> Iterator[_Candidate]:
        newest_ns: int | None = None
        for frame in frames:
            self._account.captured[camera] += 1
            if offset_ns or rate != 1:
                frame = replace(frame, captured_ns=round((frame.captured_ns - offset_ns) / rate))
            if newest_ns is not None and frame.captured_ns <= newest_ns:
                self._account.drop(camera, "out_of_order")
                continue
            newest_ns = frame.captured_ns
            self._rhythm[camera].add(newest_ns)
            frame = self._standstill.judged(frame)
            self._account.resting += camera == "infrared" and self._standstill.resting
            yield _Candidate(frame, frame.captured_ns)

    def _alone_in_gap(
        self, before: list[_Candidate], previous_ns: int | None, next_ns: int | None
    ) -> Iterator[FramePair]:
        """Infrared frames far from any visible one, as they would have been shown live."""
        far_ns = max(self._max_skew_ns, 250_000_000, round(1.5 * (self._rhythm["visible"].period_ns or 0)))
        for candidate in list(before):
            after_previous = previous_ns is None or candidate.captured_ns - previous_ns > far_ns
            if after_previous and (next_ns is None or next_ns - candidate.captured_ns > far_ns) and not candidate.used:
                self._forget(before, before.index(candidate), "superseded")
                yield self._release(candidate, None, "ir_only")

    def _pair(self, before: list[_Candidate], visible: _Candidate) -> FramePair:
        if not before:
            return self._release(None, visible, "vis_only")
        period_ns = self._rhythm["infrared"].period_ns or self._max_skew_ns
        penalty = _reuse_penalty_ns(self._rhythm)
        costs = [abs(one.captured_ns - visible.captured_ns) + penalty * one.used for one in before]
        nearest = before[costs.index(min(costs))]
        age_ns = visible.captured_ns - nearest.captured_ns
        distance_ns = abs(age_ns)
        fresh = age_ns <= FRESH_PERIODS * period_ns and not nearest.used and not nearest.frame.repeats
        if fresh and distance_ns <= self._max_skew_ns:
            mode: Mode = "fused"
        else:
            mode = "held" if distance_ns <= max(self._hold_ns, self._max_skew_ns) else "vis_only"
        self._forget(before, before.index(nearest), "superseded")
        return self._release(None if mode == "vis_only" else nearest, visible, mode)

    def _release(self, infrared: _Candidate | None, visible: _Candidate | None, mode: Mode) -> FramePair:
        if infrared is not None and not infrared.used:
            infrared.used = True
            self._account.used["infrared"] += 1
        self._account.used["visible"] += visible is not None
        self._account.modes[mode] += 1
        return FramePair(_frame(infrared), _frame(visible), mode)

    def _forget(self, before: list[_Candidate], count: int, reason: str) -> None:
        for candidate in before[: max(count, 0)]:
            if not candidate.used:
                self._account.drop("infrared", reason)
        del before[: max(count, 0)]
