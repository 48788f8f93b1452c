"""The offset and drift between two clocks, from shared motion: signals with known truth, then pictures, then a day."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from calibration.ego_motion import EgoMotion, Motion
from calibration.rig import CalibrationError, CameraModel, Rig
from calibration.rig_file import load_quality, load_rig, save_rig, save_timing
from calibration.time_offset import MotionSignal, NoSharedMotion, TimeOffset, estimate_offset
from pipeline.cli import app
from pipeline.clock import SLEW_MS_PER_S, ClockWatch, MotionLog, OffsetTracker
from pipeline.config import RegistrationConfig, SyncConfig
from pipeline.frame import Frame
from pipeline.gain import InfraredGain
from pipeline.live import with_rig_offset
from pipeline.register import Register
from tests.rigs.motion import Path2D, blurred, first_picture, hand_held, moved_picture, rendered, sampled, seen

# The estimator


@pytest.mark.parametrize("offset_ms", [0.0, 12.3, -47.0, 480.0, -1300.0])
def test_the_offset_comes_back_after_30_seconds(offset_ms):
    errors = []
    for seed in range(5):
        path = hand_held(seed)
        infrared = seen(path, 32, 25, seed, offset_ms=offset_ms, scale=0.7, roll_deg=3)
        found = estimate_offset(infrared, seen(path, 32, 30, seed + 50))
        errors.append(abs(found.offset_ms - offset_ms))
        assert found.confidence > 0.6
    assert np.median(errors) <= 1.0


@pytest.mark.parametrize("drift_ppm", [-100.0, -30.0, 0.0, 60.0, 100.0])
def test_the_drift_comes_back_after_120_seconds(drift_ppm):
    path = hand_held(3)
    infrared = seen(path, 120, 25, 1, offset_ms=20, drift_ppm=drift_ppm, jitter_ms=1)
    found = estimate_offset(infrared, seen(path, 120, 30, 2, jitter_ms=1))
    assert found.drift_ppm == pytest.approx(drift_ppm, abs=10)
    assert found.offset_ms == pytest.approx(20, abs=1.0)
    assert found.at(120.0) == pytest.approx(20 + drift_ppm * 0.12, abs=1.0)


@pytest.mark.parametrize(
    ("infrared_hz", "jitter_ms", "drops", "noise_px"), [(9, 0, 0, 0.03), (30, 8, 0.1, 0.05), (25, 1, 0.3, 0.1)]
)
def test_slow_irregular_and_lossy_cameras_do_no_harm(infrared_hz, jitter_ms, drops, noise_px):
    errors = []
    for seed in range(5):
        path = hand_held(seed + 10)
        quality = {"jitter_ms": jitter_ms, "drops": drops, "noise_px": noise_px}
        infrared = seen(path, 30, infrared_hz, seed, offset_ms=33, **quality)
        errors.append(abs(estimate_offset(infrared, seen(path, 30, 30, seed + 7, **quality)).offset_ms - 33))
    assert np.median(errors) <= 2.0


def test_the_stated_uncertainty_is_honest():
    deviations = []
    for seed in range(16):
        path = hand_held(seed + 100)
        found = estimate_offset(seen(path, 20, 25, seed, offset_ms=5, noise_px=0.1), seen(path, 20, 25, seed + 30))
        deviations.append((found.middle_offset_ms - 5) / found.middle_sigma_ms)
    assert 0.2 < np.std(deviations) < 2.0


def test_a_camera_that_hangs_upside_down_is_understood():
    path = hand_held(4)
    found = estimate_offset(seen(path, 30, 25, 1, offset_ms=15, roll_deg=178), seen(path, 30, 25, 2))
    assert found.offset_ms == pytest.approx(15, abs=1.0)


def test_a_recording_with_holes_and_a_broken_path_is_used_piece_by_piece():
    path = hand_held(5)
    whole = seen(path, 60, 25, 1, offset_ms=15)
    kept = (whole.times_s < 20) | (whole.times_s > 27)
    jump = np.where(whole.times_s[kept] > 40, 500.0, 0.0)[:, None]
    broken = np.diff(jump[:, 0], prepend=0) > 0
    found = estimate_offset(
        MotionSignal(whole.times_s[kept], whole.path_px[kept] + jump, broken), seen(path, 60, 30, 2)
    )
    assert found.offset_ms == pytest.approx(15, abs=1.0)
    assert 45 < found.shared_s < 55


def refusal(infrared: MotionSignal, visible: MotionSignal, **settings) -> NoSharedMotion:
    with pytest.raises(NoSharedMotion) as caught:
        estimate_offset(infrared, visible, **settings)
    text = str(caught.value)
    assert ":" in text
    assert "\n" not in text
    return caught.value


def test_without_shared_motion_there_is_a_reason_and_never_a_number():
    path, other = hand_held(1), hand_held(2)

    def still(t: np.ndarray) -> np.ndarray:
        return np.zeros((len(t), 2))

    def swing(t: np.ndarray) -> np.ndarray:
        return np.stack((5 * np.sin(2 * np.pi * t), np.zeros_like(t)), axis=1)

    assert refusal(seen(path, 30, 25, 1), seen(other, 30, 25, 2)).reason == "unrelated"
    assert refusal(seen(still, 30, 25, 1, noise_px=0.003), seen(path, 30, 25, 2)).reason == "no_motion"
    assert refusal(seen(still, 30, 25, 1, noise_px=0.003), seen(still, 30, 25, 2, noise_px=0.003)).reason == "no_motion"
    assert refusal(seen(still, 30, 25, 1, noise_px=0.2), seen(still, 30, 25, 2, noise_px=0.2)).reason == "unrelated"
    assert refusal(seen(swing, 30, 25, 1), seen(swing, 30, 25, 2)).reason == "ambiguous"
    assert refusal(seen(path, 3, 25, 1), seen(path, 30, 25, 2)).reason == "too_short"
    assert refusal(seen(path, 30, 25, 1, offset_ms=60_000), seen(path, 30, 25, 2)).reason == "no_overlap"
    assert refusal(seen(path, 30, 25, 1, offset_ms=3000), seen(path, 30, 25, 2)).reason in ("unrelated", "out_of_range")


@pytest.mark.parametrize("seed", range(12))
def test_unrelated_motion_is_never_taken_for_shared_motion(seed):
    refusal(seen(hand_held(seed), 12, 25, seed), seen(hand_held(seed + 40), 12, 25, seed + 1), max_offset_s=2.0)


def test_a_signal_that_is_none_is_refused():
    with pytest.raises(CalibrationError, match="finite"):
        MotionSignal(np.arange(3.0), np.full((3, 2), np.nan))
    with pytest.raises(CalibrationError, match="rise"):
        MotionSignal(np.array([0.0, 2.0, 1.0]), np.zeros((3, 2)))
    with pytest.raises(CalibrationError, match="N times"):
        MotionSignal(np.arange(3.0), np.zeros((4, 2)))


# Pictures


def test_ego_motion_follows_a_picture_that_is_shifted_by_known_amounts():
    random = np.random.default_rng(0)
    big = blurred(random.normal(0, 60, (400, 500))) + 128
    ego = EgoMotion()
    truth = np.cumsum(random.normal(0, 2.5, (40, 2)), axis=0)
    truth[20:] += (15.0, -9.0)  # a jerk
    found = []
    for x, y in truth - truth[0]:
        rows, columns = np.mgrid[0:240, 0:320].astype(np.float32)
        picture = sampled(big, columns + 90 - x, rows + 80 - y) + random.normal(0, 2, (240, 320))
        motion = ego.add(np.clip(picture, 0, 255).astype(np.uint8))
        found.append((motion.x_px, motion.y_px))
    error = 2 * np.array(found) - (truth - truth[0])  # measured at half the size
    assert np.abs(error).max() < 0.25


def test_a_blank_picture_has_no_motion_and_says_so():
    ego = EgoMotion()
    motions = [ego.add(np.full((120, 160), 77, np.uint8)) for _ in range(4)]
    assert all(motion.broken for motion in motions)


def test_the_sway_of_the_synthetic_rig_gives_the_offset_of_its_clocks():
    infrared = rendered("infrared", 18, time_offset_ms=17, drift_ppm=40, shutter_every_s=7.0, shutter_s=0.5)
    found = estimate_offset(infrared, rendered("visible", 18))
    assert found.middle_offset_ms == pytest.approx(17 + 0.04 * found.middle_s, abs=3.0)
    assert found.confidence > 0.6


@pytest.mark.realdata
def test_real_pictures_of_both_kinds_that_are_moved_alike_give_the_offset(data_dir):
    """Each modality is measured in itself only; infrared at 25 Hz, visible at 30."""
    path = hand_held(8)
    infrared = first_picture(data_dir / "video" / "eval" / "m3svd_0115_1834_ir.mkv")
    visible = first_picture(data_dir / "video" / "eval" / "m3svd_0115_1834_vi.mkv")
    found = estimate_offset(
        moved_picture(infrared, path, 8, 25, 1, offset_ms=31), moved_picture(visible, path, 8, 30, 2)
    )
    assert found.offset_ms == pytest.approx(31, abs=3)
    assert found.confidence > 0.6


# The command


def write_video(path: Path, path_px: Path2D, start_s: float, seconds: float, rate_hz: int = 25) -> None:
    """A textured wall seen by a camera that turns; sharp, so that compression does not blur small motion."""
    random = np.random.default_rng(9)
    wall = np.clip(blurred(random.normal(0, 60, (300, 400))) + 128, 0, 255).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(rate_hz))
        stream.width, stream.height, stream.pix_fmt = 160, 120, "gray"
        rows, columns = np.mgrid[0:120, 0:160].astype(np.float32)
        times = start_s + np.arange(int(seconds * rate_hz)) / rate_hz
        for x, y in np.clip(path_px(times), -55, 55):
            picture = sampled(wall, columns + 110 - x, rows + 80 - y).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode(None))


def test_the_command_measures_two_recordings_and_writes_json(tmp_path: Path):
    path = hand_held(6)
    write_video(tmp_path / "ir.mkv", path, start_s=0.140, seconds=14)  # began 140 ms later
    write_video(tmp_path / "vis.mkv", path, start_s=0.0, seconds=14, rate_hz=30)
    arguments = ["calibrate", "time", str(tmp_path / "ir.mkv"), str(tmp_path / "vis.mkv"), "--json", "-"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout[result.stdout.index("{") : result.stdout.rindex("}") + 1])
    assert report["state"] == "ok"
    assert report["offset_ms"] == pytest.approx(-140, abs=2)
    assert report["confidence"] > 0.6
    assert set(report) >= {"offset_sigma_ms", "drift_ppm", "drift_sigma_ppm", "correlation", "shared_s", "frames"}
    assert report["frames"] == {"ir": 350, "vis": 420}


def test_what_was_measured_is_stored_and_the_rest_of_the_calibration_stays(tmp_path: Path):
    file = tmp_path / "rig.yaml"
    size, matrix = (64, 48), np.array([[60.0, 0, 31.5], [0, 60, 23.5], [0, 0, 1]])
    camera = CameraModel(*size, matrix)
    save_rig(Rig(camera, camera, np.eye(4)), file, {"created": "today", "quality": {"views": 34}})
    assert load_rig(file).drift_ppm == 0  # a file that says nothing about it
    path = hand_held(3)
    found = estimate_offset(seen(path, 120, 25, 1, offset_ms=20, drift_ppm=80), seen(path, 120, 30, 2))
    save_timing(file, found.for_calibration())
    rig = load_rig(file)
    assert rig.time_offset_ms == pytest.approx(20, abs=1)
    assert rig.drift_ppm == pytest.approx(80, abs=10)
    assert load_quality(file) == {"views": 34}
    config = with_rig_offset(SyncConfig(infrared_offset_ms=5), Register(RegistrationConfig(), InfraredGain(), rig))
    assert config.infrared_offset_ms == pytest.approx(25, abs=1)
    assert config.infrared_drift_ppm == rig.drift_ppm


def test_a_drift_that_may_as_well_be_none_is_not_stored():
    measured = {"correlation": 0.95, "rival_correlation": 0.3, "shared_s": 20.0}
    found = TimeOffset(19.0, 1.5, 90.0, 60.0, 10.0, 19.9, 0.4, **measured)  # 90 ± 60 ppm
    assert found.for_calibration() == {
        "offset_ms": 19.9,
        "drift_ppm": 0.0,
        "sigma_ms": 0.4,
        "confidence": found.confidence,
    }


@pytest.mark.parametrize("drift_ppm", [float("nan"), 5000.0, -1e9])
def test_a_drift_that_no_clock_has_is_refused(drift_ppm):
    camera = CameraModel(64, 48, np.array([[60.0, 0, 31.5], [0, 60, 23.5], [0, 0, 1]]))
    with pytest.raises(CalibrationError, match="ppm"):
        Rig(camera, camera, np.eye(4), drift_ppm=drift_ppm)


def test_the_command_refuses_recordings_without_shared_motion(tmp_path: Path):
    write_video(tmp_path / "ir.mkv", hand_held(6), 0.0, 8)
    write_video(tmp_path / "vis.mkv", hand_held(7), 0.0, 8)
    target = tmp_path / "time.json"
    arguments = ["calibrate", "time", str(tmp_path / "ir.mkv"), str(tmp_path / "vis.mkv"), "--json", str(target)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, NoSharedMotion)  # main() makes one line and exit status 2 of it
    report = json.loads(target.read_text())
    assert report["offset_ms"] is None
    assert report["state"] == "unrelated"


# While the cameras run


class SimulatedClocks:
    """Feeds a tracker what two cameras with imperfect clocks would tell, without pictures."""

    def __init__(self, tracker: OffsetTracker, seed: int = 0, noise_px: float = 0.02) -> None:
        self.tracker, self.noise_px = tracker, noise_px
        self.random = np.random.default_rng(seed)
        self.step_ms = 0.0

    def run(self, path: Path2D, start_s: float, seconds: float, offset_ms: float, drift_ppm: float) -> None:
        true_s = start_s + np.arange(0, seconds, 0.08)
        places = path(true_s - start_s)
        for now_s, place in zip(true_s, places, strict=True):
            told_s = now_s + (offset_ms + self.step_ms + drift_ppm * 1e-3 * now_s) / 1e3
            for camera, captured_s in (("visible", now_s), ("infrared", told_s)):
                x, y = place + self.random.normal(0, self.noise_px, 2)
                self.tracker.came(camera, captured_s, now_s + 0.03)
                if not self.tracker.resting(now_s):
                    self.tracker.logs[camera].note(captured_s, Motion(x, y, 1.0))
            self.tracker.slew(now_s)
            if self.tracker.due():
                self.tracker.estimate()

    def error_ms(self, now_s: float, offset_ms: float, drift_ppm: float) -> float:
        return self.tracker.applied_ms - (offset_ms + self.step_ms + drift_ppm * 1e-3 * now_s)


def test_a_running_offset_is_found_within_half_a_minute_and_slewed_in_without_a_jump():
    tracker = OffsetTracker()
    clocks = SimulatedClocks(tracker)
    applied = []
    for second in range(60):
        clocks.run(lambda t, at=second: hand_held(1)(t + at), float(second), 1.0, offset_ms=18, drift_ppm=50)
        applied.append(tracker.applied_ms)
        if second == 30:
            assert tracker.sure
            assert tracker.target_ms(30.0) == pytest.approx(18 + 1.5, abs=2)
    assert np.abs(np.diff(applied)).max() <= SLEW_MS_PER_S * 1.01
    assert clocks.error_ms(60.0, 18, 50) == pytest.approx(0, abs=2)


def test_a_rig_that_stands_still_is_left_alone():
    tracker = OffsetTracker()
    SimulatedClocks(tracker, noise_px=0.002).run(lambda t: np.zeros((len(t), 2)), 0.0, 60, offset_ms=18, drift_ppm=0)
    assert tracker.applied_ms == 0
    assert tracker.state == "no_motion"
    assert tracker.report()["offset_ms"] is None


@pytest.mark.parametrize("drift_ppm", [-100.0, 100.0])
def test_drift_and_a_clock_that_is_set_are_followed(drift_ppm):
    """Ten minutes of motion; after five, the infrared clock is set back by 0.4 s."""
    tracker = OffsetTracker()
    clocks = SimulatedClocks(tracker, seed=3)
    errors = []
    for number in range(30):
        start_s = 20.0 * number
        if number == 15:
            clocks.step_ms = -400.0
        path = hand_held(number)
        clocks.run(path, start_s, 20.0, offset_ms=5.0, drift_ppm=drift_ppm)
        errors.append(abs(clocks.error_ms(start_s + 20, 5.0, drift_ppm)))
    assert tracker.steps >= 1
    assert max(errors[3:15]) <= 3.0
    assert max(errors[20:]) <= 3.0
    assert tracker.report()["drift_ppm"] == pytest.approx(drift_ppm, abs=20)


def test_a_night_in_the_car_park_does_not_carry_a_drift_on():
    """Ten minutes on the road at 50 ppm, then eight hours without motion, which would make 1.4 s of it."""
    tracker = OffsetTracker()
    clocks = SimulatedClocks(tracker)
    for number in range(10):
        clocks.run(hand_held(number), 60.0 * number, 60.0, offset_ms=5.0, drift_ppm=50.0)
    on_the_road_ms = tracker.applied_ms
    assert on_the_road_ms == pytest.approx(5 + 30, abs=2)
    for now_s in range(600, 600 + 8 * 3600, 5):
        tracker.slew(float(now_s))
    assert tracker.applied_ms == pytest.approx(on_the_road_ms, abs=13)  # what four minutes make of 50 ppm, and 1 ms


def test_an_offset_is_found_again_near_the_configured_one_after_a_clock_was_set():
    """Cameras 0.4 s apart, of which the infrared one is then set to 0.15 s on the other side."""
    tracker = OffsetTracker()
    clocks = SimulatedClocks(tracker)
    clocks.run(hand_held(1), 0.0, 60.0, offset_ms=400.0, drift_ppm=0.0)
    assert tracker.applied_ms == pytest.approx(400, abs=2)
    clocks.run(hand_held(2), 60.0, 60.0, offset_ms=-150.0, drift_ppm=0.0)
    assert tracker.applied_ms == pytest.approx(-150, abs=2)


def test_a_watch_that_has_failed_says_so_and_changes_nothing_any_more(monkeypatch, caplog):
    watch = ClockWatch()
    SimulatedClocks(watch._tracker).run(hand_held(1), 0.0, 60.0, offset_ms=18.0, drift_ppm=0.0)
    assert watch.report()["state"] == "sure"
    monkeypatch.setattr(MotionLog, "add", lambda *_: 1 / 0)
    watch.start()
    watch.offer(Frame("visible", np.zeros((48, 64, 3), np.uint8), 60 * 10**9, 0))
    watch._thread.join(10)
    assert watch.report()["state"] == "ended"
    assert watch.report()["applied_ms"] == pytest.approx(18, abs=2)
    assert watch.slew(61 * 10**9) == 0
    assert watch.drift_ppm == {}
    assert caplog.text.count("the clock offset is no longer watched") == 1
