"""A day of two network cameras whose clocks drift, wrap and are set: are the pairs still of one moment?"""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.sources.capture_time import TAI_NS
from tests.rigs.network_cameras import HOUR, RATE_HZ, NetworkCamera, run_a_day, skew_errors_ms


def assert_paired_all_day(cameras, sync, bursts, except_near_s: tuple[float, ...] = ()) -> None:
    fused, total = 0, 0
    for start_s, pairs in bursts:
        if any(0 <= start_s - step_s < 720 for step_s in except_near_s):
            continue  # the burst in which a clock was set; the next one counts again
        errors = skew_errors_ms(pairs, cameras)
        assert len(errors) >= 20, (start_s, [pair.mode for pair in pairs])
        assert np.abs(errors).max() <= 10.0, start_s  # a quarter of a period
        fused, total = fused + len(errors), total + len(pairs)
    assert fused > 0.85 * total
    for camera in ("infrared", "visible"):
        account = sync.account
        waiting = len(sync._pending[camera])
        assert 0 <= account.captured[camera] - account.used[camera] - account.dropped[camera].total() <= waiting


@pytest.mark.parametrize("drift_ppm", [-100.0, 100.0])
def test_drifting_counters_that_wrap_jump_and_reset_are_paired_by_their_arrivals(drift_ppm):
    def jumps(now_s: float) -> float:
        """Set ahead by 1 s, back by 3 s, and reset to nearly 0."""
        return 0.0 if now_s < 5 * HOUR else 1.0 if now_s < 10 * HOUR else -2.0 if now_s < 15 * HOUR else -80_000.0

    cameras = [
        NetworkCamera("infrared", 45, drift_ppm, counter_jump_s=jumps, phase_s=0.011, seed=1),
        NetworkCamera("visible", 20, -drift_ppm, seed=2),
    ]
    sync, bursts = run_a_day(cameras, offset_ms=25)  # what `calibrate time` says of such a rig
    assert_paired_all_day(cameras, sync, bursts, (10 * HOUR, 15 * HOUR))
    assert cameras[0].times.steps >= 2
    assert cameras[1].times.steps == 0


def test_wall_clocks_that_are_disciplined_set_or_count_tai_are_believed_as_far_as_they_can_be():
    def disciplined(now_s: float) -> float:
        return 2.0 * np.sin(now_s / 4000)

    def tai_and_steps(now_s: float) -> float:
        step_ms = 1000.0 if 7 * HOUR < now_s < 8 * HOUR else 0.0
        return disciplined(now_s) + TAI_NS / 1e6 + step_ms

    cameras = [
        NetworkCamera("infrared", 45, 80, wall_error_ms=tai_and_steps, phase_s=0.011, seed=1),
        NetworkCamera("visible", 20, -80, wall_error_ms=disciplined, seed=2),
    ]
    _, bursts = run_a_day(cameras)
    late = [pairs for start_s, pairs in bursts if not 7 * HOUR <= start_s < 8 * HOUR + 720]
    errors = np.concatenate([skew_errors_ms(pairs, cameras) for pairs in late[1:]])  # trust takes a moment
    assert np.abs(errors).max() <= 10
    assert np.mean([pair.mode == "fused" for pairs in late[1:] for pair in pairs]) > 0.85
    assert cameras[0].times.steps == 2  # set, and set back
    assert {pair.infrared.clock for pair in late[-1] if pair.infrared} == {"rtcp_ntp"}


def test_a_wall_clock_that_runs_free_is_found_out():
    camera = NetworkCamera("infrared", 45, 50, wall_error_ms=lambda now_s: -0.1 * now_s, seed=1)  # -100 ppm
    errors_ms, clocks = [], []
    for second in range(0, 20_000, 2):
        _, one = camera.expose(float(second) + 1)
        errors_ms.append(one.captured_ns / 1e6 - (second + 1) * 1e3)
        clocks.append(one.clock)
    assert clocks[100] == "rtcp_ntp"
    assert clocks[-1] == "arrival"
    assert np.abs(errors_ms).max() <= 60  # -100 ppm would be 2 s by then
    assert np.abs(errors_ms[-1000:]).max() <= 15  # the path's delay is known from the time when the clock was right


def test_the_moment_a_clock_is_set_is_noticed_within_a_second():
    camera = NetworkCamera(
        "visible", 20, wall_error_ms=lambda now_s: 1000.0 if now_s > 30 else 0.0, counter_jump_s=lambda now_s: 0.0
    )
    noticed_s = None
    for number in range(int(40 * RATE_HZ)):
        camera.expose(number / RATE_HZ)
        if noticed_s is None and camera.times.steps:
            noticed_s = number / RATE_HZ
    assert noticed_s is not None
    assert 30 <= noticed_s <= 31
