"""What a run did: exact counters, and distributions of fixed size, gathered into the report."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from calibration.whole_file import written_whole
from pipeline.errors import ConfigError

log = logging.getLogger("dspfusion.telemetry")

RECENT_NS = 5_000_000_000  # what health tells of the rate


class Distribution:
    """Percentiles of a positive quantity in constant memory, exact to 1 % (bins on a logarithmic scale)."""

    SMALLEST, STEP, BINS = 1e-3, math.log(1.01), 2400  # 1e-3 to 2e7: a microsecond to hours, in milliseconds

    def __init__(self) -> None:
        self._counts = np.zeros(self.BINS, np.int64)
        self.count = 0

    def add(self, value: float) -> None:
        place = math.log(max(value, self.SMALLEST) / self.SMALLEST) / self.STEP
        self._counts[min(self.BINS - 1, int(place))] += 1
        self.count += 1

    def percentile(self, share: float) -> float | None:
        """The value below which `share` (0 to 1) of the entries lie; None when there are none."""
        if not self.count:
            return None
        place = int(np.searchsorted(np.cumsum(self._counts), share * self.count))
        return round(self.SMALLEST * math.exp((place + 0.5) * self.STEP), 3)

    def summary(self, *percents: int) -> dict[str, float | None]:
        return {f"p{percent}": self.percentile(percent / 100) for percent in percents}


class Telemetry:
    """Gathers counts and times from all threads of one run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latency: dict[str, Distribution] = defaultdict(Distribution)
        self._skew = Distribution()
        self._dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self._lone_drops: dict[str, Counter[str]] = {"infrared": Counter(), "visible": Counter()}
        self._used: Counter[str] = Counter()
        self.modes: Counter[str] = Counter({"fused": 0, "ir_only": 0, "vis_only": 0, "held": 0})
        self.pairs = 0
        self.fused = 0
        self.published = 0
        self.fallbacks: list[str] = []
        self._first_fused_ns = 0
        self._last_fused_ns = 0
        self._recent_ns: deque[int] = deque()  # when the newest frames were fused

    def stage(self, name: str, milliseconds: float) -> None:
        """Notes how long one frame spent in a stage."""
        with self._lock:
            self._latency[name].add(milliseconds)

    def pair(self, mode: str, skew_ms: float | None) -> None:
        with self._lock:
            self.pairs += 1
            if skew_ms is not None:
                self._skew.add(abs(skew_ms))

    def fused_frame(self, mode: str, now_ns: int) -> None:
        with self._lock:
            self.fused += 1
            self.modes[mode] += 1
            self._first_fused_ns = self._first_fused_ns or now_ns
            self._last_fused_ns = now_ns
            self._recent_ns.append(now_ns)
            self._forget_old(now_ns)

    def published_frame(self) -> None:
        with self._lock:
            self.published += 1

    def drop(self, stage: str, reason: str, count: int = 1) -> None:
        """Counts what a stage dropped."""
        with self._lock:
            if count:
                self._dropped[stage][reason] += count

    def dropped(self, stage: str) -> dict[str, int]:
        """What a stage has dropped so far, by reason."""
        with self._lock:
            return dict(self._dropped.get(stage, {}))

    def frame_used(self, camera: str, count: int = 1) -> None:
        """Counts a source frame that is in a fused picture (a held frame counts once, at its first use)."""
        with self._lock:
            self._used[camera] += count

    def frame_dropped(self, camera: str, stage: str, reason: str, count: int = 1) -> None:
        """Counts a source frame that no fused picture shows."""
        with self._lock:
            self._lone_drops[camera][f"{stage}.{reason}"] += count

    def fallback(self, line: str, logged: bool = False) -> None:
        """Notes what the run has to do without. A line that is new is logged, unless its origin has `logged` it."""
        with self._lock:
            if line in self.fallbacks:
                return
            self.fallbacks.append(line)
        if not logged:
            log.warning("%s", line)

    def fps(self) -> float:
        """Fused frames per second between the first and the last one."""
        span_s = (self._last_fused_ns - self._first_fused_ns) / 1e9
        return round((self.fused - 1) / span_s, 2) if self.fused > 1 and span_s > 0 else 0.0

    def recent_fps(self, now_ns: int) -> float:
        """Fused frames per second of the last 5 s; 0 when none came."""
        with self._lock:
            self._forget_old(now_ns)
            if len(self._recent_ns) < 2:
                return 0.0
            span_s = max(1e-3, (now_ns - self._recent_ns[0]) / 1e9)
            return round((len(self._recent_ns) - 1) / span_s, 2)

    def _forget_old(self, now_ns: int) -> None:
        while self._recent_ns and now_ns - self._recent_ns[0] > RECENT_NS:
            self._recent_ns.popleft()

    def report(self, frames_in: dict[str, int], **more: Any) -> dict[str, Any]:
        """The run's report, with the keys that the design promises."""
        with self._lock:
            short = {"infrared": "ir", "visible": "vis"}
            return {
                "frames_in": {short[camera]: count for camera, count in frames_in.items()},
                "pairs": self.pairs,
                "fused": self.fused,
                "published": self.published,
                "dropped": {stage: dict(reasons) for stage, reasons in self._dropped.items() if reasons},
                "accounting": {
                    short[camera]: {
                        "captured": count,
                        "used": self._used[camera],
                        "dropped": {reason: n for reason, n in self._lone_drops[camera].items() if n},
                    }
                    for camera, count in frames_in.items()
                },
                "modes": dict(self.modes),
                "fps": self.fps(),
                "latency_ms": {name: d.summary(50, 95, 99) for name, d in self._latency.items()},
                "skew_ms": self._skew.summary(50, 95),
                "fallbacks": list(self.fallbacks),
                **more,
            }


def check_targets(
    *targets: str | Path | None, inputs: Iterable[str | Path | None] = (), others: Iterable[str | Path | None] = ()
) -> None:
    """Refuses places that no result can be written to, or where it would destroy a file, before the work is begun.

    Args:
        targets: where results are to go; None is not asked for, "-" is the terminal.
        inputs: files and folders that the command reads.
        others: files that it writes besides.

    Raises:
        ConfigError: a folder, or below something that is no folder or may not be written to; an input, or beside the
            files of one; one file for two results.
    """
    files = [str(target) for target in targets if target is not None and str(target) != "-"]
    if not files:
        return
    from pipeline.config import are_one_file
    from pipeline.recording import refuse_overwriting

    read, taken = [path for path in inputs if path is not None], [str(path) for path in others if path is not None]
    for file in files:
        _refuse_unwritable(Path(file))
        refuse_overwriting(file, *read)
        if any(are_one_file(file, other) for other in taken) and not _is_pipe(Path(file)):
            raise ConfigError(f"{file} is named for two results: give each its own file")
        taken.append(file)


def _is_pipe(path: Path) -> bool:
    """Or a device, such as /dev/null: it takes one result after another."""
    return path.exists() and not path.is_file()


def _refuse_unwritable(target: Path) -> None:
    try:
        parent = next((folder for folder in target.absolute().parents if folder.exists()), Path("/"))
        problem = (
            "it is a folder" if target.is_dir()
            else f"{parent} is no folder" if not parent.is_dir()
            else f"{parent} may not be written to" if not os.access(parent, os.W_OK | os.X_OK)
            else None
        )  # fmt: skip
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise ConfigError(f"cannot write the report {target}: {problem}: choose another place")


def write_report(report: dict[str, Any], path: str, keep_earlier: bool = False) -> None:
    """Writes a report as JSON, whole or not at all; "-" is standard output.

    Args:
        report: the content.
        path: where to.
        keep_earlier: what is there is not replaced, but kept under another name.
    """
    text = json.dumps(report, indent=2) + "\n"
    if path == "-":
        print(text, end="", flush=True)
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as part:
            part.write_text(text)
            if keep_earlier:
                from pipeline.record import keep_aside

                keep_aside(target)
    except OSError as error:
        raise ConfigError(f"cannot write the report {target}: {error.strerror}: choose another place") from None
